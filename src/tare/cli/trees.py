"""Copying files between two file system trees, each named by a descriptor of its root and never left: neither a link nor a race leads outside.

A path is looked up by openat2(2) within its root, links followed as if the root were /; below it every name is taken from a directory's
descriptor, no link is followed, and what is read is looked at again once it is held. Links are copied as links. What is neither file,
directory nor link is left out, and named; so are the kernel's own file systems, and what vanishes from a tree that is in use.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tare.errors import FailedPrecondition, InvalidArgument, NotFound
from tare.launch import linux

IN_ROOT = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
HOLD = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
CHUNK = 1 << 20
MAX_DEPTH = 200  # directories within one another: each is held open while it is copied
MAX_LINKS = 40
ODD = "it is neither a file, a directory nor a link"

Row = tuple[int, int, int]
"""Of a user namespace's map: its first ID, the node's first ID, how many."""


@dataclass(frozen=True, slots=True)
class Owners:
    """Who owns what in a container: maps of user and group IDs; who has no ID on the other side is its root there."""

    uids: tuple[Row, ...] = ((0, 0, 1 << 32),)
    gids: tuple[Row, ...] = ((0, 0, 1 << 32),)

    def outside(self, uid: int, gid: int) -> tuple[int, int]:
        """A container's owner as the node has it."""
        return shifted(self.uids, uid, 0, 1), shifted(self.gids, gid, 0, 1)

    def within(self, uid: int, gid: int) -> tuple[int, int]:
        """A node's owner as the container has it."""
        return shifted(self.uids, uid, 1, 0), shifted(self.gids, gid, 1, 0)


def shifted(rows: tuple[Row, ...], number: int, source: int, target: int) -> int:
    """An ID on the other side of a map; where it has none, that of the container's root."""
    for row in rows:
        if row[source] <= number < row[source] + row[2]:
            return row[target] + number - row[source]
    return next((row[target] for row in rows if row[0] == 0), 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A path in a tree, whose owners are the container's where it has any; `said` is what the user called it.

    `kernel` are the devices (st_dev) of the kernel's own file systems in it, such as proc.
    """

    root: int
    path: str
    said: str
    owners: Owners = Owners()
    kernel: frozenset[int] = frozenset()


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
    """What an O_PATH descriptor is of, opened for use: it cannot be another thing by then."""
    return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)


def copy(source: Place, target: Place, *, follow: bool, keep_owners: bool, warn: Warn) -> None:
    """As `docker cp`: into a directory that is there, or to a name that is not. Raises NotFound, InvalidArgument, FailedPrecondition."""
    try:
        copy_found(source, target, follow=follow, keep_owners=keep_owners, warn=warn)
    except OSError as error:
        raise FailedPrecondition(f"copy {source.said} to {target.said}", cause=error) from error


def copy_found(source: Place, target: Place, *, follow: bool, keep_owners: bool, warn: Warn) -> None:
    """The same; raises OSError too."""
    contents = source.path.endswith("/.")
    found = find(source, source.path, follow=follow or contents)
    if found is None:
        raise NotFound(f"copy {source.said}", cause="there is no such file or directory")
    with opened(found):
        status = os.fstat(found)
        into, name = destination(source, target, directory=stat.S_ISDIR(status.st_mode), contents=contents)
        copier = Copier(source, target, keep_owners, warn)
        with opened(into):
            if stat.S_ISDIR(status.st_mode):
                with opened(reopened(found, os.O_RDONLY | os.O_DIRECTORY)) as directory:
                    if name:
                        copier.directory(directory, into, name, source.said)
                    else:
                        copier.contents(directory, into, source.said)
            elif not copier.thing(found, into, name):
                raise InvalidArgument(f"copy {source.said}", cause=ODD)


def destination(source: Place, target: Place, *, directory: bool, contents: bool) -> tuple[int, str]:
    """(descriptor of the directory that is written to, the name in it; "" for the source's contents). Raises OSError too."""
    doing = f"copy {source.said} to {target.said}"
    there = find(target, target.path)
    if there is not None:
        with opened(there):
            if stat.S_ISDIR(os.fstat(there).st_mode):
                base = os.path.basename(os.path.normpath(source.path))
                return reopened(there, os.O_RDONLY | os.O_DIRECTORY), "" if contents else base
            if directory:
                raise InvalidArgument(doing, cause=f"{target.said} is a file, and a directory cannot be copied onto it")
    if there is None and target.path.endswith("/") and not directory:
        raise NotFound(doing, cause=f"there is no directory {target.said}")
    into, name = last(target, doing)
    if not directory:
        return into, name
    with opened(into):
        make_directory(name, into, 0o755, target.owners.outside(0, 0))
        return os.open(name, FOLDER, dir_fd=into), ""


def last(target: Place, doing: str) -> tuple[int, str]:
    """(descriptor of the directory, name) of a target that is to be written, whose last links are followed within its tree. Raises NotFound."""
    path = target.path.rstrip("/")
    for _ in range(MAX_LINKS):
        parent, name = os.path.split(path)
        above = find(target, parent or "/")
        if above is None:
            raise NotFound(doing, cause=f"the directory of {target.said} does not exist")
        with opened(above):
            try:
                path = os.path.join(parent or "/", os.readlink(name, dir_fd=above))
            except OSError:
                return reopened(above, os.O_RDONLY | os.O_DIRECTORY), name
    raise FailedPrecondition(doing, cause=OSError(errno.ELOOP, os.strerror(errno.ELOOP), target.said))


def make_directory(name: str, into: int, mode: int, owner: tuple[int, int]) -> None:
    """A directory, where there is none of this name. Raises OSError; NotADirectoryError for anything else that is there, a link as well."""
    try:
        os.mkdir(name, mode, dir_fd=into)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(name, dir_fd=into, follow_symlinks=False).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name) from None
    else:
        with opened(os.open(name, FOLDER, dir_fd=into)) as made:
            os.fchown(made, *owner)


def create(into: int, name: str) -> int:
    """A new file in the place of a file or link that is there: who has that open keeps it. Raises OSError, InvalidArgument."""
    make_room(into, name)
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=into)


