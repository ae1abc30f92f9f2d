"""Copying files between two file system trees, each named by a descriptor of its root and never left: neither a link nor a race leads outside.

A path is looked up by openat2(2) within its root, links followed as if the root were /; below it every name is taken from a directory's
descriptor, and no link is followed. Links are copied as links. What is neither file, directory nor link is left out, and named.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

from tare.errors import FailedPrecondition, InvalidArgument, NotFound
from tare.launch import linux

IN_ROOT = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
BENEATH = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A path in a tree; `owner` gets what is written there (None: whoever writes it), `said` is what the user called it."""

    root: int
    path: str
    said: str
    owner: tuple[int, int] | None = None


Warn = Callable[[str], None]


@contextlib.contextmanager
def opened(fd: int) -> Iterator[int]:
    """A descriptor for as long as it is used."""
    try:
        yield fd
    finally:
        os.close(fd)


def find(place: Place, path: str, *, follow: bool = True) -> int | None:
    """An O_PATH descriptor of a path in the place's tree; None where there is nothing. Raises FailedPrecondition."""
    flags = os.O_PATH if follow else os.O_PATH | os.O_NOFOLLOW
    try:
        return linux.openat2(place.root, os.fsencode(path.lstrip("/") or "."), flags, IN_ROOT)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FailedPrecondition(f"look at {place.said}", cause=error) from error


def reopened(fd: int, flags: int) -> int:
    """What an O_PATH descriptor is of, opened for use."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def copy(source: Place, target: Place, *, follow: bool, keep_owners: bool, warn: Warn) -> None:
    """As `docker cp`: into a directory that is there, or to a name that is not. Raises NotFound, InvalidArgument, FailedPrecondition."""
    contents = source.path.rstrip("/").endswith("/.") or source.path == "."
    found = find(source, source.path, follow=follow or contents)
    if found is None:
        raise NotFound(f"copy {source.said}", cause="there is no such file or directory")
    with opened(found):
        status = os.fstat(found)
        into, name = destination(source, target, directory=stat.S_ISDIR(status.st_mode), contents=contents)
        copier = Copier(target.owner, keep_owners, warn)
        with opened(into):
            if stat.S_ISDIR(status.st_mode):
                with opened(reopened(found, os.O_RDONLY | os.O_DIRECTORY)) as directory:
                    if name:
                        copier.directory(directory, into, name, source.said)
                    else:
                        copier.contents(directory, into, source.said)
            elif stat.S_ISREG(status.st_mode):
                with opened(reopened(found, os.O_RDONLY)) as file:
                    copier.file(file, into, name)
            elif stat.S_ISLNK(status.st_mode):
                copier.link(os.readlink("", dir_fd=found), into, name, status)
            else:
                raise InvalidArgument(f"copy {source.said}", cause="it is neither a file, a directory nor a link")


def destination(source: Place, target: Place, *, directory: bool, contents: bool) -> tuple[int, str]:
    """(descriptor of the directory that is written to, the name in it; "" for the source's contents)."""
    doing = f"copy {source.said} to {target.said}"
    there = find(target, target.path)
    if there is not None:
        with opened(there):
            if stat.S_ISDIR(os.fstat(there).st_mode):
                base = os.path.basename(source.path.rstrip("/"))
                return reopened(there, os.O_RDONLY | os.O_DIRECTORY), "" if contents or base in ("", ".") else base
            if directory:
                raise InvalidArgument(doing, cause=f"{target.said} is a file, and a directory cannot be copied onto it")
    parent, name = os.path.split(target.path.rstrip("/"))
    if there is None and target.path.endswith("/") and not directory:
        raise NotFound(doing, cause=f"there is no directory {target.said}")
    above = find(target, parent or "/")
    if above is None:
        raise NotFound(doing, cause=f"the directory of {target.said} does not exist")
    with opened(above):
        into = reopened(above, os.O_RDONLY | os.O_DIRECTORY)
    if not directory:
        return into, name
    if there is None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o755, dir_fd=into)
            if target.owner is not None:
                os.chown(name, *target.owner, dir_fd=into, follow_symlinks=False)
    with opened(into):
        return os.open(name, FOLDER, dir_fd=into), ""


