"""What a client's bytes travel on: a TCP or unix connection, with or without TLS (and `peers.Tunnel`, within a WebSocket)."""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

CHUNK = 256 << 10
CLOSE_SECONDS = 5.0


class Carrier(Protocol):
    """What a peer's bytes travel on."""

    async def read(self) -> bytes:
        """What came next; b"" at the end."""

    def write(self, data: bytes) -> None:
        """Send, sooner or later."""

    async def drain(self) -> None:
        """Until there is room for more. Raises OSError where it is broken."""

    def has_left(self) -> bool:
        """Whether the client has closed its end, whatever of it is not read yet."""

    async def close(self, ended: asyncio.Event) -> None:
        """Hang up, and give the client a while to do so first, which sets `ended`."""

    def abort(self) -> None:
        """Hang up at once, whatever is still under way; who waits in `drain` waits no more."""


class Stream:
    """A connection of the stream kind. `first` came with its head; `closed` is told that it is no more, maybe twice."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        first: bytes = b"",
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        self._reader, self._writer, self._first, self._closed = reader, writer, first, closed

    async def read(self) -> bytes:
        """See Carrier."""
        if self._first:
            first, self._first = self._first, b""
            return first
        return await self._reader.read(CHUNK)

    def write(self, data: bytes) -> None:
        """See Carrier."""
        if not self._writer.is_closing():
            self._writer.write(data)

    async def drain(self) -> None:
        """See Carrier."""
        await self._writer.drain()

    def has_left(self) -> bool:
        """See Carrier."""
        connection = self._writer.get_extra_info("socket")
        if connection is None or connection.fileno() < 0:
            return True
        look = select.poll()
        look.register(connection.fileno(), select.POLLRDHUP)
        return bool(look.poll(0))

    async def close(self, ended: asyncio.Event) -> None:
        """See Carrier. The sending half goes first: closed whole with something unread, TCP would throw away what was sent.

        TLS has no halves, but a last word of its own, for whose answer `close` waits.
        """
        if self._writer.can_write_eof():
            with contextlib.suppress(OSError):
                self._writer.write_eof()
            await bounded(ended.wait())
        self._writer.close()
        try:
            with contextlib.suppress(OSError):
                await bounded(self._writer.wait_closed())
        finally:
            self.abort()

    def abort(self) -> None:
        """See Carrier."""
        self._writer.transport.abort()
        self._closed()


async def bounded(work: Coroutine[Any, Any, object]) -> None:
    """Wait for it, but not for ever."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(work, CLOSE_SECONDS)