def make_room(into: int, name: str) -> None:
    """Take a file or link away; a device, a pipe or a socket is nobody's to replace. Raises OSError, InvalidArgument."""
    try:
        mode = os.stat(name, dir_fd=into, follow_symlinks=False).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode) or stat.S_ISDIR(mode)):
            raise InvalidArgument(f"write {name}", cause=f"something of that name is there, and {ODD}")
        os.unlink(name, dir_fd=into)
    except FileNotFoundError:
        return


class Copier:
    """Writes below directories' descriptors. Modes and times are kept; owners and set-ID bits where `keep_owners` says so.

    A set-ID bit that came to another owner would be that owner's rights for everybody.
    """

    def __init__(self, source: Place, target: Place, keep_owners: bool, warn: Warn) -> None:
        self._source, self._target, self._keep_owners, self._warn = source, target, keep_owners, warn
        self._depth = 0

    def directory(self, source: int, into: int, name: str, said: str) -> None:
        """A directory with all in it."""
        make_directory(name, into, 0o700, self._target.owners.outside(0, 0))
        with opened(os.open(name, FOLDER, dir_fd=into)) as made:
            self.contents(source, made, said)
            self._dress(made, os.fstat(source))

    def contents(self, source: int, into: int, said: str) -> None:
        """All that is in a directory."""
        if self._depth >= MAX_DEPTH:
            raise FailedPrecondition(f"copy {said}", cause=f"more than {MAX_DEPTH} directories are within one another")
        self._depth += 1
        for name in sorted(os.listdir(source)):
            try:
                held = os.open(name, HOLD, dir_fd=source)
            except FileNotFoundError:
                self._warn(f"{said}/{name} is left out: it vanished")
                continue
            with opened(held):
                status = os.fstat(held)
                if not stat.S_ISDIR(status.st_mode):
                    if not self.thing(held, into, name):
                        self._warn(f"{said}/{name} is left out: {ODD}")
                elif status.st_dev in self._source.kernel and status.st_dev != os.fstat(source).st_dev:
                    self._warn(f"{said}/{name} is left out: it is the kernel's")
                else:
                    with opened(reopened(held, os.O_RDONLY | os.O_DIRECTORY)) as directory:
                        self.directory(directory, into, name, f"{said}/{name}")
        self._depth -= 1

    def thing(self, held: int, into: int, name: str) -> bool:
        """A file or link that an O_PATH descriptor is of; False for anything else."""
        status = os.fstat(held)
        if stat.S_ISREG(status.st_mode):
            with opened(reopened(held, os.O_RDONLY)) as file, opened(create(into, name)) as made:
                fill(file, made)
                self._dress(made, status)
        elif stat.S_ISLNK(status.st_mode):
            make_room(into, name)
            os.symlink(os.readlink("", dir_fd=held), name, dir_fd=into)
            os.chown(name, *self._owner(status), dir_fd=into, follow_symlinks=False)
        else:
            return False
        return True

    def _owner(self, status: os.stat_result) -> tuple[int, int]:
        who = self._source.owners.within(status.st_uid, status.st_gid) if self._keep_owners else (0, 0)
        return self._target.owners.outside(*who)

    def _dress(self, made: int, status: os.stat_result) -> None:
        os.fchown(made, *self._owner(status))
        os.fchmod(made, stat.S_IMODE(status.st_mode) & (0o7777 if self._keep_owners else 0o1777))
        os.utime(made, ns=(status.st_atime_ns, status.st_mtime_ns))


def fill(source: int, made: int) -> None:
    """A file's bytes, with its holes left holes: what is nothing takes no room."""
    at, size = 0, os.fstat(source).st_size  # one that grows as fast as it is read would have no end
    while not at or at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
            end = os.lseek(source, at, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no more data: the rest is a hole
                os.ftruncate(made, size)
                return
            while move(source, made, CHUNK):  # a file system without such a thing, proc for one
                continue
            return
        os.lseek(source, at, os.SEEK_SET)
        os.lseek(made, at, os.SEEK_SET)
        while at < end and (moved := move(source, made, min(CHUNK, end - at))):
            at += moved
        if at < end:  # it was cut short meanwhile
            return


def move(source: int, made: int, most: int) -> int:
    """One chunk."""
    data = os.read(source, most)
    view = memoryview(data)
    while view:
        view = view[os.write(made, view) :]
    return len(data)
