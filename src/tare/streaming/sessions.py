"""A remote command's session: stdin, stdout, stderr, window sizes and the end, whatever the client speaks.

Both kinds give the same: `stdin` is read, `write` waits while the client is slow, `next_size` tells of windows, `finish` says how it ended and
closes. What a client does wrong ends the session with words on the error stream.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from tare.streaming import channels, remote
from tare.streaming.peers import PROTOCOL_ERROR, SpdyPeer, SpdyStream, WebSocketPeer
from tare.streaming.remote import Outcome, Size, Sizes, Wanted

CREATION_SECONDS = 30.0  # for the client to open its streams, as in Kubernetes


class BadClient(Exception):
    """The client does not keep to the protocol."""


class Session(Protocol):
    """What an exec or attach needs of its client."""

    gone: asyncio.Event

    async def stdin(self) -> bytes:
        """What the client typed next; b"" at the end."""

    async def write(self, name: str, data: bytes) -> None:
        """Output of STDOUT or STDERR, to where the client wants it."""

    async def next_size(self) -> Size | None:
        """The next size of the client's window; None when there will be none."""

    async def finish(self, outcome: Outcome) -> None:
        """Say how it ended, and hang up."""


class SpdySession:
    """Over SPDY, one stream for each name. `open` first."""

    def __init__(self, peer: SpdyPeer, protocol: str, wanted: Wanted) -> None:
        self._peer, self._protocol, self._wanted = peer, protocol, wanted
        self._streams: dict[str, SpdyStream] = {}
        self._reader = Sizes()
        self._known: list[Size] = []
        self.gone = peer.gone

    async def open(self) -> None:
        """Until the client has opened all its streams. Raises BadClient."""
        missing = set(self._wanted.names(self._protocol))
        try:
            async with asyncio.timeout(CREATION_SECONDS):
                while missing:
                    stream = await self._peer.next_stream()
                    if stream is None:
                        raise BadClient("the client hung up before it had opened its streams")
                    name = stream.headers.get("streamtype", "")
                    if name not in missing:
                        raise BadClient(
                            f"a stream of type {name!r} was opened, which is unknown, not asked for, or there"
                        )
                    missing.remove(name)
                    self._streams[name] = stream
            self._peer.take_no_more()
        except TimeoutError:
            names = ", ".join(sorted(missing))
            raise BadClient(f"the client has not opened its streams in {CREATION_SECONDS:g} s: {names}") from None

    async def stdin(self) -> bytes:
        """See Session."""
        stream = self._streams.get(remote.STDIN)
        return b"" if stream is None else await stream.receive()

    async def write(self, name: str, data: bytes) -> None:
        """See Session."""
        stream = self._streams.get(name)
        if stream is not None and not stream.reset.is_set():
            await stream.send(data)

    async def next_size(self) -> Size | None:
        """See Session."""
        stream = self._streams.get(remote.RESIZE)
        while stream is not None:
            if self._known:
                return self._known.pop(0)
            data = await stream.receive()
            if not data:
                return None
            try:
                self._known = self._reader.feed(data)
            except ValueError:
                stream.inbox.discard()  # full, it would hold up the other streams
                return None
        return None

    async def finish(self, outcome: Outcome) -> None:
        """See Session. Output ends before the end is told, so that a client has all of it by then."""
        for name in (remote.STDOUT, remote.STDERR):
            if name in self._streams:
                await self._streams[name].send(b"", fin=True)
        if remote.ERROR in self._streams:
            await self._streams[remote.ERROR].send(remote.told(self._protocol, outcome), fin=True)
        await self._peer.close()


class WebSocketSession:
    """Over a WebSocket, one channel for each name."""

    def __init__(self, peer: WebSocketPeer, protocol: str, wanted: Wanted) -> None:
        self._peer, self._protocol, self._wanted = peer, protocol, wanted
        self._stdin: asyncio.Queue[bytes] = asyncio.Queue(4)
        self._sizes: asyncio.Queue[Size | None] = asyncio.Queue(1)  # the last one: those before it are over
        self._stdin_closed = self._stdin_over = False
        self._reader: asyncio.Task[None] | None = None
        self.gone = peer.gone

    async def open(self) -> None:
        """Tell the client that all is ready: an empty message on the first channel that it reads, as Kubernetes sends it."""
        self._reader = asyncio.get_running_loop().create_task(self._read())
        names = ((remote.STDOUT, self._wanted.stdout), (remote.STDERR, self._wanted.stderr), (remote.ERROR, True))
        await self._send(next(name for name, asked in names if asked), b"")

    async def _read(self) -> None:
        """Sort messages into channels, until there are no more."""
        sizes = Sizes()
        try:
            while (message := await self._peer.next_message()) is not None:
                piece = channels.read(self._protocol, message)
                await self._take(piece, sizes)
        except (channels.ChannelError, ValueError) as error:
            await self._peer.close(PROTOCOL_ERROR, str(error))
        finally:
            self._stdin_over = True
            if self._stdin.empty():
                self._stdin.put_nowait(b"")
            if self._sizes.empty():
                self._sizes.put_nowait(None)

    async def _take(self, piece: channels.Piece, sizes: Sizes) -> None:
        if piece.channel == channels.NAMES.index(remote.STDIN):
            if self._wanted.stdin and not self._stdin_closed and (piece.closed or piece.data):
                self._stdin_closed = piece.closed
                await self._stdin.put(piece.data)
        elif piece.channel == channels.NAMES.index(remote.RESIZE):
            for size in sizes.feed(piece.data):
                if not self._sizes.empty():
                    self._sizes.get_nowait()
                self._sizes.put_nowait(size)
        elif piece.channel >= len(channels.NAMES):
            raise channels.ChannelError(f"channel {piece.channel} is none")

    async def stdin(self) -> bytes:
        """See Session."""
        if not self._wanted.stdin or (self._stdin_over and self._stdin.empty()):
            return b""
        return await self._stdin.get()

    async def write(self, name: str, data: bytes) -> None:
        """See Session."""
        if (name == remote.STDOUT and self._wanted.stdout) or (name == remote.STDERR and self._wanted.stderr):
            await self._send(name, data)

    async def _send(self, name: str, data: bytes) -> None:
        await self._peer.send(channels.write(self._protocol, channels.NAMES.index(name), data))

    async def next_size(self) -> Size | None:
        """See Session."""
        if self._stdin_over and self._sizes.empty():
            return None
        return await self._sizes.get()

    async def finish(self, outcome: Outcome) -> None:
        """See Session."""
        told = channels.told(self._protocol, outcome)
        if told:
            await self._send(remote.ERROR, told)
        await self._peer.close()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.wait([self._reader])
