"""From a gRPC service's descriptor and an object with methods of the same names to handlers that a server takes.

What is the same for every call happens here and nowhere else: errors become status codes, methods that the object does not
have answer UNIMPLEMENTED by name, and calls that must not stop halfway are run to their end when their caller leaves.

    caller ──► handler ──► service.Method(request) ──► reply
                  │ caller leaves
                  ├─ method in `lasting`: its task goes on; how it fails is logged
                  └─ otherwise: cancelled
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, NoReturn, Protocol, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from tare import __version__
from tare.cri.errors import Unimplemented, refusal
from tare.errors import InvalidArgument, TareError, Unavailable, describe

log = logging.getLogger(__name__)
Method = Callable[[Message], Coroutine[Any, Any, Message]]
M = TypeVar("M")


class Context(Protocol):
    """What is used of a gRPC call's context."""

    async def send_initial_metadata(self, metadata: tuple[()]) -> None:
        """Begin the answer, before there is anything of it."""

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the call with a status, by raising."""


class Malformed:
    """In the place of a request that is none: by itself grpc would answer INTERNAL."""

    def __init__(self, error: DecodeError) -> None:
        self.error = error


class Service(Protocol):
    """An object whose methods bear the names of a service's methods: coroutines from a request to a reply.

    Where the request is a stream it is an asynchronous iterator; a method whose reply is a stream is an asynchronous generator.
    """

    @property
    def lasting(self) -> frozenset[str]:
        """The methods that go on when their caller leaves."""


class Lasting:
    """Tasks that outlive their callers."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Message]] = set()

    async def run(self, name: str, work: Coroutine[Any, Any, Message]) -> Message:
        """The result of `work`, which goes on when the caller is cancelled."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(lambda done: _log_outcome(name, done))
            raise

    async def drain(self, timeout: float) -> None:
        """Wait until all have ended, at most `timeout` seconds."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout)


def _log_outcome(name: str, task: asyncio.Task[Message]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        expected = isinstance(error, TareError)
        log.warning(
            "%s failed after its caller had left: %s", name, describe(error), exc_info=None if expected else error
        )


def generic_handler(descriptor: ServiceDescriptor, service: Service, lasting: Lasting) -> grpc.GenericRpcHandler:
    """All methods of the service `descriptor`, under its full name."""
    handlers = {method.name: _handler(method, service, lasting) for method in descriptor.methods}
    return grpc.method_handlers_generic_handler(descriptor.full_name, handlers)


def _handler(method: MethodDescriptor, service: Service, lasting: Lasting) -> grpc.RpcMethodHandler:
    decode = GetMessageClass(method.input_type).FromString
    codecs = {
        "request_deserializer": decode if method.client_streaming else _tolerant(decode),
        "response_serializer": GetMessageClass(method.output_type).SerializeToString,
    }
    work: Any = getattr(service, method.name, None)
    if work is None:
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(_missing_stream(method.name), **codecs)
        return grpc.unary_unary_rpc_method_handler(_unary(method.name, _missing(method.name)), **codecs)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(_stream(method.name, work), **codecs)
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(_unary(method.name, work), **codecs)
    if method.name in service.lasting:
        return grpc.unary_unary_rpc_method_handler(_unary(method.name, _kept(method.name, work, lasting)), **codecs)
    return grpc.unary_unary_rpc_method_handler(_unary(method.name, work), **codecs)


def _tolerant(decode: Callable[[bytes], Message]) -> Callable[[bytes], Message | Malformed]:
    def decoded(data: bytes) -> Message | Malformed:
        try:
            return decode(data)
        except DecodeError as error:
            return Malformed(error)

    return decoded


def _sound(name: str, request: Message | Malformed) -> Message:
    """The request. Raises InvalidArgument where it is none."""
    if isinstance(request, Malformed):
        hint = "is a text in it no UTF-8?"
        raise InvalidArgument(f"read the request of {name}", cause=str(request.error), hint=hint) from request.error
    return request


def _kept(name: str, work: Method, lasting: Lasting) -> Method:
    async def kept(request: Message) -> Message:
        return await lasting.run(name, work(request))

    return kept


def _missing(name: str) -> Method:
    async def missing(request: Message) -> Message:
        raise Unimplemented(f"{name} is not implemented by tare {__version__}")

    return missing


def _missing_stream(name: str) -> Callable[[Message, Context], Awaitable[None]]:
    async def missing(request: Message, context: Context) -> None:
        await _answer(name, _missing(name)(request), context)

    return missing


def _unary(name: str, work: Method) -> Callable[[Message | Malformed, Context], Awaitable[Message]]:
    async def sound(request: Message | Malformed) -> Message:
        return await work(_sound(name, request))

    async def answer(request: Message | Malformed, context: Context) -> Message:
        return await _answer(name, sound(request), context)

    return answer


def _stream(
    name: str, work: Callable[[Message], AsyncGenerator[Message]]
) -> Callable[[Message | Malformed, Context], AsyncIterator[Message]]:
    async def sound(request: Message | Malformed) -> Message:
        return _sound(name, request)

    async def answer(given: Message | Malformed, context: Context) -> AsyncIterator[Message]:
        request = await _answer(name, sound(given), context)
        async with contextlib.aclosing(work(request)) as replies:
            # A client that waits for what happens from now on knows by this that it will hear of it.
            await context.send_initial_metadata(())
            while (reply := await _answer(name, anext(replies, None), context)) is not None:
                yield reply

    return answer


async def _answer(name: str, work: Awaitable[M], context: Context) -> M:
    """The reply, or the call ended with a status; `context.abort` raises."""
    try:
        return await work
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Not this call was cancelled, but something that it waited for: the daemon is going down.
        error: Exception = Unavailable(name, cause="it was given up while the daemon is stopping", hint="try again")
    except Exception as failure:  # noqa: BLE001 - the seam: whatever a method raises becomes a status
        error = failure
    answer = refusal(name, error)
    if answer.defect:
        log.error("%s: unexpected error", name, exc_info=error)
    else:
        log.info("%s: %s: %s", name, answer.code.name, answer.message)
    await context.abort(answer.code, answer.message)
