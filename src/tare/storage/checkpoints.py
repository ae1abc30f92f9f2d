"""Directories of checkpoints: of those being taken, and of containers that are made from one and not started yet.

<root>/checkpoints/<ID>/         what is to be in a container's or pod's archive, until that is written
<root>/restores/<container ID>/  what came out of an archive, for as long as a start may need it
<root>/restores/.removed-…       being deleted
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from tare.errors import InternalError
from tare.storage.overlay import REMOVED, remove, sweep


class Checkpoints:
    """Below Tare's root directory `root`."""

    def __init__(self, root: Path) -> None:
        self._taken = root / "checkpoints"
        self._restored = root / "restores"

    def taken(self, name: str) -> Path:
        """Where one is taken."""
        return self._taken / checked(name)

    def restored(self, container_id: str) -> Path:
        """Where a container's is."""
        return self._restored / checked(container_id)

    async def make(self, directory: Path) -> None:
        """Make an empty directory, in the place of one that is left of something else. Raises OSError."""
        await self.remove(directory)
        await asyncio.to_thread(make, directory)

    async def remove(self, directory: Path) -> None:
        """Delete one. Idempotent."""
        try:
            await asyncio.to_thread(remove, directory.parent, directory.name)
        except OSError as error:
            raise InternalError(f"remove {directory}", cause=error) from error

    def list_restored(self) -> list[str]:
        """Container IDs of which there is something."""
        return listed(self._restored)

    def list_taken(self) -> list[str]:
        """Names under which something was taken and is still there."""
        return listed(self._taken)

    async def collect(self) -> None:
        """Delete what is left of removals that were cut off."""
        for base in (self._taken, self._restored):
            await asyncio.to_thread(sweep, base, REMOVED)


def checked(name: str) -> str:
    """A name that is one."""
    if not name or "/" in name or name.startswith("."):
        raise InternalError(f"find the checkpoint of {name!r}", cause="that is no ID")
    return name


def make(directory: Path) -> None:
    """A directory that only root enters."""
    directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.mkdir(mode=0o700)


def listed(base: Path) -> list[str]:
    """Names in a directory that may not be there, but for those that are being deleted."""
    try:
        return sorted(name for name in os.listdir(base) if not name.startswith(REMOVED))
    except FileNotFoundError:
        return []
