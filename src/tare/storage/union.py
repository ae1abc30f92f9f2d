"""Reading a file of an image without mounting it: a lookup in stacked layer directories, as overlayfs would do it.

A layer's directory may hold anything that an image's author put there, so each component is opened by itself, never
following a symbolic link; links are resolved here, within the stack, so that "/etc/passwd -> /etc/passwd" or "../../.." leads
nowhere outside. Whiteouts are character devices 0/0, opaque directories carry overlayfs's xattr. redirect and metacopy xattrs are not
followed: layers are unpacked without them.

Source: kernel Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories".
"""

from __future__ import annotations

import enum
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

HOPS = 40
OPAQUE = "trusted.overlay.opaque"
LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
ABSENT = (errno.ENOENT, errno.ENOTDIR)

Merged = tuple[int, ...]
"""A directory of the union: descriptors of the layers' directories that make it up, topmost first."""


class Kind(enum.Enum):
    """What is at a path, symbolic links followed."""

    FILE = "file"
    DIRECTORY = "directory"
    OTHER = "other"


class Loop(OSError):
    """More symbolic links than the kernel would follow."""

    def __init__(self, path: str) -> None:
        super().__init__(errno.ELOOP, os.strerror(errno.ELOOP), path)


def kind(layers: Sequence[Path], path: str) -> Kind | None:
    """What is at a path of the union of `layers` (topmost first); None where nothing is. Raises OSError (ELOOP, or a layer's own failure)."""
    with lookup(layers, path) as found:
        if found is None:
            return None
        mode = os.fstat(found[0]).st_mode
    return Kind.DIRECTORY if stat.S_ISDIR(mode) else Kind.FILE if stat.S_ISREG(mode) else Kind.OTHER


def read(layers: Sequence[Path], path: str, limit: int) -> bytes | None:
    """The first `limit` bytes of a regular file; None where nothing is, or something else than a file. Raises OSError as `kind`."""
    with lookup(layers, path) as found:
        if found is None or not stat.S_ISREG(os.fstat(found[0]).st_mode):
            return None
        fd = os.open(f"/proc/self/fd/{found[0]}", os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(fd, "rb", buffering=0) as file:
            parts = []
            left = limit
            while left > 0 and (part := file.read(min(left, 1 << 20))):
                parts.append(part)
                left -= len(part)
    return b"".join(parts)


@contextmanager
def lookup(layers: Sequence[Path], path: str) -> Iterator[Merged | None]:
    """O_PATH descriptors of what is at a path: one, or for a directory one for each layer that has part of it. None: nothing is there."""
    with ExitStack() as owned:
        root = tuple(keep(owned, os.open(layer, LOOK | os.O_DIRECTORY)) for layer in layers)
        trail: list[Merged] = [root]
        pending = names(path)
        hops = 0
        while pending:
            name = pending.pop()
            if name == "..":
                del trail[max(1, len(trail) - 1) :]
                continue
            found = step(owned, trail[-1], name)
            if not found:
                yield None
                return
            mode = os.fstat(found[0]).st_mode
            if stat.S_ISLNK(mode):
                hops += 1
                if hops > HOPS:
                    raise Loop(path)
                target = os.readlink("", dir_fd=found[0])
                if target.startswith("/"):
                    del trail[1:]
                pending += names(target)
            elif pending and not stat.S_ISDIR(mode):
                yield None
                return
            else:
                trail.append(found)
        yield trail[-1]


def names(path: str) -> list[str]:
    """Components in reverse, so that the next is popped off the end."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def keep(owned: ExitStack, fd: int) -> int:
    """Close it with the rest."""
    owned.callback(os.close, fd)
    return fd


def step(owned: ExitStack, directory: Merged, name: str) -> Merged:
    """What a merged directory has by one name: nothing, one thing that is no directory, or a merged directory."""
    found: list[int] = []
    for layer in directory:
        try:
            fd = os.open(name, LOOK, dir_fd=layer)
        except OSError as error:
            if error.errno in ABSENT:
                continue
            raise
        keep(owned, fd)
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
            break
        if not stat.S_ISDIR(status.st_mode):
            # Under a directory of a higher layer, whatever else is here cannot be seen.
            return tuple(found) or (fd,)
        found.append(fd)
        if opaque(fd):
            break
    return tuple(found)


def opaque(fd: int) -> bool:
    """Whether a directory hides those of lower layers. An O_PATH descriptor has no xattr calls of its own; its /proc link has."""
    try:
        return os.getxattr(f"/proc/self/fd/{fd}", OPAQUE) == b"y"
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        return False
