"""What a container changed, written down and laid into another's writable layer: overlayfs shows the same tree through both."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.errors import InvalidArgument
from tare.images.unpack import Limits
from tare.launch import linux
from tare.runtime import checkpoint_archive as archive
from tare.storage import difference
from tare.storage.difference import Stop, Stopped

pytestmark = pytest.mark.root
Seen = dict[str, tuple[object, ...]]


@contextlib.contextmanager
def overlay(base: Path, lower: Path, name: str) -> Iterator[tuple[Path, Path]]:
    """(where it is mounted, its upper directory)."""
    upper, work, at = (base / f"{name}-{part}" for part in ("upper", "work", "at"))
    for path in (upper, work, at):
        path.mkdir(exist_ok=True)
    data = f"lowerdir={lower},upperdir={upper},workdir={work}".encode()
    linux.mount(b"overlay", os.fsencode(at), b"overlay", 0, data)
    try:
        yield at, upper
    finally:
        linux.umount(os.fsencode(at), linux.MNT_DETACH)


def seen(root: Path) -> Seen:
    """All there is below: kind and mode, owner, contents, links."""
    found: Seen = {}
    inodes: dict[int, str] = {}
    for path in sorted(root.rglob("*")):
        name, status = str(path.relative_to(root)), path.lstat()
        content: object = ""
        if stat.S_ISREG(status.st_mode):
            first = inodes.setdefault(status.st_ino, name)
            content = (path.read_bytes(), first, dict.fromkeys(os.listxattr(path)))
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISCHR(status.st_mode):
            content = status.st_rdev
        found[name] = (status.st_mode, status.st_uid, status.st_gid, content)
    return found


def base_tree(root: Path) -> Path:
    (root / "etc/conf.d").mkdir(parents=True)
    (root / "etc/conf.d").chmod(0o2750)
    for name in ("etc/passwd", "etc/conf.d/a", "etc/conf.d/b", "gone", "becomes-directory"):
        (root / name).write_text(name)
    (root / "replaced/deep/deeper").mkdir(parents=True)
    (root / "replaced/deep/file").write_text("old")
    (root / "kept").symlink_to("etc/passwd")
    return root


def change(root: Path) -> None:
    (root / "gone").unlink()
    (root / "etc/conf.d/a").unlink()
    (root / "etc/conf.d/b").write_text("changed")
    for path in ("replaced/deep/deeper", "replaced/deep"):
        for inner in (root / path).iterdir():
            if inner.is_file():
                inner.unlink()
        (root / path).rmdir()
    (root / "replaced").rmdir()
    (root / "replaced/deep").mkdir(parents=True)
    (root / "replaced/new").write_text("new")
    (root / "becomes-directory").unlink()
    (root / "becomes-directory").mkdir(mode=0o700)
    (root / "new/tree").mkdir(parents=True)
    (root / "new/one").write_bytes(os.urandom(100_000))
    os.link(root / "new/one", root / "new/tree/two")
    os.setxattr(root / "new/one", "user.note", b"\xff\x00")
    os.chown(root / "new/tree", 12, 34)
    (root / "new/link").symlink_to("../outside/../../etc")
    os.mkfifo(root / "new/fifo")
    os.mknod(root / "new/null", 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    (root / "new/Ümläut\n").touch(0o4711)


def test_the_same_tree_comes_out(tmp_path: Path) -> None:
    lower = base_tree(tmp_path / "lower")
    with overlay(tmp_path, lower, "one") as (at, upper):
        change(at)
        expected = seen(at)
        (directory := tmp_path / "checkpoint").mkdir()
        with (directory / archive.DIFFERENCE).open("xb") as file:
            deleted = difference.write(upper, [lower], file, Stop())
    assert {"/gone", "/etc/conf.d/a"} <= set(deleted)
    (tmp_path / "two-upper").mkdir()
    archive.lay(directory, deleted, tmp_path / "two-upper", [lower], Limits(), "restore")
    with overlay(tmp_path, lower, "two") as (at, _):
        assert seen(at) == expected


def test_nothing_changed_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "upper").mkdir()
    file = io.BytesIO()
    assert difference.write(tmp_path / "upper", [], file, Stop()) == []
    assert len(file.getvalue()) % 512 == 0


def test_it_stops_when_it_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper/file").write_bytes(bytes(1 << 20))
    stop = Stop()
    stop.set()
    with pytest.raises(Stopped):
        difference.write(tmp_path / "upper", [], io.BytesIO(), stop)


@pytest.mark.parametrize("path", ["/", "", "/..", "/a/..", "/a\0b"])
def test_what_is_gone_has_a_name(tmp_path: Path, path: str) -> None:
    (tmp_path / "upper").mkdir()
    with pytest.raises(InvalidArgument, match="names"):
        archive.lay(tmp_path, [path], tmp_path / "upper", [], Limits(), "restore")
