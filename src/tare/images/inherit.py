"""What a directory looks like that a layer implies without saying: as it does in the layers below.

A layer with `tmp/x` and no entry for `tmp` gets a directory `tmp` of its own, and overlayfs shows the topmost directory's
mode and owner. So those are taken from the nearest layer below that has the directory and is not hidden by a whiteout
or an opaque directory in between. Paths are walked without following links. Blocks; for a thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from tare.images.unpack import OPAQUE

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def inherit(layer: Path, implied: Iterable[bytes], below: Sequence[Path]) -> None:
    """Make the directories `implied` in `layer` look as they do in the layers `below` (topmost first), where they are there, and sync them."""
    for path in implied:
        target, hidden = find(layer, path)
        if target is None:
            continue
        try:
            for lower in () if hidden else below:
                source, hidden = find(lower, path)
                if source is not None:
                    try:
                        _copy(source, target)
                    finally:
                        os.close(source)
                if source is not None or hidden:
                    break
        finally:
            os.close(target)


def find(layer: Path, path: bytes) -> tuple[int | None, bool]:
    """A descriptor of the directory at `path` in a layer, if it has one, and whether it hides what the layers below have there."""
    descriptor = os.open(layer, _DIRECTORY)
    hidden = False
    for depth, part in enumerate(path.split(b"/") if path else ()):
        hidden = hidden or (depth > 0 and OPAQUE.decode() in os.listxattr(descriptor))
        try:
            inner = os.open(part, _DIRECTORY, dir_fd=descriptor)
        except FileNotFoundError:
            return None, hidden
        except NotADirectoryError:
            return None, True
        finally:
            os.close(descriptor)
        descriptor = inner
    return descriptor, hidden


def _copy(source: int, target: int) -> None:
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, status.st_mode & 0o7777)
    for name in os.listxattr(source):
        if not name.startswith("trusted.overlay."):
            os.setxattr(target, name, os.getxattr(source, name))
    os.utime(target, ns=(status.st_mtime_ns, status.st_mtime_ns))
    os.fsync(target)
