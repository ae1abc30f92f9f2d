"""Write an NRI plugin in Python: a class with a method for each event that it wants, and `run`.

    class Mine(Plugin):
        def create_container(self, pod, container):
            return ContainerAdjustment(env=[KeyValue(key="POD", value=pod.name)])

    run(Mine(), name="mine", index="10")

Methods may be coroutines; they are called one at a time, in the order of events, and the runtime waits for each (2 s, unless its settings say
otherwise). An exception is the runtime's answer to whoever asked: where that is `create_container`, no container is made. What the messages hold
is said by v1/nri.proto. Nothing here needs the rest of Tare: a plugin runs beside any runtime that has NRI.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tare.errors import FailedPrecondition, TareError, describe
from tare.nri import rpc
from tare.nri.frames import TO_PLUGIN, TO_RUNTIME
from tare.nri.interface import METHODS, PLUGIN, RUNTIME
from tare.nri.names import INDEX_VARIABLE, NAME_VARIABLE, SOCKET, SOCKET_VARIABLE, VERSION, check_identity
from tare.nri.v1 import nri_pb2 as pb

log = logging.getLogger(__name__)

REGISTRATION_SECONDS = 5.0
UPDATE_SECONDS = 60.0
PAUSES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # seconds between attempts to connect, the last one for ever


class Plugin:
    """A plugin with no interest in anything: a subclass has the methods that it wants to be called.

    Those of pods get (pod), those of containers (pod, container), and return nothing, but for

    - synchronize(pods, containers) → updates of containers, or None: all that there is, once, before anything else;
    - create_container(pod, container) → a ContainerAdjustment, a whole CreateContainerResponse, or None;
    - update_container(pod, container, resources) → updates, a whole UpdateContainerResponse, or None;
    - stop_container(pod, container) → updates, or None;
    - update_pod_sandbox(pod, overhead, resources);
    - validate_container_adjustment(request) → why it is refused, or None.
    """

    session: Session | None = None

    def configure(self, config: str, runtime: str, version: str) -> Any:
        """The plugin's own configuration, and who asks. Raise to refuse."""

    def shutdown(self) -> Any:
        """The runtime ends."""

    async def update(
        self, updates: Sequence[pb.ContainerUpdate], evict: Sequence[pb.ContainerEviction] = ()
    ) -> list[pb.ContainerUpdate]:
        """Have containers updated, or ended, unasked; those that could not be updated are returned. Raises TareError.

        Not from within a method that the runtime waits for: return the updates there.
        """
        if self.session is None:
            raise FailedPrecondition("update containers", cause="the plugin is not connected")
        return await self.session.update(updates, evict)


class Session:
    """One connection of a plugin."""

    def __init__(self, plugin: Plugin) -> None:
        self._plugin = plugin
        self._events = sum(method.bit for method in METHODS.values() if _handler(plugin, method.name) is not None)
        self._turn = asyncio.Lock()
        self._synced = pb.SynchronizeRequest()
        self._ended = asyncio.Event()
        self._connection: rpc.Connection | None = None
        self.configured = asyncio.Event()

    async def serve(self, connected: socket.socket, name: str, index: str) -> None:
        """Register, and answer until the connection ends. Raises TareError where the runtime refuses."""
        self._connection = await rpc.Connection.over(
            connected, calls=TO_RUNTIME, serves=TO_PLUGIN, serve=self._serve, on_close=self._ended.set
        )
        try:
            request = pb.RegisterPluginRequest(plugin_name=name, plugin_idx=index, NRI_version=VERSION)
            payload = request.SerializeToString()
            await self._connection.call(RUNTIME, "RegisterPlugin", payload, REGISTRATION_SECONDS)
            self._plugin.session = self
            await self._ended.wait()
        finally:
            self._plugin.session = None
            self._connection.close()

    async def update(
        self, updates: Sequence[pb.ContainerUpdate], evict: Sequence[pb.ContainerEviction]
    ) -> list[pb.ContainerUpdate]:
        """As `Plugin.update`."""
        assert self._connection is not None
        request = pb.UpdateContainersRequest(update=updates, evict=evict)
        answer = await self._connection.call(RUNTIME, "UpdateContainers", request.SerializeToString(), UPDATE_SECONDS)
        return list(pb.UpdateContainersResponse.FromString(answer).failed)

    async def _serve(self, service: str, name: str, payload: bytes) -> bytes:
        method = METHODS.get(name)
        if service != PLUGIN or method is None or name == "StateChange":
            raise rpc.RemoteError(rpc.UNIMPLEMENTED, f"there is no method {service}/{name}")
        request = method.request.FromString(payload)
        async with self._turn:
            try:
                response = await self._answer(name, request)
            except rpc.RemoteError:
                raise
            except Exception as error:
                log.exception("%s failed", name)
                raise rpc.RemoteError(rpc.UNKNOWN, describe(error)) from error
        return bytes(response.SerializeToString())

    async def _answer(self, name: str, request: Any) -> Any:
        """What the plugin's own method comes to, as a message."""
        response = METHODS[name].response()
        if name == "Configure":
            await _result(self._plugin.configure(request.config, request.runtime_name, request.runtime_version))
            self.configured.set()
            return pb.ConfigureResponse(events=self._events)
        if name == "Synchronize":
            return await self._synchronize(request)
        handler = self._plugin.shutdown if name == "Shutdown" else _handler(self._plugin, name)
        if handler is None:
            return response
        answer = await _result(handler(*ARGUMENTS.get(name, _usual)(request)))
        return _response(response, answer)

    async def _synchronize(self, request: pb.SynchronizeRequest) -> pb.SynchronizeResponse:
        self._synced.pods.extend(request.pods)
        self._synced.containers.extend(request.containers)
        if request.more:
            return pb.SynchronizeResponse(more=True)
        whole, self._synced = self._synced, pb.SynchronizeRequest()
        handler = getattr(self._plugin, "synchronize", None)
        updates = await _result(handler(list(whole.pods), list(whole.containers))) if handler is not None else None
        return pb.SynchronizeResponse(update=updates or ())


