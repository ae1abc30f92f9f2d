"""What is used up, in words: of which file system bytes or inodes, whose descriptors, whose PIDs, whose memory. Looks, and changes nothing.

An error says that something is used up and seldom what. So the chain of an error and its causes is looked through for one of the
kernel's, and what it names (or, where it names nothing, the directories of this instance) is looked at.
"""

from __future__ import annotations

import errno
import os
import resource
import sqlite3
from collections.abc import Iterator
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
SQLITE_WRITES = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
READ_ONLY = "a file system is read-only"
NO_THREAD = "can't start new thread"
_watched: list[Path] = []


def watch(*places: Path) -> None:
    """The directories to look at where an error names no path."""
    _watched[:] = places


def shortage(error: BaseException) -> str | None:
    """What is used up that made this error; None where it is something else."""
    for link in chain(error):
        number, path = getattr(link, "errno", None), getattr(link, "filename", None)
        if isinstance(number, int):
            found = by_number(number, path if isinstance(path, str | bytes) else None, forked=hasattr(link, "step"))
        elif (
            isinstance(link, sqlite3.OperationalError) and getattr(link, "sqlite_errorcode", 0) & 0xFF in SQLITE_WRITES
        ):
            found = of_disks(None)
        elif isinstance(link, RuntimeError) and NO_THREAD in str(link):
            found = of_pids()
        else:
            found = "memory" if isinstance(link, MemoryError) else None
        if found is not None:
            return found
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def by_number(number: int, path: str | bytes | None, *, forked: bool) -> str | None:
    """By the kernel's number for it; `forked` says that it came of making a process."""
    if number == errno.EROFS:
        return (
            f"file system {mount_point(Path(os.fsdecode(path)))} is read-only" if path else of_disks(None) or READ_ONLY
        )
    if number in NO_ROOM:
        return of_disks(path) or (f"no room left in {os.fsdecode(path)}" if path else "no room left on a file system")
    if number == errno.EMFILE:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return f"the daemon has no file descriptor left (RLIMIT_NOFILE is {soft}; under systemd LimitNOFILE)"
    if number == errno.ENFILE:
        return "the node has no open file left (sysctl fs.file-max)"
    if number == errno.ENOMEM:
        return "no memory is left to the node, or to the control group of Tare's processes"
    return of_pids() if number == errno.EAGAIN and forked else None


def of_disks(path: str | bytes | None) -> str | None:
    """The first file system that is full or read-only: that of a path, or of the directories of this instance."""
    places = [Path(os.fsdecode(path))] if path else _watched
    return next((words for place in places if (words := of_disk(place)) is not None), None)


def of_disk(place: Path) -> str | None:
    """What is used up of the file system that a path is, or would be, on."""
    there = next((part for part in (place, *place.parents) if part.exists()), None)
    if there is None:
        return None
    status, name = os.statvfs(there), mount_point(there)
    if status.f_flag & os.ST_RDONLY:
        return f"file system {name} is read-only"
    if status.f_files and status.f_favail == 0:
        return f"file system {name} has no inode left of {status.f_files}"
    total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    if free * 100 <= total or free < 1 << 20:
        return f"file system {name} has {free >> 10} KiB left of {total >> 20} MiB"
    return None


def mount_point(path: Path) -> Path:
    """Where the file system of a path is mounted."""
    path = path.resolve()
    return next((part for part in (path, *path.parents) if os.path.ismount(part)), Path("/"))


def of_pids() -> str:
    """Whose PIDs are used up: the control group's, if its limit is reached, else the user's or the node's."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        top = "/sys/fs/cgroup/pids" if "pids" in controllers.split(",") else "/sys/fs/cgroup" if not controllers else ""
        for directory in (Path(f"{top}{group}"), *Path(f"{top}{group}").parents) if top else ():
            try:
                most, now = (directory / "pids.max").read_text().strip(), int((directory / "pids.current").read_text())
            except (OSError, ValueError):
                continue
            if most.isdigit() and now >= int(most):
                return f"control group {directory} has all {most} PIDs that it may have (pids.max)"
    places = (
        "a control group above Tare's processes (pids.max), the user (RLIMIT_NPROC) or the node (sysctl kernel.pid_max)"
    )
    return f"no process or thread can be made: {places} has no PID left"
