"""An ImageService of a test's own, in directories of its own, with short deadlines."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tare.config import ImagesConfig
from tare.images.service import ImageService
from tare.images.transport import Patience
from tare.state.database import Database, open_boot
from tare.state.operations import Operations

IMPATIENT = Patience(progress=1.0, attempts=4, pause=0.01, longest_pause=2.0)


@asynccontextmanager
async def image_service(
    directory: Path,
    *,
    in_use: Callable[[], set[str]] = set,
    patience: Patience = IMPATIENT,
    keep_blobs: bool = True,
    parallel_layers: int = 3,
    max_manifest_size: int = 4 << 20,
    **settings: Any,
) -> AsyncIterator[ImageService]:
    """A recovered service whose root is `directory`/root and whose hosts.toml files are under `directory`/hosts."""
    database, boot = Database(directory / "state.db"), open_boot(directory / "boot.db")
    settings.setdefault("disk_reserve", 0)
    config = ImagesConfig(
        hosts_dir=str(directory / "hosts"),
        keep_blobs=keep_blobs,
        parallel_layers=parallel_layers,
        max_manifest_size=max_manifest_size,
        **settings,
    )
    service = ImageService(database, Operations(boot), directory / "root", config, in_use, patience)
    try:
        await service.recover()
        yield service
    finally:
        await service.close()
        database.close()
        boot.close()


def files_of(directory: Path) -> list[str]:
    """What a service keeps on disk under `directory`: blobs, ingests and layers' directories by relative path."""
    root, found = directory / "root", []
    for part in ("blobs/sha256", "blobs/sha512", "ingest", "layers"):
        found += [f"{part}/{name}" for name in os.listdir(root / part)]
    return sorted(found)


def write_hosts(directory: Path, registry: str, text: str) -> None:
    """Give a service in `directory` a hosts.toml for `registry`."""
    folder = directory / "hosts" / registry
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hosts.toml").write_text(text)
