"""The two kinds of connection to a client, SPDY and WebSocket, as streams that are read and written with bounded memory.

A reader task takes what comes and puts it into the streams' inboxes. While an inbox is full nothing is read from the connection, so that a
client is held back by TCP itself; while the client is slow, `send` waits. When the connection ends, `gone` is set and every inbox ends; what
was sent by then has a while to be taken, after which the connection is aborted, so that nobody waits for a client that never reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

from wsproto.connection import Connection as WebSocket
from wsproto.connection import ConnectionState, ConnectionType
from wsproto.events import (
    BytesMessage,
    CloseConnection,
    Event,
    Message,
    Ping,
    TextMessage,
)
from wsproto.utilities import RemoteProtocolError

from tare.streaming import carriers, spdy
from tare.streaming.carriers import Carrier, bounded
from tare.streaming.inbox import Budget, Inbox

log = logging.getLogger(__name__)

MAX_MESSAGE = 4 << 20  # bytes of one WebSocket message
LOOK = 1.0  # seconds between two looks for a client that is not read from
NORMAL, PROTOCOL_ERROR, TOO_BIG = 1000, 1002, 1009


class Peer(ABC):
    """A connection to a client, read from `begin` on until it ends; `close` ends it.

    `idle`: seconds in which neither side says a word, or the client takes nothing of what it is told, after which it is given up.
    """

    def __init__(self, carrier: Carrier, idle: float) -> None:
        self._carrier, self._idle = carrier, idle
        self._task: asyncio.Task[None] | None = None
        self._ended = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._last_call: asyncio.TimerHandle | None = None
        self._heard = 0.0  # when either side said something last
        self.gone = asyncio.Event()

    def begin(self) -> None:
        """Read from now on."""
        self._task = asyncio.get_running_loop().create_task(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        self._heard = loop.time()
        try:
            async with asyncio.timeout(None) as bound:
                self._look(bound)
                while data := await self._carrier.read():
                    self._heard = loop.time()
                    await self._take(data)
        except (OSError, TimeoutError, spdy.SpdyError, RemoteProtocolError) as error:
            log.debug("a streaming client: %r", error)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._push()
            self._ended.set()
            self.gone.set()
            self._end_all()
            self._last_call = loop.call_later(carriers.CLOSE_SECONDS, self._carrier.abort)

    def _look(self, bound: asyncio.Timeout) -> None:
        """End the reading where neither side has said a word for too long; else look again when that may be."""
        loop = asyncio.get_running_loop()
        rest = self._heard + self._idle - loop.time()
        if rest <= 0:
            bound.reschedule(loop.time())
        else:
            self._timer = loop.call_later(rest, self._look, bound)

    @abstractmethod
    async def _take(self, data: bytes) -> None:
        """What the client has said."""

    async def _wait_for(self, box: Inbox[Any]) -> None:
        """Until an inbox has room. Nothing is read meanwhile, so a client that leaves is looked for."""
        since = asyncio.get_running_loop().time()
        while box.held():
            try:
                async with asyncio.timeout(LOOK):
                    await box.room()
            except TimeoutError:
                if self._carrier.has_left():
                    self.gone.set()
                await self._free(box, since)

    async def _free(self, box: Inbox[Any], since: float) -> None:
        """Nothing has been read since then, for an inbox's sake: what can be given up for the others may be."""
        return

    @abstractmethod
    def _end_all(self) -> None:
        """Nothing more will come: whoever waits is told."""

    @abstractmethod
    def _output(self) -> bytes:
        """What is to be sent now."""

    def _push(self) -> None:
        """Hand what is to be sent to the connection."""
        data = self._output()
        if data and not self._ended.is_set():
            self._heard = asyncio.get_running_loop().time()
            self._carrier.write(data)

    async def flush(self) -> None:
        """Send what is to be sent; returns when the client has room for more. A connection that breaks is `gone`."""
        self._push()
        if self._ended.is_set():
            return
        with contextlib.suppress(OSError):
            await self._carrier.drain()

    async def close(self) -> None:
        """End the connection, with what was sent before it delivered if the client takes it."""
        await bounded(self.flush())
        await self._carrier.close(self._ended)
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._last_call is not None:
            self._last_call.cancel()

    def drop(self) -> None:
        """End the connection at once, whatever is still under way."""
        self._carrier.abort()


