"""What images take, as the disk's own tools count it; and who gives way when the disk is full."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.image_service import files_of, image_service
from tests.support.images import Blob, File, Hardlink, Node, Symlink, make_image
from tests.support.registry import Registry

pytestmark = pytest.mark.root


def disk_usage(*paths: Path) -> int:
    """Bytes, by du."""
    shown = subprocess.run(["du", "-s", "-B1", "-c", *map(str, paths)], capture_output=True, text=True, check=True)
    return int(shown.stdout.splitlines()[-1].split()[0])


def test_usage_is_what_du_says(registry: Registry, tmp_path: Path) -> None:
    tree: dict[str, Node] = {f"usr/d{n % 40}/f{n}": "x" * (n * 17 % 9000) for n in range(1500)}
    tree |= {"usr/first": Hardlink("usr/d0/f0"), "usr/link": Symlink("first"), "usr/long": Symlink("x" * 100)}
    tree |= {"usr/with": File(data=b"y", xattrs={"user.big": b"z" * 3000})}
    registry.push(make_image(tmp_path / "layout", [tree, {"usr/d1/f1": "other"}]), "room/du:1")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            root = tmp_path / "root"
            await service.pull(f"{registry.url}/room/du:1", None)
            images, containers = await service.filesystems()
            expected = disk_usage(root / "blobs", root / "ingest", root / "layers")
            assert abs(images.bytes - expected) <= expected * 0.02
            assert containers.bytes == 0
            written = root / "containers" / "c1" / "upper"
            written.mkdir(parents=True)
            (written / "file").write_bytes(bytes(300_000))
            _, containers = await service.filesystems()
            expected = disk_usage(root / "containers")
            assert abs(containers.bytes - expected) <= expected * 0.02

    asyncio.run(main())


def test_room_is_made_by_removing_what_nobody_uses(registry: Registry, tmp_path: Path) -> None:
    names = []
    for number in (1, 2, 3):
        layout = make_image(tmp_path / f"layout{number}", [{"base": "b"}, {"own": str(number)}])
        registry.push(layout, f"room/gc{number}:1")
        names.append(f"{registry.url}/room/gc{number}:1")
    in_use: set[str] = set()

    async def main() -> None:
        full: dict[str, Any] = {"gc_high": 0.0, "gc_low": 0.0, "gc_min_age": 0.0}
        async with image_service(tmp_path, in_use=lambda: in_use, pinned=("*/gc1:*",), **full) as service:
            before = files_of(tmp_path)
            one, two, three = [await service.pull(name, None) for name in names]
            assert (one.pinned, two.pinned) == (True, False)
            in_use.update(two.chain_ids)
            await service.filesystems()
            assert service.kubelet_served()
            assert await service.make_room() == ()
            service._asked_at = float("-inf")
            assert await service.make_room() == (three.id,)
            assert [image.id for image in service.list()] == [one.id, two.id]
            in_use.clear()
            assert await service.make_room() == (two.id,)
            await service.remove(names[0])
            assert files_of(tmp_path) == before

    asyncio.run(main())
    young: dict[str, Any] = {"gc_high": 0.0, "gc_low": 0.0, "gc_min_age": 3600.0}

    async def later() -> None:
        async with image_service(tmp_path, **young) as service:
            await service.pull(names[0], None)
            assert await service.make_room() == ()

    asyncio.run(later())


def test_what_a_killed_pull_has_brought_gives_way_first(registry: Registry, layout: Path, tmp_path: Path) -> None:
    registry.push(layout, "room/kept:1")
    blob, name = Blob(b"brought by a pull that was killed"), f"{registry.url}/room/kept:1"

    async def main() -> None:
        async with image_service(tmp_path) as service:
            image = await service.pull(name, None)
            service.store.content.put(blob.digest, blob.data)
            service.store.expect("killed", [blob.digest])
        low: dict[str, Any] = {"gc_high": 0.0, "gc_low": 100.0}
        async with image_service(tmp_path, **low) as service:
            await service.collect()
            assert service.store.content.size(blob.digest) == len(blob.data)
            assert await service.make_room() == ()
        async with image_service(tmp_path, gc_high=0.0, gc_low=0.0) as service:
            assert await service.make_room() == ()  # the image is too young
            assert service.store.content.size(blob.digest) is None
            assert service.list() == [image]

    asyncio.run(main())
