"""Writable layers of containers: a directory pair (upper, work) that overlayfs mounts above the image's layers.

    <root>/containers/<container ID>/upper     what the container wrote
                                     work      overlayfs's own
    <root>/containers/.removed-<ID>.<number>   being deleted; whatever is left of it is deleted by the next removal

Mounting is the launcher's. Containers write here, so names and depths are theirs to choose: deletion and counting use a
bounded number of descriptors and no recursion, whatever the tree looks like.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import stat
import time
from dataclasses import dataclass
from pathlib import Path

from tare.errors import InternalError, ResourceExhausted

REMOVED = ".removed-"
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
BLOCK = 512
CHEAP_COUNT = 0.01  # seconds of CPU time; a count that took no longer is made anew each time
COUNT_PAUSE = 10  # counting all layers takes at most one part in so many of the time


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlay:
    """What overlayfs is mounted from: `lowers` TOP first."""

    lowers: tuple[Path, ...]
    upper: Path
    work: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Disk use: `bytes` as allocated on the disk, and `inodes`."""

    bytes: int
    inodes: int


class Snapshots:
    """Writable layers below Tare's root directory `root`."""

    def __init__(self, root: Path) -> None:
        self._base = root / "containers"
        self._total = Usage(bytes=0, inodes=0)
        self._fresh_until = 0.0
        self._counting: asyncio.Task[Usage] | None = None

    def get(self, container_id: str, lowers: tuple[Path, ...]) -> Overlay:
        """The paths alone; nothing is made or looked at."""
        directory = self._directory(container_id)
        return Overlay(lowers=lowers, upper=directory / "upper", work=directory / "work")

    def _directory(self, container_id: str) -> Path:
        if not container_id or "/" in container_id or container_id.startswith("."):
            raise InternalError(f"find the writable layer of {container_id!r}", cause="that is no container ID")
        return self._base / container_id

    async def prepare(self, container_id: str, lowers: tuple[Path, ...]) -> Overlay:
        """Make the writable layer. One that exists is handed back as it is. Raises ResourceExhausted where the disk is full."""
        overlay = self.get(container_id, lowers)
        try:
            await asyncio.to_thread(make, self._base, overlay)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (ResourceExhausted if full else InternalError)(
                f"make the writable layer of {container_id}", cause=error
            ) from error
        return overlay

    async def remove(self, container_id: str) -> None:
        """Delete it, and what an earlier removal of it that was cut off left. Idempotent."""
        try:
            await asyncio.to_thread(remove, self._base, self._directory(container_id).name)
        except OSError as error:
            hint = "is something mounted in it, or marked immutable (lsattr)?"
            raise InternalError(f"remove the writable layer of {container_id}", cause=error, hint=hint) from error

    async def collect(self) -> None:
        """Delete what is left of removals that were cut off, of any container; for a daemon's start."""
        await asyncio.to_thread(sweep, self._base, REMOVED)

    def list(self) -> list[str]:
        """Container IDs that have a writable layer."""
        try:
            names = os.listdir(self._base)
        except FileNotFoundError:
            return []
        return sorted(name for name in names if not name.startswith(REMOVED))

    async def usage(self, container_id: str) -> Usage:
        """What the writable layer takes, hard links counted once; zero where there is none. A tree that changes meanwhile is counted roughly."""
        return await asyncio.to_thread(measure, self._directory(container_id) / "upper")

    def count(self, container_id: str) -> tuple[Usage, float]:
        """As `usage`, blocking, and how many seconds of CPU time it took."""
        return timed(self._directory(container_id) / "upper")

    @property
    def file_system(self) -> Path:
        """A path on the file system that they lie on."""
        return self._base.parent

    async def total(self) -> Usage:
        """What all writable layers take together. Those who ask at one time share one count; one that took long is kept for a while."""
        if time.monotonic() < self._fresh_until:
            return self._total
        if self._counting is None:
            self._counting = asyncio.ensure_future(self._count())
        return await asyncio.shield(self._counting)

    async def _count(self) -> Usage:
        try:
            self._total, cost = await asyncio.to_thread(timed, self._base)
        finally:
            self._counting = None
        if cost > CHEAP_COUNT:
            self._fresh_until = time.monotonic() + cost * COUNT_PAUSE
        return self._total


