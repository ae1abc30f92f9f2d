"""One plugin that is connected, from its registration on.

A plugin that does not answer in time, hangs up, or says what is no NRI is disconnected, and what it was asked goes on without it; its refusal, on
the other hand, is that of what was being done.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from tare import __version__
from tare.config import NriConfig
from tare.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, TareError, UnknownError, describe
from tare.nri import interface, names, rpc
from tare.nri.frames import LARGEST, TO_PLUGIN, TO_RUNTIME
from tare.nri.interface import METHODS, Method
from tare.nri.v1 import nri_pb2 as pb

log = logging.getLogger(__name__)
M = TypeVar("M", bound=Message)

NAME = "tare"
FEWEST = 8  # pods and containers in one message of a synchronization, below which it is not parted further
ROOM = LARGEST - 1024  # bytes that such a message may have, with something around it
SLACK = 0.9  # of what would fit on average, since pods and containers differ in size
LOST = (rpc.Closed, rpc.NoAnswer, DecodeError)

Update = Callable[["Peer", pb.UpdateContainersRequest], Awaitable[pb.UpdateContainersResponse]]


class PluginFailed(UnknownError):
    """A plugin does not want it, or could not do what it has to do about it."""


class Peer:
    """A plugin. `index` and `name` are its own word, unless it was started here; `update` does what it asks for unasked."""

    def __init__(self, settings: NriConfig, update: Update, closed: Callable[[Peer], None]) -> None:
        self.index, self.name = "", ""
        self.given = ""
        self._settings = settings
        self._update = update
        self._on_closed = closed
        self._connection: rpc.Connection | None = None
        self._registered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._events = 0

    @property
    def title(self) -> str:
        """What it is called: plugins are asked in the order of these."""
        return f"{self.index}-{self.name}"

    @property
    def closed(self) -> bool:
        """Whether it is gone."""
        return self._connection is None or self._connection.closed

    def known_as(self, index: str, name: str, settings: str) -> None:
        """It was started here: whatever it says, this is who it is, with settings of its own."""
        self.index, self.name, self.given = index, name, settings

    async def begin(self, connected: socket.socket) -> None:
        """Have it registered and configured. Raises TareError; it is gone then."""
        limit = self._settings.registration_timeout
        self._connection = await rpc.Connection.over(
            connected, calls=TO_PLUGIN, serves=TO_RUNTIME, serve=self._serve, on_close=self._closed
        )
        try:
            async with asyncio.timeout(limit):
                await self._registered
            await self._configure()
        except TimeoutError:
            self.close()
            raise DeadlineExceeded("register an NRI plugin", cause=f"it did not within {limit:g} s") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hang up. Idempotent."""
        if self._connection is not None:
            self._connection.close()

    def _closed(self) -> None:
        if not self._registered.done():
            cause = "it hung up, or was hung up on, before it had said who it is"
            self._registered.set_exception(rpc.Closed("register an NRI plugin", cause=cause))
            self._registered.exception()  # whether somebody waits or not
        self._on_closed(self)

    # What it calls

    async def _serve(self, service: str, method: str, payload: bytes) -> bytes:
        if service == interface.RUNTIME and method == "RegisterPlugin":
            self._register(pb.RegisterPluginRequest.FromString(payload))
            return b""
        if service == interface.RUNTIME and method == "UpdateContainers":
            if not self._registered.done():
                raise rpc.RemoteError(rpc.FAILED_PRECONDITION, "register first")
            response = await self._update(self, pb.UpdateContainersRequest.FromString(payload))
            return response.SerializeToString()
        raise rpc.RemoteError(rpc.UNIMPLEMENTED, f"there is no method {service}/{method}")

    def _register(self, request: pb.RegisterPluginRequest) -> None:
        if self._registered.done():
            raise rpc.RemoteError(rpc.FAILED_PRECONDITION, f"this connection is plugin {self.title} already")
        if not self.name:
            try:
                names.check_identity(request.plugin_name, request.plugin_idx)
            except InvalidArgument as error:
                self._registered.set_exception(error)
                raise rpc.RemoteError(rpc.INVALID_ARGUMENT, describe(error)) from error
            self.index, self.name = request.plugin_idx, request.plugin_name
        self._registered.set_result(None)

    # What it is called for

    async def _configure(self) -> None:
        settings = self._settings
        request = pb.ConfigureRequest(
            config=self.given,
            runtime_name=NAME,
            runtime_version=__version__,
            registration_timeout=round(settings.registration_timeout * 1000),
            request_timeout=round(settings.request_timeout * 1000),
            NRI_version=names.VERSION,
        )
        doing = f"configure NRI plugin {self.title}"
        try:
            answer = await self._call(METHODS["Configure"], request, pb.ConfigureResponse)
        except (*LOST, TareError) as error:
            raise FailedPrecondition(doing, cause=describe(error)) from error
        unknown = answer.events & ~interface.EVERY_EVENT
        if unknown:
            raise FailedPrecondition(doing, cause=f"it asks for events that there are not: {unknown & 0xFFFFFFFF:#x}")
        self._events = answer.events or interface.EVERY_EVENT

    async def synchronize(
        self, pods: Sequence[pb.PodSandbox], containers: Sequence[pb.Container]
    ) -> Sequence[pb.ContainerUpdate]:
        """Show it all that there is, in as many messages as that takes; what it wants of it comes back.

        That is the end of its registration, and has the time of that. Raises TareError; it is gone then.
        """
        limit = self._settings.registration_timeout
        try:
            async with asyncio.timeout(limit):
                return await self._synchronize([*pods, *containers])
        except TimeoutError:
            self.close()
            cause = f"no end within {limit:g} s"
            raise DeadlineExceeded(f"synchronize NRI plugin {self.title}", cause=cause) from None
        except (*LOST, TareError) as error:
            self.close()
            raise FailedPrecondition(f"synchronize NRI plugin {self.title}", cause=describe(error)) from error

    async def _synchronize(self, things: list[pb.PodSandbox | pb.Container]) -> Sequence[pb.ContainerUpdate]:
        count = len(things)
        while True:
            part, more = things[:count], len(things) > count
            request = pb.SynchronizeRequest(
                pods=[thing for thing in part if isinstance(thing, pb.PodSandbox)],
                containers=[thing for thing in part if isinstance(thing, pb.Container)],
                more=more,
            )
            length = request.ByteSize()
            if length > ROOM and count > FEWEST:
                count = max(FEWEST, int(count * min(1.0, ROOM / length) * SLACK))
                continue
            limit = self._settings.registration_timeout
            answer = await self._call(METHODS["Synchronize"], request, pb.SynchronizeResponse, limit)
            if not more:
                return answer.update
            if answer.update or not answer.more:
                raise FailedPrecondition("show it what there is", cause="it does not take that in several messages")
            things = things[count:]

    def wants(self, name: str) -> bool:
        """Whether it asked for events of this kind."""
        return not self.closed and bool(self._events & METHODS[name].bit)

    async def ask(self, name: str, request: Message, response: type[M]) -> M | None:
        """Its answer; None where it did not ask for that, or is gone by now. Raises PluginFailed, ResourceExhausted."""
        if not self.wants(name):
            return None
        try:
            return await self._call(METHODS[name], request, response)
        except rpc.RemoteError as error:
            if error.status == rpc.UNIMPLEMENTED and METHODS[name].told:
                return await self._ask_as_change(METHODS[name], request, response)
            raise PluginFailed(f"ask NRI plugin {self.title} ({name})", cause=error.message) from error
        except LOST as error:
            log.warning("NRI plugin %s is disconnected: %s: %s", self.title, name, describe(error))
            self.close()
            return None

    async def _ask_as_change(self, method: Method, request: Message, response: type[M]) -> M | None:
        """As plugins of before NRI 0.10 are told."""
        change = pb.StateChangeEvent(event=pb.Event.Name(method.event), pod=getattr(request, "pod"))  # noqa: B009
        if "container" in request.DESCRIPTOR.fields_by_name:
            change.container.CopyFrom(getattr(request, "container"))  # noqa: B009
        try:
            await self._call(METHODS["StateChange"], change, pb.Empty)
        except rpc.RemoteError as error:
            raise PluginFailed(f"ask NRI plugin {self.title} ({method.name})", cause=error.message) from error
        except LOST as error:
            log.warning("NRI plugin %s is disconnected: %s: %s", self.title, method.name, describe(error))
            self.close()
            return None
        return response()

    async def _call(self, method: Method, request: Message, response: type[M], timeout: float | None = None) -> M:
        assert self._connection is not None
        limit = timeout or self._settings.request_timeout
        answer = await self._connection.call(interface.PLUGIN, method.name, request.SerializeToString(), limit)
        return response.FromString(answer)

    async def shut_down(self) -> None:
        """Tell it that the runtime ends, which it may take a moment to think about, and hang up."""
        try:
            await self._call(METHODS["Shutdown"], pb.Empty(), pb.Empty)
        except (*LOST, TareError) as error:
            log.info("NRI plugin %s was not told of the end: %s", self.title, describe(error))
        self.close()
