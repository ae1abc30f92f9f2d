"""Writable layers on disk."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from tare.errors import InternalError
from tare.storage.overlay import Overlay, Snapshots, Usage


def test_prepare_list_remove(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    lower = tmp_path / "layer"
    lower.mkdir(mode=0o711)
    assert snapshots.list() == []
    overlay = asyncio.run(snapshots.prepare("c1", (lower,)))
    base = tmp_path / "containers/c1"
    assert (
        overlay == Overlay(lowers=(lower,), upper=base / "upper", work=base / "work") == snapshots.get("c1", (lower,))
    )
    assert overlay.upper.stat().st_mode & 0o7777 == 0o711
    assert base.stat().st_mode & 0o7777 == 0o700
    (overlay.upper / "file").write_text("x")
    assert asyncio.run(snapshots.prepare("c1", (lower,))) == overlay
    assert (overlay.upper / "file").exists()
    assert snapshots.list() == ["c1"]
    for _ in range(2):
        asyncio.run(snapshots.remove("c1"))
        assert snapshots.list() == []
    assert list((tmp_path / "containers").iterdir()) == []


def test_only_one_container_is_removed(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    for name in ("c", "c1", "c12"):
        asyncio.run(snapshots.prepare(name, ()))
    asyncio.run(snapshots.remove("c1"))
    assert snapshots.list() == ["c", "c12"]


def test_removal_that_was_cut_off_is_finished(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    for name in (".removed-c1.00.11", ".removed-c2.00"):
        (tmp_path / "containers" / name / "upper/a").mkdir(parents=True)
    assert snapshots.list() == []
    asyncio.run(snapshots.remove("c1"))
    assert os.listdir(tmp_path / "containers") == [".removed-c2.00"]
    asyncio.run(snapshots.collect())
    assert os.listdir(tmp_path / "containers") == []


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    upper = asyncio.run(snapshots.prepare("c1", ())).upper
    (upper / "link").symlink_to(outside)
    (upper / "d").mkdir()
    (upper / "d/link").symlink_to("../../../../outside")
    (upper / "hard").hardlink_to(outside / "kept")
    (upper / "d" / os.fsdecode(b"\xff\n")).write_text("")
    asyncio.run(snapshots.remove("c1"))
    assert (outside / "kept").read_text() == "x"
    assert snapshots.list() == []


def deep(top: Path, depth: int) -> None:
    """Directories in directories, deeper than any path can name."""
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir("d" * 50, dir_fd=fd)
        below = os.open("d" * 50, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)


def test_a_tree_deeper_than_any_path_is_counted_and_removed(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    upper = asyncio.run(snapshots.prepare("c1", ())).upper
    deep(upper, 3000)
    assert asyncio.run(snapshots.usage("c1")).inodes == 3002
    asyncio.run(snapshots.remove("c1"))
    assert os.listdir(tmp_path / "containers") == []


def test_usage(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path)
    assert asyncio.run(snapshots.usage("c1")) == Usage(bytes=0, inodes=0)
    upper = asyncio.run(snapshots.prepare("c1", ())).upper
    empty = asyncio.run(snapshots.usage("c1"))
    assert empty.inodes == 1
    (upper / "a/b").mkdir(parents=True)
    (upper / "a/file").write_bytes(b"x" * 100_000)
    (upper / "a/b/again").hardlink_to(upper / "a/file")
    (upper / "sparse").touch()
    os.truncate(upper / "sparse", 1 << 30)
    (upper / "link").symlink_to("/")
    found = asyncio.run(snapshots.usage("c1"))
    assert found.inodes == 6
    assert 100_000 <= found.bytes - empty.bytes < 1 << 20


@pytest.mark.parametrize("name", ["", "..", "a/b", ".removed-x"])
def test_names_that_are_no_container(tmp_path: Path, name: str) -> None:
    with pytest.raises(InternalError):
        asyncio.run(Snapshots(tmp_path).remove(name))


def test_failures_say_what_failed(tmp_path: Path) -> None:
    (tmp_path / "containers").write_text("")
    snapshots = Snapshots(tmp_path)
    with pytest.raises(InternalError, match="make the writable layer of c1"):
        asyncio.run(snapshots.prepare("c1", ()))
    with pytest.raises(InternalError, match="remove the writable layer of c1"):
        asyncio.run(snapshots.remove("c1"))