def make(base: Path, overlay: Overlay) -> None:
    """Both directories. The container's "/" has its mode and owner from `upper`, so these are taken from the image's topmost layer."""
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    overlay.upper.parent.mkdir(mode=0o700, exist_ok=True)
    overlay.work.mkdir(mode=0o700, exist_ok=True)
    try:
        overlay.upper.mkdir(mode=0o755)
    except FileExistsError:
        return
    status = os.stat(overlay.lowers[0]) if overlay.lowers else None
    if status is None:
        return
    if (status.st_uid, status.st_gid) != (0, 0):
        os.chown(overlay.upper, status.st_uid, status.st_gid)
    os.chmod(overlay.upper, stat.S_IMODE(status.st_mode))


def remove(base: Path, container_id: str) -> None:
    """First out of sight by one rename, then deleted: a layer is never seen half gone."""
    prefix = f"{REMOVED}{container_id}."
    with contextlib.suppress(FileNotFoundError):
        os.rename(base / container_id, base / f"{prefix}{secrets.token_hex(4)}")
    sweep(base, prefix)


def sweep(base: Path, prefix: str) -> None:
    """Delete the directories in `base` whose names begin so."""
    try:
        top = os.open(base, DIRECTORY)
    except FileNotFoundError:
        return
    try:
        for name in os.listdir(top):
            if name.startswith(prefix):
                delete(top, name)
    finally:
        os.close(top)


def delete(top: int, name: str) -> None:
    """Delete a directory with all that is in it.

    Each directory found inside is moved up beside it and waits its turn there, so that a tree of any depth takes one descriptor
    and no path longer than a name. Two that delete the same tree do not disturb each other.
    """
    pending = [name]
    while pending:
        here = pending.pop()
        try:
            fd = os.open(here, DIRECTORY, dir_fd=top)
        except FileNotFoundError:
            continue
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending += hoist(fd, entry.name, top, name)
                    else:
                        unlink(fd, entry.name)
        finally:
            os.close(fd)
        if not remove_empty(top, here):
            pending.append(here)


def hoist(fd: int, name: str, top: int, prefix: str) -> list[str]:
    """Remove a directory if it is empty; else move it to the top under a new name, which is returned to be deleted there."""
    if remove_empty(fd, name):
        return []
    moved = f"{prefix}.{secrets.token_hex(8)}"
    try:
        os.rename(name, moved, src_dir_fd=fd, dst_dir_fd=top)
    except FileNotFoundError:
        return []
    return [moved]


def remove_empty(fd: int, name: str) -> bool:
    """rmdir; False where something is in it."""
    try:
        os.rmdir(name, dir_fd=fd)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.ENOTEMPTY:
            raise
        return False
    return True


def unlink(fd: int, name: str) -> None:
    """Remove one thing that is no directory."""
    try:
        os.unlink(name, dir_fd=fd)
    except FileNotFoundError:
        return


class Counter:
    """Adds up what lies in directories."""

    def __init__(self) -> None:
        self.bytes = 0
        self.inodes = 0
        self._linked: set[int] = set()

    def add(self, status: os.stat_result) -> None:
        """One thing, hard links of it once."""
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            if status.st_ino in self._linked:
                return
            self._linked.add(status.st_ino)
        self.bytes += status.st_blocks * BLOCK
        self.inodes += 1

    def directory(self, fd: int) -> list[str]:
        """All that is in a directory; the names of the directories among it."""
        below = []
        with os.scandir(fd) as entries:
            for entry in entries:
                try:
                    self.add(entry.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.name)
        return below


def measure(path: Path) -> Usage:
    """Count a tree with one directory open at a time: down by name, up by "..", which counts only if it leads to where it came from."""
    counter = Counter()
    fd = open_below(path)
    if fd is None:
        return Usage(bytes=0, inodes=0)
    try:
        counter.add(os.fstat(fd))
        trail = [(os.fstat(fd).st_ino, counter.directory(fd))]
        while trail:
            if trail[-1][1]:
                lower = open_below(trail[-1][1].pop(), fd)
                if lower is None:
                    continue
                os.close(fd)
                fd = lower
                trail.append((os.fstat(fd).st_ino, counter.directory(fd)))
                continue
            trail.pop()
            if trail:
                upper = os.open("..", DIRECTORY, dir_fd=fd)
                os.close(fd)
                fd = upper
                if os.fstat(fd).st_ino != trail[-1][0]:
                    break
    finally:
        os.close(fd)
    return Usage(bytes=counter.bytes, inodes=counter.inodes)


def timed(path: Path) -> tuple[Usage, float]:
    """As `measure`, and how many seconds of CPU time that took."""
    began = time.thread_time()
    return measure(path), time.thread_time() - began


def open_below(path: str | Path, fd: int | None = None) -> int | None:
    """A directory, or None where it has gone or been replaced meanwhile."""
    try:
        return os.open(path, DIRECTORY, dir_fd=fd)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise
