"""Tar streams for `tare cp`: out of a tree and into one (`trees`), which is never left.

What has vanished or shrunk since it was seen does not break a stream: a tree may be in use. A member that comes is put beneath the target,
with no link followed on its way; missing directories are made, hard links are links to what the stream has brought.
"""

from __future__ import annotations

import lzma
import os
import stat
import tarfile
import zlib
from typing import IO

from tare.cli.trees import (
    FOLDER,
    HOLD,
    MAX_DEPTH,
    ODD,
    Place,
    Warn,
    create,
    find,
    make_directory,
    make_room,
    opened,
    reopened,
)
from tare.errors import FailedPrecondition, InvalidArgument, NotFound
from tare.launch import linux

BENEATH = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS
CHUNK = 1 << 20


def pack(source: Place, out: IO[bytes], warn: Warn) -> None:
    """The source as a tar stream, under its own name. Raises NotFound, FailedPrecondition."""
    found = find(source, source.path, follow=source.path.endswith("/."))
    if found is None:
        raise NotFound(f"copy {source.said}", cause="there is no such file or directory")
    name = "." if source.path.endswith("/.") else os.path.basename(os.path.normpath(source.path)) or "."
    try:
        with opened(found), tarfile.open(fileobj=out, mode="w|") as archive:
            Packer(archive, source, warn).add(found, name, 0)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FailedPrecondition(f"copy {source.said}", cause=error) from error


class Packer:
    """Adds what descriptors are of to an archive."""

    def __init__(self, archive: tarfile.TarFile, source: Place, warn: Warn) -> None:
        self._archive, self._source, self._warn = archive, source, warn

    def add(self, held: int, name: str, above: int, depth: int = 0) -> None:
        """One thing, and what is in it; `above` is the device of the directory that it is in, 0 for the first."""
        status = os.fstat(held)
        info = tarfile.TarInfo(name)
        info.mode, info.mtime = stat.S_IMODE(status.st_mode), int(status.st_mtime)
        info.uid, info.gid = self._source.owners.within(status.st_uid, status.st_gid)
        if stat.S_ISDIR(status.st_mode):
            if above and status.st_dev != above and status.st_dev in self._source.kernel:
                self._warn(f"{name} is left out: it is the kernel's")
                return
            info.type = tarfile.DIRTYPE
            self._archive.addfile(info)
            self._add_contents(held, name, status.st_dev, depth)
        elif stat.S_ISLNK(status.st_mode):
            info.type, info.linkname = tarfile.SYMTYPE, os.readlink("", dir_fd=held)
            self._archive.addfile(info)
        elif stat.S_ISREG(status.st_mode):
            info.size = status.st_size
            with open(reopened(held, os.O_RDONLY), "rb") as file:
                self._archive.addfile(info, Exactly(file))
        else:
            self._warn(f"{name} is left out: {ODD}")

    def _add_contents(self, held: int, name: str, device: int, depth: int) -> None:
        if depth >= MAX_DEPTH:
            raise FailedPrecondition(f"pack {name}", cause=f"more than {MAX_DEPTH} directories are within one another")
        with opened(reopened(held, os.O_RDONLY | os.O_DIRECTORY)) as directory:
            for child in sorted(os.listdir(directory)):
                try:
                    below = os.open(child, HOLD, dir_fd=directory)
                except FileNotFoundError:
                    self._warn(f"{name}/{child} is left out: it vanished")
                    continue
                with opened(below):
                    self.add(below, f"{name}/{child}", device, depth + 1)


class Exactly:
    """A file as long as its reader wants: zeros are where it was cut short meanwhile."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, size: int = 0, /) -> bytes:
        """So many bytes."""
        return self._file.read(size).ljust(size, b"\0")


def unpack(stream: IO[bytes], target: Place, *, keep_owners: bool, warn: Warn) -> None:
    """A tar stream, compressed or not, into a directory that is there. Raises NotFound, InvalidArgument for what is no tar or leads outside."""
    doing = f"copy a tar stream to {target.said}"
    found = find(target, target.path)
    if found is None:
        raise NotFound(doing, cause="there is no such directory")
    try:
        with opened(found), opened(reopened(found, os.O_RDONLY | os.O_DIRECTORY)) as into:
            with tarfile.open(fileobj=stream, mode="r|*") as archive:
                unpacker = Unpacker(archive, into, target, keep_owners, warn)
                for member in archive:
                    unpacker.take(member)
            while stream.read(CHUNK):  # who writes it is not to fail on the padding at its end
                continue
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InvalidArgument(doing, cause=error) from error
    except OSError as error:
        raise FailedPrecondition(doing, cause=error) from error


class Unpacker:
    """Puts an archive's members beneath a directory."""

    def __init__(self, archive: tarfile.TarFile, into: int, target: Place, keep_owners: bool, warn: Warn) -> None:
        self._archive, self._into, self._target = archive, into, target
        self._keep_owners, self._warn = keep_owners, warn

    def take(self, member: tarfile.TarInfo) -> None:
        """One member. Raises OSError, InvalidArgument."""
        path = beneath(member.name)
        if path == ".":
            return
        parent, name = os.path.split(path)
        owner = self._target.owners.outside(*((member.uid, member.gid) if self._keep_owners else (0, 0)))
        with opened(self._directory(parent)) as above:
            if member.isdir():
                make_directory(name, above, 0o755, owner)
                with opened(os.open(name, FOLDER, dir_fd=above)) as made:
                    self._dress(made, member, owner)
            elif member.issym():
                make_room(above, name)
                os.symlink(member.linkname, name, dir_fd=above)
                os.chown(name, *owner, dir_fd=above, follow_symlinks=False)
            elif member.islnk():
                self._link(beneath(member.linkname), above, name)
            elif member.isreg():
                self._file(member, above, name, owner)
            else:
                self._warn(f"{member.name} is left out: {ODD}")

    def _directory(self, path: str) -> int:
        """A directory beneath the target, made if it is not there."""
        at = os.dup(self._into)
        for name in path.split("/") if path else ():
            with opened(at):
                make_directory(name, at, 0o755, self._target.owners.outside(0, 0))
                at = os.open(name, FOLDER, dir_fd=at)
        return at

    def _link(self, old: str, above: int, name: str) -> None:
        parent, base = os.path.split(old)
        with opened(
            linux.openat2(self._into, os.fsencode(parent or "."), os.O_RDONLY | os.O_DIRECTORY, BENEATH)
        ) as there:
            make_room(above, name)
            os.link(base, name, src_dir_fd=there, dst_dir_fd=above, follow_symlinks=False)

    def _file(self, member: tarfile.TarInfo, above: int, name: str, owner: tuple[int, int]) -> None:
        data = self._archive.extractfile(member)
        assert data is not None
        with opened(create(above, name)) as made:
            while chunk := data.read(CHUNK):
                view = memoryview(chunk)
                while view:
                    view = view[os.write(made, view) :]
            self._dress(made, member, owner)

    def _dress(self, made: int, member: tarfile.TarInfo, owner: tuple[int, int]) -> None:
        os.fchown(made, *owner)
        os.fchmod(made, member.mode & (0o7777 if self._keep_owners else 0o1777))
        os.utime(made, (member.mtime, member.mtime))


def beneath(name: str) -> str:
    """A member's path, which must lead nowhere else. Raises InvalidArgument."""
    path = os.path.normpath(name)
    if path == ".." or path.startswith(("/", "../")):
        raise InvalidArgument("unpack a tar stream", cause=f"{name!r} leads outside")
    return path
