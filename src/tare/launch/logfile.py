"""Log files: opened, and found again after they were renamed. What is written into them is elsewhere."""

from __future__ import annotations

import errno
import os
import stat

# O_NONBLOCK so that a FIFO in a log's place is an error and not a wait; it means nothing for a regular file.
FLAGS = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def open_log(path: bytes) -> int:
    """The file at `path`, made with the directories above it if absent. Raises OSError with the path."""
    try:
        file = os.open(path, FLAGS | os.O_CREAT, 0o640)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        file = os.open(path, FLAGS | os.O_CREAT, 0o640)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return file


def find_log(path: bytes, device: int, inode: int, offset: int) -> int:
    """The file with this device and inode, at `path` or, renamed, beside it; -1 where it is no longer.

    A file shorter than `offset` is another one with the same number, or one that was cut off: not what is looked for.
    """
    directory = os.path.dirname(path)
    try:
        beside = [os.path.join(directory, name) for name in os.listdir(directory)]
    except FileNotFoundError:
        return -1
    for candidate in (path, *beside):
        try:
            info = os.stat(candidate, follow_symlinks=False)
            if (info.st_dev, info.st_ino) != (device, inode) or info.st_size < offset:
                continue
            file = os.open(candidate, FLAGS)
        except FileNotFoundError:
            continue
        info = os.fstat(file)
        if (info.st_dev, info.st_ino) == (device, inode):
            return file
        os.close(file)
    return -1


def write_all(file: int, data: bytes, offset: int) -> None:
    """pwrite(2) until all of it is written."""
    written = os.pwrite(file, data, offset)
    while written < len(data):
        written += os.pwrite(file, memoryview(data)[written:], offset + written)


def cut(file: int, offset: int) -> None:
    """Take back what a failed write has left beyond `offset`. Where even that fails, the next write goes over it."""
    try:
        os.ftruncate(file, offset)
    except OSError:
        return