def _usual(request: Any) -> tuple[Any, ...]:
    return (request.pod, request.container) if hasattr(request, "container") else (request.pod,)


ARGUMENTS: Mapping[str, Callable[[Any], tuple[Any, ...]]] = {
    "Shutdown": lambda _: (),
    "UpdatePodSandbox": lambda request: (request.pod, request.overhead_linux_resources, request.linux_resources),
    "UpdateContainer": lambda request: (request.pod, request.container, request.linux_resources),
    "ValidateContainerAdjustment": lambda request: (request,),
}
"""What a method gets of its request, where that is not what most do."""


def _handler(plugin: Plugin, name: str) -> Callable[..., Any] | None:
    """The plugin's method of an event: RunPodSandbox is run_pod_sandbox."""
    if not METHODS[name].event:
        return None
    own = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).removeprefix("_")
    found = getattr(plugin, own, None)
    return found if callable(found) else None


async def _result(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def _response(response: Any, answer: Any) -> Any:
    """A method's answer, put into its response."""
    if answer is None or isinstance(answer, type(response)):
        return answer if answer is not None else response
    if isinstance(answer, pb.ContainerAdjustment):
        response.adjust.CopyFrom(answer)
    elif isinstance(response, pb.ValidateContainerAdjustmentResponse):
        response.reject, response.reason = True, str(answer)
    else:
        response.update.extend(answer)
    return response


def run(plugin: Plugin, *, name: str = "", index: str = "", path: str = SOCKET, again: bool = True) -> None:
    """Serve a plugin until SIGTERM or SIGINT, or, where the runtime has started it, until that hangs up. Raises TareError where it is refused.

    `name` and `index` (two digits: plugins are asked in that order) are the runtime's to say where it has started the plugin. With `again` a
    connection that has ended, as by a runtime that is started anew, is made anew.
    """
    name, index = os.environ.get(NAME_VARIABLE, name), os.environ.get(INDEX_VARIABLE, index)
    check_identity(name, index)
    asyncio.run(_run(plugin, name, index, path, again))


async def _run(plugin: Plugin, name: str, index: str, path: str, again: bool) -> None:
    work = asyncio.ensure_future(_serve(plugin, name, index, path, again))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, work.cancel)
    try:
        await work
    except asyncio.CancelledError:
        log.info("told to end")


async def _serve(plugin: Plugin, name: str, index: str, path: str, again: bool) -> None:
    given = os.environ.get(SOCKET_VARIABLE)
    if given is not None:
        await Session(plugin).serve(taken(int(given)), name, index)
        return
    failures = 0
    while True:
        session = Session(plugin)
        try:
            await session.serve(await connect(path), name, index)
        except (TareError, OSError) as error:
            if not again:
                raise
            log.warning("connection to %s: %s", path, describe(error))
        if not again:
            return
        failures = 0 if session.configured.is_set() else failures + 1
        await asyncio.sleep(PAUSES[min(failures, len(PAUSES) - 1)])


def taken(fd: int) -> socket.socket:
    """The socket that the runtime has put at this descriptor, and nobody else's: what the plugin starts does not have it."""
    connected = socket.socket(fileno=os.dup(fd))
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, fd, inheritable=fd <= 2)
    os.close(null)
    return connected


async def connect(path: str) -> socket.socket:
    """A socket that is connected to the runtime's. Raises OSError."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(connected, path)
    except BaseException:
        connected.close()
        raise
    return connected
