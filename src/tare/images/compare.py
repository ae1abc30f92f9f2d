"""Are two trees the same, byte for byte? For layers: one as it is, one as its blob makes it. Blocks; for a thread."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

PIECE = 1 << 20


def differences(one: Path, other: Path, timeless: Collection[bytes] = ()) -> Iterator[str]:
    """What is different, in a few words each with the path below the trees. Nothing is followed.

    Of the directories `timeless` (b"" is the root) the time is what it happened to be when they were made.
    """
    pending = [""]
    while pending:
        here = pending.pop()
        left, right = listed(one / here), listed(other / here)
        for name in sorted(left.keys() | right.keys()):
            path = f"{here}/{name}" if here else name
            if name not in left:
                yield f"/{path} is missing"
            elif name not in right:
                yield f"/{path} should not be there"
            elif words := unlike(one / path, left[name], other / path, right[name], os.fsencode(path) in timeless):
                yield f"/{path} has another {words}"
            elif stat.S_ISDIR(left[name].st_mode):
                pending.append(path)
    if words := unlike(one, os.lstat(one), other, os.lstat(other), b"" in timeless):
        yield f"/ has another {words}"


def listed(directory: Path) -> dict[str, os.stat_result]:
    """What is in a directory."""
    with os.scandir(directory) as entries:
        return {entry.name: entry.stat(follow_symlinks=False) for entry in entries}


def unlike(one: Path, left: os.stat_result, other: Path, right: os.stat_result, timeless: bool) -> str:
    """In what two things differ, "" where in nothing."""
    if left.st_mode != right.st_mode:
        return "type or mode"
    if (left.st_uid, left.st_gid) != (right.st_uid, right.st_gid):
        return "owner"
    kind = left.st_mode
    if not stat.S_ISDIR(kind) and (left.st_size, left.st_rdev) != (right.st_size, right.st_rdev):
        return "size"
    if left.st_mtime_ns != right.st_mtime_ns and not timeless and not is_whiteout(left):
        return "time"
    if stat.S_ISLNK(kind) and os.readlink(one) != os.readlink(other):
        return "target"
    if attributes(one) != attributes(other):
        return "extended attribute"
    return "content" if stat.S_ISREG(kind) and not same_bytes(one, other) else ""


def is_whiteout(status: os.stat_result) -> bool:
    """Whiteouts are made when a layer is unpacked, and have the time of that."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def attributes(path: Path) -> dict[str, bytes]:
    """Extended attributes."""
    return {name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)}


def same_bytes(one: Path, other: Path) -> bool:
    """Have two files the same content?"""
    with one.open("rb") as left, other.open("rb") as right:
        while True:
            data = left.read(PIECE)
            if data != right.read(PIECE):
                return False
            if not data:
                return True
