"""A disk that writes down what it is told, and what it would hold had the power gone at any moment.

    file system ─► loop device ─► a file whose file system is this (FUSE) ─► bytes in memory, and the log: writes and flushes in their order

As a real disk with a volatile cache it has promised nothing but what came before a flush that it has answered. So a power cut at some
entry of the log leaves all writes before the last flush, and of those after it any, block by block: `cut` draws them from a seed.

    python -m tests.support.writelog FILE LOG IMAGE     serves IMAGE's bytes at FILE until FILE is unmounted
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tare.launch import linux
from tests.support.disks import environment

ENTRY = struct.Struct("<cQI")  # WRITE or FLUSH, where, how many bytes follow
WRITE, FLUSH = b"W", b"F"
BLOCK = 4096
LARGEST = 128 << 10
SECONDS = 20.0

HEADER = struct.Struct("<IIQQIIII")  # length, opcode, unique, node, uid, gid, pid, nothing
ANSWER = struct.Struct("<IiQ")  # length, error, unique
AT = struct.Struct("<QQIIQII")  # file, offset, size and what follows, of reads and writes
ATTRIBUTES = struct.Struct("<QII6Q10I")
GETATTR, SETATTR, OPEN, READ, WRITING, RELEASE, FSYNC, FLUSHING, INIT = 3, 4, 14, 15, 16, 18, 20, 25, 26
FORGET, INTERRUPT, DESTROY, BATCH_FORGET = 2, 36, 38, 42
BIG_WRITES, MAX_PAGES = 1 << 5, 1 << 22
ENOSYS = 38


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system on such a disk: where it is mounted, what it began with, and the log."""

    point: Path
    image: Path
    log: Path

    def now(self) -> int:
        """The end of the log, in bytes."""
        return self.log.stat().st_size


class Server:
    """Answers the kernel's requests about the one file, one after the other."""

    def __init__(self, device: int, log: int, image: bytearray) -> None:
        self._device = device
        self._log = log
        self._image = image

    def serve(self) -> None:
        """Until it is unmounted."""
        buffer = bytearray(LARGEST + BLOCK)
        while True:
            try:
                size = os.readv(self._device, [buffer])
            except InterruptedError:
                continue
            except OSError:  # ENODEV: unmounted
                return
            _, code, unique, *_ = HEADER.unpack_from(buffer)
            if code in (FORGET, BATCH_FORGET, INTERRUPT):
                continue
            answer = self.answer(code, memoryview(buffer)[HEADER.size : size])
            error, data = (-answer, b"") if isinstance(answer, int) else (0, answer)
            with contextlib.suppress(FileNotFoundError):  # who asked was interrupted
                os.write(self._device, ANSWER.pack(ANSWER.size + len(data), error, unique) + data)

    def answer(self, code: int, body: memoryview) -> bytes | int:
        """What is answered, or an errno."""
        if code == INIT:
            (ahead,) = struct.unpack_from("<I", body, 8)
            sizes = (16, 12, LARGEST, 1, LARGEST // BLOCK)
            return struct.pack("<IIIIHHIIHH32x", 7, 31, ahead, BIG_WRITES | MAX_PAGES, *sizes, 0)
        if code in (GETATTR, SETATTR):
            size = len(self._image)
            return ATTRIBUTES.pack(60, 0, 0, 1, size, size // 512, 0, 0, 0, 0, 0, 0, 0o100600, 1, 0, 0, 0, BLOCK, 0)
        if code == OPEN:
            return struct.pack("<QII", 0, 0, 0)
        if code == READ:
            _, offset, size, *_ = AT.unpack_from(body)
            return bytes(self._image[offset : offset + size])
        if code == WRITING:
            _, offset, size, *_ = AT.unpack_from(body)
            data = body[AT.size : AT.size + size]
            self._image[offset : offset + size] = data
            os.write(self._log, ENTRY.pack(WRITE, offset, size) + data)
            return struct.pack("<II", size, 0)
        if code == FSYNC:
            os.write(self._log, ENTRY.pack(FLUSH, 0, 0))
            return b""
        return b"" if code in (RELEASE, FLUSHING, DESTROY) else ENOSYS


def entries(log: Path) -> Iterator[tuple[int, bytes, int, bytes]]:
    """(where in the log, WRITE or FLUSH, where on the disk, what)."""
    at = 0
    with log.open("rb") as file:
        while header := file.read(ENTRY.size):
            kind, offset, size = ENTRY.unpack(header)
            yield at, kind, offset, file.read(size)
            at = file.tell()


def cut(disk: Disk, at: int, seed: object, target: Path) -> int:
    """What the disk holds after a power cut at this place of the log, written to `target`. How many blocks were in doubt."""
    chance = random.Random(f"{seed}")
    image = bytearray(disk.image.read_bytes())
    doubtful: list[tuple[int, bytes]] = []
    for where, kind, offset, data in entries(disk.log):
        if where >= at:
            break
        if kind == WRITE:
            doubtful += [(offset + i, data[i : i + BLOCK]) for i in range(0, len(data), BLOCK)]
            continue
        for offset, data in doubtful:
            image[offset : offset + len(data)] = data
        doubtful = []
    kept = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
    for offset, data in doubtful:
        if chance.random() < kept:
            image[offset : offset + len(data)] = data
    target.write_bytes(image)
    return len(doubtful)


@contextmanager
def logged_disk(directory: Path, megabytes: int) -> Iterator[Disk]:
    """An ext4 of that size on such a disk. The log stays when it is gone."""
    disk = Disk(directory / "disk", directory / "image", directory / "log")
    disk.point.mkdir()
    with disk.image.open("wb") as file:
        file.truncate(megabytes << 20)
    make = ["mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(disk.image)]
    subprocess.run(make, check=True, timeout=60, env=environment())
    file_ = directory / "file"
    file_.touch()
    server = subprocess.Popen([sys.executable, "-m", "tests.support.writelog", file_, disk.log, disk.image])
    try:
        deadline = time.monotonic() + SECONDS
        while file_.stat().st_size != megabytes << 20:
            assert server.poll() is None and time.monotonic() < deadline, "nobody serves the disk"
            time.sleep(0.01)
        with mounted(file_, disk.point):
            yield disk
    finally:
        subprocess.run(["umount", "-l", file_], check=True, timeout=60)
        server.wait(SECONDS)


@contextmanager
def mounted(image: Path, point: Path) -> Iterator[Path]:
    """The file system in a file."""
    subprocess.run(["mount", "-o", "loop", image, point], check=True, timeout=60)
    try:
        yield point
    finally:
        subprocess.run(["umount", "-l", point], check=True, timeout=60)


def main() -> None:
    """Serve."""
    file, log, image = map(Path, sys.argv[1:])
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    content = bytearray(image.read_bytes())
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    linux.mount(b"tare-writelog", bytes(file), b"fuse", 0, b"fd=%d,rootmode=100000,user_id=0,group_id=0" % device)
    Server(device, written, content).serve()


if __name__ == "__main__":
    main()
