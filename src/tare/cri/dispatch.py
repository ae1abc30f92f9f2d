"""From a gRPC service's descriptor and an object with methods of the same names to handlers that a server takes.

What is the same for every call happens here and nowhere else: errors become status codes, methods that the object does not
have answer UNIMPLEMENTED by name, calls that must not stop halfway are run to their end when their caller leaves, and whoever
watches is told. Each call has a task of its own, whose context says what it is about (`subject`).

    caller ──► handler ──► service.Method(request) ──► reply
                  │ caller leaves
                  ├─ method in `lasting`: its task goes on; how it fails is logged
                  └─ otherwise: cancelled
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, NoReturn, Protocol, Self, TypeVar

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from tare import __version__, subject
from tare.cri.errors import Unimplemented, refusal
from tare.cri.listing import Encoded
from tare.errors import InvalidArgument, TareError, Unavailable, describe

log = logging.getLogger(__name__)
Method = Callable[[Message], Coroutine[Any, Any, Message]]
M = TypeVar("M")
SUBJECTS = {"pod_sandbox_id": "pod", "container_id": "container"}  # fields of requests that say what a call is about


class Context(Protocol):
    """What is used of a gRPC call's context."""

    async def send_initial_metadata(self, metadata: tuple[()]) -> None:
        """Begin the answer, before there is anything of it."""

    async def abort(self, code: grpc.StatusCode, details: str) -> NoReturn:
        """End the call with a status, by raising."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """What the caller sent beside its request."""


class Call(Protocol):
    """A call that somebody watches: entered when it begins, left when it is over."""

    def refused(self, code: str, message: str) -> None:
        """It is going to be answered with this status."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: Any) -> None: ...


class Watch(Protocol):
    """Who is told of calls."""

    def call(self, service: str, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> Call:
        """One that begins."""


class Unwatched:
    """A call of which nobody is told."""

    def refused(self, code: str, message: str) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        """Nothing."""


UNWATCHED = Unwatched()
Begin = Callable[[Any, Context], Call]


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

    def __len__(self) -> int:
        return len(self._tasks)

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


def generic_handler(
    descriptor: ServiceDescriptor, service: Service, lasting: Lasting, watch: Watch | None = None
) -> grpc.GenericRpcHandler:
    """All methods of the service `descriptor`, under its full name."""
    handlers = {method.name: _handler(method, service, lasting, watch) for method in descriptor.methods}
    return grpc.method_handlers_generic_handler(descriptor.full_name, handlers)


def _begin(method: MethodDescriptor, watch: Watch | None) -> Begin:
    """What is done first: to say what the call is about, and to tell who watches."""
    service, name = method.containing_service.full_name, method.name
    given = () if method.client_streaming else method.input_type.fields_by_name
    fields = [(field, kind) for field, kind in SUBJECTS.items() if field in given]

    def begin(request: Any, context: Context) -> Call:
        named = {} if isinstance(request, Malformed) else {kind: getattr(request, field) for field, kind in fields}
        subject.bind(method=name, **named)
        return UNWATCHED if watch is None else watch.call(service, name, context.invocation_metadata())

    return begin


def _handler(
    method: MethodDescriptor, service: Service, lasting: Lasting, watch: Watch | None
) -> grpc.RpcMethodHandler:
    begin = _begin(method, watch)
    decode = GetMessageClass(method.input_type).FromString
    codecs = {
        "request_deserializer": decode if method.client_streaming else _tolerant(decode),
        "response_serializer": _encoder(GetMessageClass(method.output_type)),
    }
    work: Any = getattr(service, method.name, None)
    if work is None:
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(_missing_stream(method.name, begin), **codecs)
        return grpc.unary_unary_rpc_method_handler(_unary(method.name, _missing(method.name), begin), **codecs)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(_stream(method.name, work, begin), **codecs)
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(_unary(method.name, work, begin), **codecs)
    if method.name in service.lasting:
        work = _kept(method.name, work, lasting)
    return grpc.unary_unary_rpc_method_handler(_unary(method.name, work, begin), **codecs)


def _encoder(kind: type[Message]) -> Callable[[Message | Encoded], bytes]:
    """A method's reply as bytes, which it may be already."""
    encode: Callable[[Message], bytes] = kind.SerializeToString

    def encoded(reply: Message | Encoded) -> bytes:
        return reply if isinstance(reply, bytes) else encode(reply)

    return encoded


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


def _missing_stream(name: str, begin: Begin) -> Callable[[Message, Context], Awaitable[None]]:
    async def missing(request: Message, context: Context) -> None:
        with begin(request, context) as call:
            await _answer(name, _missing(name)(request), context, call)

    return missing


def _unary(name: str, work: Method, begin: Begin) -> Callable[[Message | Malformed, Context], Awaitable[Message]]:
    async def sound(request: Message | Malformed) -> Message:
        return await work(_sound(name, request))

    async def answer(request: Message | Malformed, context: Context) -> Message:
        with begin(request, context) as call:
            return await _answer(name, sound(request), context, call)

    return answer


def _stream(
    name: str, work: Callable[[Message], AsyncGenerator[Message]], begin: Begin
) -> Callable[[Message | Malformed, Context], AsyncIterator[Message]]:
    async def sound(request: Message | Malformed) -> Message:
        return _sound(name, request)

    async def answer(given: Message | Malformed, context: Context) -> AsyncIterator[Message]:
        with begin(given, context) as call:
            request = await _answer(name, sound(given), context, call)
            async with contextlib.aclosing(work(request)) as replies:
                # A client that waits for what happens from now on knows by this that it will hear of it.
                await context.send_initial_metadata(())
                while (reply := await _answer(name, anext(replies, None), context, call)) is not None:
                    yield reply

    return answer


async def _answer(name: str, work: Awaitable[M], context: Context, call: Call) -> M:
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
    call.refused(answer.code.name, answer.message)
    await context.abort(answer.code, answer.message)
