"""Port-forward: connections into a pod, each over a pair of streams (SPDY) or of channels (WebSocket).

    SPDY       an error stream, then a data stream, with the same requestid (old clients: none) and port; any number of pairs
    WebSocket  v4.channel.k8s.io: ports are in the URL; channel 2n has data of the nth, 2n + 1 its error; both begin with the port, u16 little endian

Each way is half closed by itself: what a client has said is delivered when it says no more, and the other way goes on. A port that nobody
listens on is told on its own error stream, and harms no other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from tare.errors import describe
from tare.streaming import channels, peers
from tare.streaming.carriers import CHUNK, bounded
from tare.streaming.inbox import Budget, Inbox
from tare.streaming.peers import PROTOCOL_ERROR, SpdyPeer, SpdyStream, WebSocketPeer, end

Dial = Callable[[int], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
"""A connection to a port in the pod. Raises TareError where there is none."""

PROTOCOL = "portforward.k8s.io"
PAIR_SECONDS = 30.0  # for the second stream of a pair to come
MAX_PORT = 0xFFFF
MAX_HALVES = 1000  # streams that wait for the other of their pair
STUCK_SECONDS = 30.0  # for a pod to take anything, while all connections of its session wait for that
STEP = 64 << 10  # bytes that a pod takes at once
UNTAKEN = "the pod has taken nothing for {:g} s"
HANG_UP_SECONDS = 5.0  # for a pod to take what is still under way to it


class BadPort(Exception):
    """No port."""


def port_of(text: str) -> int:
    """A port's number. Raises BadPort."""
    if not text.isascii() or not text.isdecimal() or not 0 < int(text) <= MAX_PORT:
        raise BadPort(f"{text!r} is not a port")
    return int(text)