class Copier:
    """Writes below directories' descriptors. Modes and times are kept, owners where `keep_owners` says so."""

    def __init__(self, owner: tuple[int, int] | None, keep_owners: bool, warn: Warn) -> None:
        self._owner, self._keep_owners, self._warn = owner, keep_owners, warn

    def directory(self, source: int, into: int, name: str, said: str) -> None:
        """A directory with all in it."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=into)
        with opened(os.open(name, FOLDER, dir_fd=into)) as made:
            self.contents(source, made, said)
            self._dress(made, os.fstat(source))

    def contents(self, source: int, into: int, said: str) -> None:
        """All that is in a directory."""
        for name in sorted(os.listdir(source)):
            status = os.stat(name, dir_fd=source, follow_symlinks=False)
            if stat.S_ISDIR(status.st_mode):
                with opened(os.open(name, FOLDER, dir_fd=source)) as directory:
                    self.directory(directory, into, name, f"{said}/{name}")
            elif stat.S_ISREG(status.st_mode):
                with opened(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=source)) as file:
                    self.file(file, into, name)
            elif stat.S_ISLNK(status.st_mode):
                self.link(os.readlink(name, dir_fd=source), into, name, status)
            else:
                self._warn(f"{said}/{name} is left out: it is neither a file, a directory nor a link")

    def file(self, source: int, into: int, name: str) -> None:
        """A file's bytes, mode and times. One that is there is replaced, not written into: who has it open keeps the old one."""
        status = os.fstat(source)
        with opened(self.create(into, name)) as made:
            while move(source, made):
                continue
            self._dress(made, status)

    def create(self, into: int, name: str) -> int:
        """A new file in the place of whatever is there, if that is no directory."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=into)
        return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=into)

    def link(self, text: str, into: int, name: str, status: os.stat_result) -> None:
        """A symbolic link."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=into)
        os.symlink(text, name, dir_fd=into)
        owner = (status.st_uid, status.st_gid) if self._keep_owners else self._owner
        if owner is not None:
            os.chown(name, *owner, dir_fd=into, follow_symlinks=False)

    def _dress(self, made: int, status: os.stat_result) -> None:
        owner = (status.st_uid, status.st_gid) if self._keep_owners else self._owner
        if owner is not None:
            os.fchown(made, *owner)
        os.fchmod(made, stat.S_IMODE(status.st_mode))
        os.utime(made, ns=(status.st_atime_ns, status.st_mtime_ns))


def move(source: int, made: int) -> int:
    """One chunk."""
    data = os.read(source, CHUNK)
    view = memoryview(data)
    while view:
        view = view[os.write(made, view) :]
    return len(data)


# Tar streams


def pack(source: Place, out: IO[bytes], warn: Warn) -> None:
    """The source as a tar stream, under its own name. Raises NotFound."""
    found = find(source, source.path, follow=False)
    if found is None:
        raise NotFound(f"copy {source.said}", cause="there is no such file or directory")
    name = os.path.basename(source.path.rstrip("/")) or "."
    with opened(found), tarfile.open(fileobj=out, mode="w|") as archive:
        pack_one(archive, found, name, warn)


def pack_one(archive: tarfile.TarFile, found: int, name: str, warn: Warn) -> None:
    """One thing, and what is in it."""
    status = os.fstat(found)
    info = tarfile.TarInfo(name)
    info.mode, info.uid, info.gid = stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid
    info.mtime = int(status.st_mtime)
    if stat.S_ISDIR(status.st_mode):
        info.type = tarfile.DIRTYPE
        archive.addfile(info)
        with opened(reopened(found, os.O_RDONLY | os.O_DIRECTORY)) as directory:
            for child in sorted(os.listdir(directory)):
                with opened(os.open(child, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)) as below:
                    pack_one(archive, below, f"{name}/{child}", warn)
    elif stat.S_ISLNK(status.st_mode):
        info.type, info.linkname = tarfile.SYMTYPE, os.readlink("", dir_fd=found)
        archive.addfile(info)
    elif stat.S_ISREG(status.st_mode):
        info.size = status.st_size
        with open(reopened(found, os.O_RDONLY), "rb") as file:
            archive.addfile(info, file)
    else:
        warn(f"{name} is left out: it is neither a file, a directory nor a link")


def unpack(stream: IO[bytes], target: Place, *, keep_owners: bool, warn: Warn) -> None:
    """A tar stream into a directory that is there. Raises NotFound, InvalidArgument for what is no tar, or leads outside."""
    doing = f"copy a tar stream to {target.said}"
    found = find(target, target.path)
    if found is None:
        raise NotFound(doing, cause="there is no such directory")
    with opened(found), opened(reopened(found, os.O_RDONLY | os.O_DIRECTORY)) as into:
        try:
            with tarfile.open(fileobj=stream, mode="r|*") as archive:
                for member in archive:
                    unpack_one(archive, member, into, target.owner, keep_owners, warn)
        except (tarfile.TarError, EOFError) as error:
            raise InvalidArgument(doing, cause=error) from error
        except OSError as error:
            raise FailedPrecondition(doing, cause=error) from error


def unpack_one(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    into: int,
    owner: tuple[int, int] | None,
    keep_owners: bool,
    warn: Warn,
) -> None:
    """One member, beneath the directory; a link in the way is an error, not a way."""
    path = os.path.normpath(member.name)
    if path.startswith(("/", "..")):
        raise InvalidArgument("unpack a tar stream", cause=f"{member.name!r} leads outside")
    if path == ".":
        return
    parent, name = os.path.split(path)
    whose = (member.uid, member.gid) if keep_owners else owner
    with opened(linux.openat2(into, os.fsencode(parent or "."), os.O_RDONLY | os.O_DIRECTORY, BENEATH)) as above:
        if member.isdir():
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=above)
        elif member.issym():
            os.symlink(member.linkname, name, dir_fd=above)
        elif member.isreg():
            data = archive.extractfile(member)
            assert data is not None
            with opened(Copier(None, False, warn).create(above, name)) as made:
                while chunk := data.read(CHUNK):
                    os.write(made, chunk)
        else:
            warn(f"{member.name} is left out: it is neither a file, a directory nor a link")
            return
        if whose is not None:
            os.chown(name, *whose, dir_fd=above, follow_symlinks=False)
        if not member.issym():
            with opened(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)) as made:
                os.fchmod(made, member.mode & 0o7777)
                os.utime(made, (member.mtime, member.mtime))
