"""Pipes and terminals, read and written without holding up the loop. A descriptor has one reader and one writer at a time."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import struct
import termios

CHUNK = 256 << 10
PIPE = 256 << 10  # bytes that a pipe holds: four times the kernel's own choice, for fewer turns


class Descriptor:
    """A non-blocking descriptor that is closed once. What waits on it when it is closed ends as at the end of file."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self.fd = fd
        self._waiting: set[asyncio.Future[None]] = set()

    async def read(self) -> bytes:
        """What comes next; b"" at the end, which for a terminal is that nobody has it open."""
        while self.fd >= 0:
            try:
                return os.read(self.fd, CHUNK)
            except BlockingIOError:
                await self._ready(reading=True)
            except OSError as error:
                if error.errno == errno.EIO:
                    return b""
                raise
        return b""

    async def write(self, data: bytes) -> bool:
        """All of it; False where nobody reads any more."""
        view = memoryview(data)
        while view and self.fd >= 0:
            try:
                view = view[os.write(self.fd, view) :]
            except BlockingIOError:
                await self._ready(reading=False)
            except OSError as error:
                if error.errno in (errno.EPIPE, errno.EIO):
                    return False
                raise
        return not view

    def resize(self, width: int, height: int) -> None:
        """The window of a terminal, in characters."""
        if self.fd >= 0:
            fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    async def _ready(self, *, reading: bool) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        add, remove = (loop.add_reader, loop.remove_reader) if reading else (loop.add_writer, loop.remove_writer)
        fd = self.fd
        add(fd, wake, future)
        self._waiting.add(future)
        try:
            await future
        finally:
            self._waiting.discard(future)
            if self.fd == fd:
                remove(fd)

    def close(self) -> None:
        """Close it; whoever waits is woken."""
        if self.fd < 0:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.fd)
        loop.remove_writer(self.fd)
        os.close(self.fd)
        self.fd = -1
        for future in self._waiting:
            wake(future)


def wake(future: asyncio.Future[None]) -> None:
    """Have who waits look again."""
    if not future.done():
        future.set_result(None)


def pipe() -> tuple[int, int]:
    """(the end that is read, the end that is written), for this process alone until one is given away."""
    ends = os.pipe2(os.O_CLOEXEC)
    with contextlib.suppress(PermissionError):  # pipe-user-pages-soft: the kernel's own size does as well
        fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, PIPE)
    return ends