class Forward:
    """All connections of one SPDY session. `serve` lasts until the client hangs up."""

    def __init__(self, peer: SpdyPeer, dial: Dial) -> None:
        self._peer, self._dial = peer, dial
        peer.patience = STUCK_SECONDS
        self._halves: dict[str, tuple[SpdyStream, asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    async def serve(self) -> None:
        """Take pairs of streams, and join each to a connection."""
        sort = asyncio.create_task(self._sort_all())
        gone = asyncio.create_task(self._peer.gone.wait())
        try:
            await asyncio.wait((sort, gone), return_when=asyncio.FIRST_COMPLETED)
            if sort.done():
                sort.result()
        finally:
            await end([sort, gone, *self._tasks])
            await self._peer.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _sort_all(self) -> None:
        while (stream := await self._peer.next_stream()) is not None:
            await self._sort(stream)

    async def _sort(self, stream: SpdyStream) -> None:
        """Find the other half of a pair, or wait for it."""
        kind = stream.headers.get("streamtype", "")
        if kind not in ("error", "data") or "port" not in stream.headers:
            await stream.abort()
            return
        if kind == "error":
            stream.inbox.discard()  # nobody listens there
        pair = stream.headers.get("requestid") or f"stream {stream.number - 2 * (kind == 'data')}"
        waiting = self._halves.pop(pair, None)
        if waiting is None and len(self._halves) >= MAX_HALVES:
            await stream.abort()
            return
        if waiting is None:
            self._halves[pair] = (stream, self._run(self._give_up(pair)))
            return
        other, timer = waiting
        timer.cancel()
        if other.headers.get("streamtype") == kind:
            await stream.abort()
            await other.abort()
            return
        data, error = (stream, other) if kind == "data" else (other, stream)
        self._run(self._join(data, error))

    async def _give_up(self, pair: str) -> None:
        """A half whose other half does not come is reset."""
        await asyncio.sleep(PAIR_SECONDS)
        waiting = self._halves.pop(pair, None)
        if waiting is not None:
            await waiting[0].abort()

    async def _join(self, data: SpdyStream, error: SpdyStream) -> None:
        """One connection, from first to last."""
        text = data.headers["port"]
        try:
            reader, writer = await self._dial(port_of(text))
        except Exception as failure:  # noqa: BLE001 - whatever it is, it is this connection's alone, and its client is told
            await error.send(f"forward port {text}: {describe(failure)}".encode(), fin=True)
            await data.abort()
            return
        inward = asyncio.create_task(into(writer, data))
        outward = asyncio.create_task(out_of(reader, data))
        reset = asyncio.create_task(data.reset.wait())
        tasks = (inward, outward, reset)
        try:
            both = asyncio.gather(inward, outward)
            await asyncio.wait((both, reset), return_when=asyncio.FIRST_COMPLETED)
            if both.done() and (trouble := both.exception()) is not None:
                await error.send(f"forward port {text}: {describe(trouble)}".encode())
                await data.abort()
            elif data.stuck:
                await bounded(error.send(f"forward port {text}: {UNTAKEN.format(self._peer.patience)}".encode()))
        finally:
            try:
                data.inbox.discard()
                await end(tasks)
                await bounded(error.send(b"", fin=True))
            finally:
                await hang_up(writer)


async def into(writer: asyncio.StreamWriter, stream: SpdyStream) -> None:
    """From the client into the pod, with its half close."""
    while data := await stream.receive():
        for at in range(0, len(data), STEP):
            writer.write(data[at : at + STEP])
            await writer.drain()
            stream.inbox.touch()
    if not stream.reset.is_set():
        with contextlib.suppress(OSError):
            writer.write_eof()


async def out_of(reader: asyncio.StreamReader, stream: SpdyStream) -> None:
    """From the pod to the client, with its half close."""
    while data := await reader.read(CHUNK):
        await stream.send(data)
    await stream.send(b"", fin=True)


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """Close a connection into the pod, with what was said before it delivered if somebody there takes it."""
    writer.close()
    try:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(HANG_UP_SECONDS):
                await writer.wait_closed()
    finally:
        writer.transport.abort()


class SocketForward:
    """The connections of one WebSocket session, one for each port in the URL."""

    def __init__(self, peer: WebSocketPeer, protocol: str, ports: Sequence[int], dial: Dial) -> None:
        self._peer, self._protocol, self._ports, self._dial = peer, protocol, ports, dial
        budget = Budget()
        self._inboxes: list[Inbox[bytes]] = [Inbox(budget=budget) for _ in ports]
        self._stuck = [asyncio.Event() for _ in ports]

    async def serve(self) -> None:
        """Until the client hangs up, or every connection is over."""
        for index, port in enumerate(self._ports):
            for channel in (2 * index, 2 * index + 1):
                await self._say(channel, port.to_bytes(2, "little"))
        reader = asyncio.create_task(self._read())
        gone = asyncio.create_task(self._peer.gone.wait())
        joins = [asyncio.create_task(self._join(index, port)) for index, port in enumerate(self._ports)]
        try:
            await asyncio.wait((reader, gone, asyncio.gather(*joins)), return_when=asyncio.FIRST_COMPLETED)
        finally:
            await end([reader, gone, *joins])
            await self._peer.close()

    async def _say(self, channel: int, data: bytes) -> None:
        await self._peer.send(channels.write(self._protocol, channel, data))

    async def _read(self) -> None:
        """Sort what comes by port."""
        try:
            while (message := await self._peer.next_message()) is not None:
                piece = channels.read(self._protocol, message)
                index, other = divmod(piece.channel, 2)
                if other or index >= len(self._inboxes):
                    raise channels.ChannelError(f"channel {piece.channel} has no data for a port")
                self._inboxes[index].put(piece.data)
                await self._room(self._inboxes[index])
        except channels.ChannelError as error:
            await self._peer.close(PROTOCOL_ERROR, str(error))

    async def _room(self, box: Inbox[bytes]) -> None:
        """Until more may come. Ports of which nobody takes anything for long are given up: they would stop the others."""
        loop = asyncio.get_running_loop()
        since = loop.time()
        while box.held():
            try:
                async with asyncio.timeout(peers.LOOK):
                    await box.room()
            except TimeoutError:
                for inbox, stuck in zip(self._inboxes, self._stuck, strict=True):
                    if inbox.size() and loop.time() - max(since, inbox.touched) > STUCK_SECONDS:
                        stuck.set()
                        inbox.discard()

    async def _join(self, index: int, port: int) -> None:
        inbox = self._inboxes[index]
        try:
            reader, writer = await self._dial(port)
        except Exception as failure:  # noqa: BLE001 - likewise
            inbox.discard()
            await self._say(2 * index + 1, f"forward port {port}: {describe(failure)}".encode())
            return
        inward = asyncio.create_task(self._inward(inbox, writer))
        outward = asyncio.create_task(self._outward(index, reader))
        stuck = asyncio.create_task(self._stuck[index].wait())
        try:
            await asyncio.wait((outward, stuck), return_when=asyncio.FIRST_COMPLETED)
            if outward.done() and (trouble := outward.exception()) is not None:
                await self._say(2 * index + 1, f"forward port {port}: {describe(trouble)}".encode())
            elif stuck.done():
                await self._say(2 * index + 1, f"forward port {port}: {UNTAKEN.format(STUCK_SECONDS)}".encode())
        finally:
            inbox.discard()
            writer.close()
            await end([inward, outward, stuck])
            await hang_up(writer)

    async def _outward(self, index: int, reader: asyncio.StreamReader) -> None:
        while data := await reader.read(CHUNK):
            await self._say(2 * index, data)

    async def _inward(self, inbox: Inbox[bytes], writer: asyncio.StreamWriter) -> None:
        while (data := await inbox.get()) is not None:
            for at in range(0, len(data), STEP):
                writer.write(data[at : at + STEP])
                await writer.drain()
                inbox.touch()
