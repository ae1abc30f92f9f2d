"""One NRI connection: ttrpc calls made, and calls served, over one socket. The same for both ends.

    runtime    calls on TO_PLUGIN, serves on TO_RUNTIME            plugin    the other way round

A peer that does not keep to the protocol is hung up on. One that makes calls and does not read the answers is not read from either.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable

from google.protobuf.message import DecodeError

from tare.errors import ResourceExhausted, TareError, Unavailable, describe
from tare.nri import frames
from tare.nri.frames import DATA, REQUEST, RESPONSE, BrokenFrame, Message
from tare.nri.v1 import ttrpc_pb2

log = logging.getLogger(__name__)

UNKNOWN, INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, FAILED_PRECONDITION, UNIMPLEMENTED = 2, 3, 4, 8, 9, 12
"""gRPC's codes, as far as they are said here."""

MOST_CALLS = 64  # of a peer that are served at one time

Serve = Callable[[str, str, bytes], Awaitable[bytes]]
"""(service, method, request) → response. Raises RemoteError for what the caller is to be told."""


class Closed(Unavailable):
    """The connection has ended, so that there is no answer."""


class NoAnswer(Unavailable):
    """The peer did not answer in time."""


class RemoteError(TareError):
    """The peer's own word: the call failed, with this code of gRPC's."""

    code = "UNKNOWN"

    def __init__(self, status: int, message: str) -> None:
        super().__init__("call over ttrpc", cause=message or f"code {status}")
        self.status = status
        self.message = message


class Connection(asyncio.Protocol):
    """`calls` and `serves` are the streams; `on_close` is called once, when nothing more comes."""

    def __init__(self, *, calls: int, serves: int, serve: Serve, on_close: Callable[[], None]) -> None:
        self._calls_on, self._serves_on = calls, serves
        self._serve, self._on_close = serve, on_close
        self._socket = frames.Socket()
        self._streams = {calls: frames.Stream(), serves: frames.Stream()}
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._next = 1
        self._last = 0
        self._serving: set[asyncio.Task[None]] = set()
        self.closed = False

    @classmethod
    async def over(
        cls, connected: socket.socket, *, calls: int, serves: int, serve: Serve, on_close: Callable[[], None]
    ) -> Connection:
        """One over a socket that is connected; it is this connection's from now on."""
        loop = asyncio.get_running_loop()
        connected.setblocking(False)
        _, connection = await loop.create_connection(
            lambda: cls(calls=calls, serves=serves, serve=serve, on_close=on_close), sock=connected
        )
        return connection

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for stream, part in self._socket.feed(data):
                if stream not in self._streams:
                    continue
                for message in self._streams[stream].feed(part):
                    self._take(stream, message)
        except (BrokenFrame, DecodeError) as error:
            log.warning("an NRI connection is closed: %s", describe(error))
            self.close()

    def pause_writing(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(Closed("call over ttrpc", cause="the connection has ended"))
        self._waiting.clear()
        for task in self._serving:
            task.cancel()
        self._on_close()

    def close(self) -> None:
        """Hang up, at once. Idempotent."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()

    # Calls that are made

    async def call(self, service: str, method: str, payload: bytes, timeout: float | None) -> bytes:
        """The response. Raises RemoteError, Closed, NoAnswer, ResourceExhausted (the request is too large)."""
        doing = f"call {method}"
        nanoseconds = round(timeout * 1e9) if timeout is not None else 0
        request = ttrpc_pb2.Request(service=service, method=method, payload=payload, timeout_nano=nanoseconds)
        data = frames.message(self._next, REQUEST, request.SerializeToString())
        if self.closed:
            raise Closed(doing, cause="the connection has ended")
        number, self._next = self._next, self._next + 2
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        self._send(self._calls_on, data)
        try:
            async with asyncio.timeout(timeout):
                answer: bytes = await waiting
        except TimeoutError:
            raise NoAnswer(doing, cause=f"no answer within {timeout:g} s") from None
        finally:
            self._waiting.pop(number, None)
        return answer

    def _send(self, stream: int, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(list(frames.frames(stream, data)))

    # What comes

    def _take(self, stream: int, message: Message) -> None:
        if stream == self._calls_on:
            self._answered(message)
        else:
            self._asked(message)

    def _answered(self, message: Message) -> None:
        waiting = self._waiting.get(message.call)
        if waiting is None or waiting.done():
            return  # a call that was given up
        if message.type != RESPONSE:
            raise BrokenFrame("read an NRI connection", cause=f"a message of type {message.type} answers a call")
        if message.oversized:
            cause = f"the answer has {message.oversized} bytes, and may have {frames.LARGEST}"
            waiting.set_exception(ResourceExhausted("call over ttrpc", cause=cause))
            return
        response = ttrpc_pb2.Response.FromString(message.payload)
        if response.status.code:
            waiting.set_exception(RemoteError(response.status.code, response.status.message))
        else:
            waiting.set_result(response.payload)

    def _asked(self, message: Message) -> None:
        trouble = self._refusal(message)
        if trouble is not None:
            self._fail(message.call, *trouble)
            return
        if message.type != REQUEST:
            return  # of a kind that this version does not know
        self._last = message.call
        task = asyncio.ensure_future(self._answer(message))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    def _refusal(self, message: Message) -> tuple[int, str] | None:
        """Why a call is not served: (code, words)."""
        if message.oversized:
            return RESOURCE_EXHAUSTED, f"message of {message.oversized} bytes, the most is {frames.LARGEST}"
        if message.call % 2 == 0:
            return INVALID_ARGUMENT, "a call's number must be odd"
        if message.type == DATA:
            return INVALID_ARGUMENT, "there is no such call that takes data"
        if message.type == REQUEST and message.call <= self._last:
            return INVALID_ARGUMENT, "a call's number must be higher than that of the one before"
        if message.type == REQUEST and len(self._serving) >= MOST_CALLS:
            return RESOURCE_EXHAUSTED, f"{MOST_CALLS} calls are under way"
        return None

    async def _answer(self, message: Message) -> None:
        try:
            request = ttrpc_pb2.Request.FromString(message.payload)
            async with asyncio.timeout(request.timeout_nano / 1e9 if request.timeout_nano > 0 else None):
                payload = await self._serve(request.service, request.method, request.payload)
            response = ttrpc_pb2.Response(payload=payload)
            data = frames.message(message.call, RESPONSE, response.SerializeToString())
        except RemoteError as error:
            self._fail(message.call, error.status, error.message)
        except DecodeError as error:
            self._fail(message.call, INVALID_ARGUMENT, f"not a message of this call: {error}")
        except ResourceExhausted as error:
            self._fail(message.call, RESOURCE_EXHAUSTED, describe(error))
        except TimeoutError:
            self._fail(message.call, DEADLINE_EXCEEDED, "there was not enough time")
        except Exception as error:
            log.exception("a call over NRI failed")
            self._fail(message.call, UNKNOWN, describe(error))
        else:
            self._send(self._serves_on, data)

    def _fail(self, call: int, code: int, words: str) -> None:
        response = ttrpc_pb2.Response(status=ttrpc_pb2.Status(code=code, message=words))
        self._send(self._serves_on, frames.message(call, RESPONSE, response.SerializeToString()))
