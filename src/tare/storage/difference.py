"""What a container has changed in its root file system, as others write it down: an archive of what there is, and a list of what is gone.

An upper directory of overlayfs says the same in its own way: a character device 0:0 is a name that is gone, and an opaque directory hides
all that the layers below have in it (kernel Documentation/filesystems/overlayfs.rst). Whoever writes into the directory must stand still
meanwhile. Names are the container's to choose, so each directory is opened from the top without following a link.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from tare.errors import FailedPrecondition
from tare.launch import linux

BENEATH = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
OPAQUE = "trusted.overlay.opaque"
OTHERS = ("trusted.overlay.redirect", "trusted.overlay.metacopy")  # what an archive has no words for
PAX = "SCHILY.xattr."


class Stopped(Exception):
    """Nobody wants any more what a thread was doing."""


class Stop(threading.Event):
    """Set, to have a thread stop."""

    def check(self) -> None:
        """Raises Stopped."""
        if self.is_set():
            raise Stopped


class Guarded:
    """A file that can be read until somebody says stop."""

    def __init__(self, file: IO[bytes], stop: Stop) -> None:
        self._file = file
        self._stop = stop

    def read(self, size: int = -1) -> bytes:
        """As a file's. Raises Stopped."""
        self._stop.check()
        return self._file.read(size)


def write(upper: Path, lowers: Sequence[Path], file: IO[bytes], stop: Stop) -> list[str]:
    """Write the archive of a writable layer over these (topmost first); returns the absolute paths of what is gone.

    Blocks. Raises FailedPrecondition for what cannot be said in such an archive, OSError, Stopped.
    """
    gone: list[str] = []
    with contextlib.ExitStack() as owned, tarfile.open(fileobj=file, mode="w|", format=tarfile.PAX_FORMAT) as archive:
        root = opened(owned, upper)
        layers = [opened(owned, lower) for lower in lowers]
        linked: dict[tuple[int, int], str] = {}
        pending: list[tuple[str, bool]] = [("", False)]
        while pending:
            stop.check()
            path, hidden = pending.pop()
            with directory(root, path) as here:
                if here is None:
                    continue
                hidden = hidden or xattr(here, OPAQUE) == b"y"
                names = sorted(os.listdir(here))
                if hidden:
                    gone += [f"/{path}/{name}" for name in sorted(lower_names(layers, path) - set(names))]
                for name in names:
                    inner = f"{path}/{name}" if path else name
                    if add(archive, here, name, inner, linked, gone, stop):
                        pending.append((inner, hidden))
    return gone


def add(
    archive: tarfile.TarFile,
    parent: int,
    name: str,
    path: str,
    linked: dict[tuple[int, int], str],
    gone: list[str],
    stop: Stop,
) -> bool:
    """One thing; whether it is a directory, which is to be gone into."""
    status = os.stat(name, dir_fd=parent, follow_symlinks=False)
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
        gone.append(f"/{path}")
        return False
    if stat.S_ISSOCK(status.st_mode):
        return False
    entry = header(path, status)
    first = linked.setdefault((status.st_dev, status.st_ino), path)
    if stat.S_ISLNK(status.st_mode):
        entry.linkname = os.readlink(name, dir_fd=parent)
    elif not stat.S_ISDIR(status.st_mode) and first != path:
        entry.type, entry.linkname, entry.size = tarfile.LNKTYPE, first, 0
    if entry.type not in (tarfile.REGTYPE, tarfile.DIRTYPE):
        archive.addfile(entry)
        return False
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
    if entry.type == tarfile.DIRTYPE:
        with closing(fd):
            entry.pax_headers = dict(xattrs(fd, path))
            archive.addfile(entry)
        return True
    with os.fdopen(fd, "rb") as file:
        entry.pax_headers = dict(xattrs(fd, path))
        archive.addfile(entry, cast("IO[bytes]", Guarded(file, stop)))
    return False


def header(path: str, status: os.stat_result) -> tarfile.TarInfo:
    """An entry without what is in it."""
    kinds = {
        stat.S_IFREG: tarfile.REGTYPE,
        stat.S_IFDIR: tarfile.DIRTYPE,
        stat.S_IFLNK: tarfile.SYMTYPE,
        stat.S_IFCHR: tarfile.CHRTYPE,
        stat.S_IFBLK: tarfile.BLKTYPE,
        stat.S_IFIFO: tarfile.FIFOTYPE,
    }
    entry = tarfile.TarInfo(path)
    entry.type = kinds[stat.S_IFMT(status.st_mode)]
    entry.mode = stat.S_IMODE(status.st_mode)
    entry.uid, entry.gid = status.st_uid, status.st_gid
    entry.size = status.st_size if entry.type == tarfile.REGTYPE else 0
    entry.mtime = int(status.st_mtime)
    if entry.type in (tarfile.CHRTYPE, tarfile.BLKTYPE):
        entry.devmajor, entry.devminor = os.major(status.st_rdev), os.minor(status.st_rdev)
    return entry


def xattrs(fd: int, path: str) -> Iterator[tuple[str, str]]:
    """Extended attributes as records of an archive."""
    for name in os.listxattr(fd):
        if name in OTHERS:
            raise FailedPrecondition(f"write down what changed at /{path}", cause=f"it has the attribute {name}")
        if not name.startswith("trusted."):
            yield PAX + name, os.getxattr(fd, name).decode("utf-8", "surrogateescape")


def xattr(fd: int, name: str) -> bytes:
    """An extended attribute; b"" where there is none."""
    try:
        return os.getxattr(fd, name)
    except OSError:
        return b""


def lower_names(layers: Sequence[int], path: str) -> set[str]:
    """All that any layer has in a directory."""
    found: set[str] = set()
    for layer in layers:
        with directory(layer, path) as here:
            if here is not None:
                found.update(os.listdir(here))
    return found


def opened(owned: contextlib.ExitStack, path: Path) -> int:
    """A directory's descriptor, closed with the rest."""
    fd = os.open(path, DIRECTORY)
    owned.callback(os.close, fd)
    return fd


@contextlib.contextmanager
def directory(root: int, path: str) -> Iterator[int | None]:
    """A directory below another, without a link in its path; None where there is no such thing."""
    try:
        fd = linux.openat2(root, os.fsencode(path or "."), DIRECTORY, BENEATH)
    except (FileNotFoundError, NotADirectoryError):
        yield None
        return
    with closing(fd):
        yield fd


@contextlib.contextmanager
def closing(fd: int) -> Iterator[None]:
    """Close it in the end."""
    try:
        yield
    finally:
        os.close(fd)
