"""A directory tree as a value, to compare with another one: everything that a root filesystem promises about its files."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Seen:
    """One file. `content` is a file's SHA-256 or a link's target; `links` are the names of the same inode, itself included."""

    kind: str
    mode: int
    uid: int
    gid: int
    mtime: float
    device: int
    content: str
    xattrs: tuple[tuple[str, bytes], ...]
    links: tuple[str, ...]


def tree_of(root: Path, *, times: bool = True, ignore_xattrs: tuple[str, ...] = ()) -> dict[str, Seen]:
    """What lies under `root` by relative path, the root itself as "."; without symlinks being followed."""
    paths = ["."]
    for directory, directories, files in os.walk(root):
        paths += [os.path.relpath(os.path.join(directory, name), root) for name in (*directories, *files)]
    inodes: dict[tuple[int, int], list[str]] = {}
    for path in paths:
        status = os.lstat(root / path)
        inodes.setdefault((status.st_dev, status.st_ino), []).append(path)
    return {path: _seen(root / path, inodes, times, ignore_xattrs) for path in sorted(paths)}


def _seen(path: Path, inodes: dict[tuple[int, int], list[str]], times: bool, ignore: tuple[str, ...]) -> Seen:
    status = os.lstat(path)
    content = ""
    if stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
    names = [name for name in os.listxattr(path, follow_symlinks=False) if not name.startswith(ignore)]
    return Seen(
        kind=stat.filemode(status.st_mode)[0],
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        mtime=status.st_mtime if times else 0,
        device=status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0,
        content=content,
        xattrs=tuple(sorted((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)),
        links=tuple(sorted(inodes[status.st_dev, status.st_ino])),
    )
