"""A file system that does not answer: what a hostPath on a lost NFS or FUSE server is like."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tare.launch import linux


@contextlib.contextmanager
def hanging(path: Path) -> Iterator[Path]:
    """A FUSE mount at `path`, made a directory, whose server never says a word. Whoever looks into it waits, and can be killed."""
    path.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        linux.mount(b"hang", bytes(path), b"fuse", 0, b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fd)
        yield path
    finally:
        os.close(fd)  # ends the connection: whoever waits still is told ENOTCONN
        with contextlib.suppress(OSError):
            linux.umount(bytes(path), linux.MNT_DETACH)
