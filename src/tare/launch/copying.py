"""Steps that make a new tmpfs like what it is going to hide: its mode, or (tmpcopyup) all that is there.

What is copied is the image's: names, depths and sizes are its own to choose. So there is no recursion, a handful of descriptors, no link
is followed, and what is no directory, file or symbolic link is left out.
"""

from __future__ import annotations

import os
import stat

from tare.launch import linux, mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tare.launch.machine import Machine

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
CHUNK = 1 << 30
ENOTSUP = 95


def like_hidden(machine: Machine, slot: int, target: bytes) -> None:
    """The mode of the directory at the target, if there is one."""
    place = hidden(machine, target)
    if place is not None:
        top = linux.openat2(machine.slots[slot], b".", DIRECTORY, mounts.STRICT)
        os.fchmod(top, stat.S_IMODE(os.fstat(place).st_mode))
        os.close(top)
        os.close(place)


def copy_up(machine: Machine, slot: int, target: bytes) -> None:
    """All that is in the directory at the target, if there is one, with owners, modes, times and extended attributes."""
    place = hidden(machine, target)
    if place is not None:
        copy_tree(place, machine.slots[slot])
        os.close(place)


def hidden(machine: Machine, target: bytes) -> int | None:
    """The directory at a path beneath the root; None where there is none."""
    return mounts.open_or_none(machine.root, target.strip(b"/") or b".", DIRECTORY, mounts.IN_ROOT)


def copy_tree(source: int, target: int) -> None:
    """The contents of one directory into another, of which nobody else knows yet."""
    left, done = [b"."], []
    while left:
        path = left.pop()
        done.append(path)
        ours, theirs = (linux.openat2(top, path, DIRECTORY, mounts.STRICT) for top in (source, target))
        for name in os.listdir(ours):
            if copy_entry(ours, theirs, os.fsencode(name)):
                left.append(path + b"/" + os.fsencode(name))
        os.close(ours)
        os.close(theirs)
    for path in reversed(done):  # the times of a directory, when nothing is made in it any more
        ours, theirs = (linux.openat2(top, path, DIRECTORY, mounts.STRICT) for top in (source, target))
        resemble(ours, theirs)
        os.close(ours)
        os.close(theirs)


def copy_entry(ours: int, theirs: int, name: bytes) -> bool:
    """One name; True for a directory, which is empty yet."""
    status = os.stat(name, dir_fd=ours, follow_symlinks=False)
    if stat.S_ISDIR(status.st_mode):
        os.mkdir(name, 0o700, dir_fd=theirs)
        return True
    if stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=ours), name, dir_fd=theirs)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=theirs, follow_symlinks=False)
    elif stat.S_ISREG(status.st_mode):
        reading = os.open(name, READ, dir_fd=ours)
        writing = os.open(name, WRITE, 0o600, dir_fd=theirs)
        offset = 0
        while count := os.sendfile(writing, reading, offset, CHUNK):
            offset += count
        resemble(reading, writing)
        os.close(reading)
        os.close(writing)
    return False


def resemble(one: int, other: int) -> None:
    """Give to an open file or directory what another has."""
    status = os.fstat(one)
    os.fchown(other, status.st_uid, status.st_gid)
    os.fchmod(other, stat.S_IMODE(status.st_mode))
    for name in os.listxattr(one):
        try:
            os.setxattr(other, name, os.getxattr(one, name))
        except OSError as error:
            if error.errno != ENOTSUP:  # of a tmpfs, before 6.6, for user.*
                raise
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))


OPERATIONS: dict[str, Callable[..., None]] = {"like_hidden": like_hidden, "copy_up": copy_up}