async def end(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and return when they have ended: not before, even where the caller is cancelled meanwhile."""
    cancelled = False
    for task in tasks:
        task.cancel()
    while any(not task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError


class SpdyStream:
    """One stream of a SPDY connection. `stuck`: it was reset because nobody took what the client said on it."""

    def __init__(self, peer: SpdyPeer, number: int, headers: dict[str, str]) -> None:
        self._peer = peer
        self.number = number
        self.headers = headers
        self.inbox: Inbox[bytes] = Inbox(lambda size: peer.consumed(number, size), peer.budget)
        self.reset = asyncio.Event()
        self.stuck = False

    async def receive(self) -> bytes:
        """What came next; b"" at the end."""
        first = await self.inbox.get()
        return b"" if first is None else self.inbox.more(first)

    async def send(self, data: bytes, *, fin: bool = False) -> None:
        """Bytes to the client, the last ones with `fin`."""
        await self._peer.send(self.number, data, fin=fin)

    async def abort(self) -> None:
        """End it both ways at once."""
        self.inbox.discard()
        await self._peer.abort(self.number)


class SpdyPeer(Peer):
    """A client that speaks SPDY. New streams come out of `next_stream`, None when the connection is over.

    `patience`: seconds after which a stream is reset that holds up all others, since nobody takes anything of it.
    """

    def __init__(self, carrier: Carrier, idle: float) -> None:
        super().__init__(carrier, idle)
        self.budget = Budget()
        self.patience = math.inf
        self._spdy = spdy.Connection()
        self._streams: dict[int, SpdyStream] = {}
        self._new: asyncio.Queue[SpdyStream | None] = asyncio.Queue()
        self._pushing = False
        self._refusing = False

    def _output(self) -> bytes:
        return self._spdy.output()

    async def _take(self, data: bytes) -> None:
        for event in self._spdy.receive(data):
            await self._event(event)
        await self.flush()

    async def _event(self, event: spdy.Event) -> None:
        if isinstance(event, spdy.Opened) and self._refusing:
            self._spdy.reset(event.stream, spdy.REFUSED_STREAM)
        elif isinstance(event, spdy.Opened):
            if self._new.qsize() >= spdy.MAX_STREAMS:
                raise spdy.SpdyError("streams are opened faster than they are used")
            stream = SpdyStream(self, event.stream, event.headers)
            self._streams[event.stream] = stream
            self._spdy.accept(event.stream)
            if event.fin:
                stream.inbox.end()
            self._new.put_nowait(stream)
        elif isinstance(event, spdy.Data):
            known = self._streams.get(event.stream)
            if known is not None:
                if event.data:
                    known.inbox.put(event.data)
                if event.fin:
                    known.inbox.end()
                    self._forget(event.stream)
                await self._wait_for(known.inbox)
        elif isinstance(event, spdy.Reset):
            ended = self._streams.pop(event.stream, None)
            if ended is not None:
                ended.reset.set()
                ended.inbox.discard()

    async def _free(self, box: Inbox[Any], since: float) -> None:
        """See Peer. The stream whose inbox is full, or else the one with most of what fills them all."""
        now = asyncio.get_running_loop().time()
        late = [
            stream
            for stream in self._streams.values()
            if stream.inbox.size() and now - max(since, stream.inbox.touched) > self.patience
        ]
        if late:
            worst = max(late, key=lambda stream: (stream.inbox is box and box.full(), stream.inbox.size()))
            worst.stuck = True
            worst.reset.set()
            await self.abort(worst.number)

    def _forget(self, number: int) -> None:
        """A stream that is over both ways has no more news."""
        if not self._spdy.has(number):
            self._streams.pop(number, None)

    def take_no_more(self) -> None:
        """Refuse further streams."""
        self._refusing = True

    def _end_all(self) -> None:
        for stream in self._streams.values():
            stream.inbox.end()
        self._new.put_nowait(None)

    async def next_stream(self) -> SpdyStream | None:
        """The next one that the client opens."""
        return await self._new.get()

    async def send(self, number: int, data: bytes, *, fin: bool) -> None:
        """Bytes on a stream."""
        self._spdy.send(number, data, fin=fin)
        if fin:
            self._forget(number)
        await self.flush()

    async def abort(self, number: int) -> None:
        """Reset a stream."""
        ended = self._streams.pop(number, None)
        if ended is not None:
            ended.inbox.discard()
        self._spdy.reset(number)
        await self.flush()

    def consumed(self, number: int, size: int) -> None:
        """Tell a client that keeps windows, together with what else happens in this turn."""
        self._spdy.consumed(number, size)
        if not self._pushing:
            self._pushing = True
            asyncio.get_running_loop().call_soon(self._push_soon)

    def _push_soon(self) -> None:
        self._pushing = False
        self._push()

    async def close(self) -> None:
        """GOAWAY, and the end."""
        self._spdy.go_away()
        for stream in self._streams.values():
            stream.inbox.discard()
        await super().close()


class WebSocketPeer(Peer):
    """A client that speaks WebSocket: whole messages come out of `next_message`, None at the end."""

    def __init__(self, carrier: Carrier, idle: float) -> None:
        super().__init__(carrier, idle)
        self._socket = WebSocket(ConnectionType.SERVER)
        self._queue = bytearray()
        self._parts: list[bytes | str] = []
        self._length = 0
        self._messages: Inbox[bytes | str] = Inbox()

    def _output(self) -> bytes:
        data = bytes(self._queue)
        self._queue.clear()
        return data

    def _say(self, event: Event) -> None:
        if self._socket.state in (ConnectionState.OPEN, ConnectionState.REMOTE_CLOSING):
            self._queue += self._socket.send(event)

    async def _take(self, data: bytes) -> None:
        self._socket.receive_data(data)
        for event in self._socket.events():
            if isinstance(event, Message):
                await self._part(event)
            elif isinstance(event, Ping):
                self._say(event.response())
            elif isinstance(event, CloseConnection):
                self._say(event.response())
                await self.flush()
                raise RemoteProtocolError("closed")
        await self.flush()

    async def _part(self, event: Message[Any]) -> None:
        self._parts.append(event.data)
        self._length += len(event.data)
        if self._length > MAX_MESSAGE:
            self._say(CloseConnection(code=TOO_BIG, reason="message too big"))
            raise RemoteProtocolError("message too big")
        if event.message_finished:
            parts, self._parts, self._length = self._parts, [], 0
            whole: bytes | str
            if isinstance(event, TextMessage):
                whole = "".join(part for part in parts if isinstance(part, str))
            else:
                whole = b"".join(part for part in parts if isinstance(part, bytes))
            self._messages.put(whole)
            await self._wait_for(self._messages)

    def _end_all(self) -> None:
        self._messages.end()

    async def next_message(self) -> bytes | str | None:
        """The next one; None when the connection is over."""
        return await self._messages.get()

    async def send(self, message: bytes | str) -> None:
        """A message to the client."""
        if isinstance(message, str):
            self._say(TextMessage(data=message))
        else:
            self._say(BytesMessage(data=message))
        await self.flush()

    async def close(self, code: int = NORMAL, reason: str = "") -> None:
        """Say goodbye, and end."""
        self._say(CloseConnection(code=code, reason=reason[:120]))
        self._messages.discard()
        await super().close()


class Tunnel:
    """A SPDY connection's bytes within the messages of a WebSocket."""

    def __init__(self, peer: WebSocketPeer) -> None:
        self._peer = peer
        self._queue: list[bytes] = []

    async def read(self) -> bytes:
        """See Carrier."""
        while (message := await self._peer.next_message()) is not None:
            if message:  # an empty one is what a client makes of an empty write
                return message.encode() if isinstance(message, str) else message
        return b""

    def write(self, data: bytes) -> None:
        """See Carrier."""
        self._queue.append(data)

    async def drain(self) -> None:
        """See Carrier."""
        while self._queue:
            await self._peer.send(self._queue.pop(0))

    def has_left(self) -> bool:
        """See Carrier."""
        return self._peer.gone.is_set()

    async def close(self, ended: asyncio.Event) -> None:
        """See Carrier."""
        await bounded(self.drain())
        await self._peer.close()

    def abort(self) -> None:
        """See Carrier."""
        self._peer.drop()
