"""File systems that do not answer: what a hostPath on a lost NFS or FUSE server is like."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from tare.launch import linux

HEADER = struct.Struct("<IIQQIIII")  # of a request: length, opcode, unique, node, and who asks
LOOKUP, FORGET, GETATTR, INIT, INTERRUPT = 1, 2, 3, 26, 36
PIECE = 1 << 16
FORCE = 1


@contextlib.contextmanager
def hanging(path: Path) -> Iterator[Path]:
    """A FUSE mount at `path`, made a directory, whose server never says a word. Whoever looks into it waits, and can be killed."""
    with mounted(path) as (point, _):
        yield point


@contextlib.contextmanager
def stuck(path: Path) -> Iterator[Path]:
    """One that can be mounted from, whose server takes note of names asked for and never answers: whoever asks cannot be killed (state D)."""
    with mounted(path) as (point, device):
        server = threading.Thread(target=serve, args=(os.dup(device),), daemon=True)
        server.start()
        yield point
    server.join(10)


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[tuple[Path, int]]:
    """The mount, and the server's end of it."""
    path.mkdir()
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        linux.mount(b"hang", bytes(path), b"fuse", 0, b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fd)
        yield path, fd
    finally:
        with contextlib.suppress(OSError):
            linux.umount(bytes(path), linux.MNT_DETACH | FORCE)  # whoever waits still is told ENOTCONN
        os.close(fd)


def serve(device: int) -> None:
    """Until it is unmounted."""
    try:
        while True:
            request = os.read(device, 1 << 18)
            _, code, unique, *_ = HEADER.unpack_from(request)
            if code in (LOOKUP, FORGET, INTERRUPT):
                continue
            error, data = 0, b""
            if code == INIT:
                data = struct.pack("<IIIIHHIIHH32x", 7, 31, PIECE, 0, 16, 12, PIECE, 1, 1, 0)
            elif code == GETATTR:
                data = struct.pack("<QII6Q10I", 60, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0o040755, 2, 0, 0, 0, 4096, 0)
            else:
                error = -errno.ENOSYS
            os.write(device, struct.pack("<IiQ", 16 + len(data), error, unique) + data)
    except OSError:  # ENODEV: unmounted
        return
    finally:
        os.close(device)
