"""NRI connections, each end with a socket in hand: plugins that keep to nothing, and what does not fit one message."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest

from tare.config import NriConfig
from tare.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, ResourceExhausted, TareError
from tare.nri import ContainerUpdate, KeyValue, Plugin, frames, rpc
from tare.nri.frames import LARGEST, REQUEST, RESPONSE, TO_PLUGIN, TO_RUNTIME
from tare.nri.interface import PLUGIN, RUNTIME
from tare.nri.peer import Peer, PluginFailed
from tare.nri.plugin import Session
from tare.nri.v1 import nri_pb2 as pb
from tare.nri.v1 import ttrpc_pb2

SETTINGS = NriConfig(registration_timeout=20.0, request_timeout=20.0)


async def no_update(peer: Peer, request: pb.UpdateContainersRequest) -> pb.UpdateContainersResponse:
    """Nothing can be updated."""
    return pb.UpdateContainersResponse(failed=request.update)


class Ends:
    """A peer, and the other end of its connection: a plugin of ours (`serve`), or bare bytes."""

    def __init__(self, settings: NriConfig = SETTINGS) -> None:
        self.gone = asyncio.Event()
        self.peer = Peer(settings, no_update, lambda _: self.gone.set())
        self.ours, self.theirs = socket.socketpair()
        self.theirs.setblocking(False)

    async def serve(self, plugin: Plugin, name: str = "mine", index: str = "10") -> asyncio.Task[None]:
        """The plugin, configured."""
        session = asyncio.ensure_future(Session(plugin).serve(self.theirs, name, index))
        await self.peer.begin(self.ours)
        return session

    async def say(self, call: int, method: str, payload: bytes = b"", kind: int = REQUEST) -> ttrpc_pb2.Response:
        """A request in bare bytes, and its answer."""
        request = ttrpc_pb2.Request(service=RUNTIME, method=method, payload=payload)
        return await self.send(frames.message(call, kind, request.SerializeToString()))

    async def send(self, message: bytes) -> ttrpc_pb2.Response:
        """A message, and the answer to it."""
        loop = asyncio.get_running_loop()
        for part in frames.frames(TO_RUNTIME, message):
            await loop.sock_sendall(self.theirs, part)
        taken, stream = frames.Socket(), frames.Stream()
        while True:
            data = await loop.sock_recv(self.theirs, 1 << 16)
            assert data, "it hung up"
            for which, part in taken.feed(data):
                for answer in stream.feed(part) if which == TO_RUNTIME else ():
                    assert answer.type == RESPONSE
                    return ttrpc_pb2.Response.FromString(answer.payload)

    def close(self) -> None:
        """Both ends."""
        self.peer.close()
        self.theirs.close()


def within(scenario: Callable[[Ends], Awaitable[None]], settings: NriConfig = SETTINGS) -> None:
    """Run a scenario with two ends."""

    async def run() -> None:
        ends = Ends(settings)
        try:
            async with asyncio.timeout(30):
                await scenario(ends)
        finally:
            ends.close()
            await asyncio.sleep(0)

    asyncio.run(run())


def registration(name: str = "mine", index: str = "10") -> bytes:
    """What a plugin says first."""
    return pb.RegisterPluginRequest(plugin_name=name, plugin_idx=index).SerializeToString()


@pytest.mark.parametrize(
    ("name", "index"),
    [("", "10"), ("a b", "10"), ("a/b", "10"), ("ä", "10"), ("a", "1"), ("a", "100"), ("a", "x1"), ("a", "１１")],
)
def test_wrong_names_are_refused(name: str, index: str) -> None:
    async def scenario(ends: Ends) -> None:
        begun = asyncio.ensure_future(ends.peer.begin(ends.ours))
        answer = await ends.say(1, "RegisterPlugin", registration(name, index))
        assert answer.status.code == rpc.INVALID_ARGUMENT
        with pytest.raises(InvalidArgument):
            await begun
        assert ends.peer.closed

    within(scenario)


def test_who_registers_twice_is_told_so_and_stays_who_it_is() -> None:
    async def scenario(ends: Ends) -> None:
        begun = asyncio.ensure_future(ends.peer.begin(ends.ours))
        early = await ends.say(1, "UpdateContainers")
        assert early.status.code == rpc.FAILED_PRECONDITION
        assert not (await ends.say(3, "RegisterPlugin", registration())).status.code
        again = await ends.say(5, "RegisterPlugin", registration("other", "20"))
        assert again.status.code == rpc.FAILED_PRECONDITION and "10-mine" in again.status.message
        assert ends.peer.title == "10-mine"
        begun.cancel()
        with suppress(asyncio.CancelledError, TareError):
            await begun

    within(scenario)


def test_who_does_not_register_is_hung_up_on() -> None:
    async def scenario(ends: Ends) -> None:
        with pytest.raises(DeadlineExceeded, match=r"within 0\.5 s"):
            await ends.peer.begin(ends.ours)
        await ends.gone.wait()

    within(scenario, NriConfig(registration_timeout=0.5))


def test_calls_that_are_none() -> None:
    async def scenario(ends: Ends) -> None:
        begun = asyncio.ensure_future(ends.peer.begin(ends.ours))
        assert (await ends.say(2, "RegisterPlugin")).status.code == rpc.INVALID_ARGUMENT  # even
        assert (await ends.say(1, "Unheard")).status.code == rpc.UNIMPLEMENTED
        assert (await ends.say(1, "RegisterPlugin")).status.code == rpc.INVALID_ARGUMENT  # not higher
        assert (await ends.say(3, "RegisterPlugin", b"\xff\xff")).status.code == rpc.INVALID_ARGUMENT
        assert (await ends.say(5, "RegisterPlugin", kind=frames.DATA)).status.code == rpc.INVALID_ARGUMENT
        large = frames.HEADER.pack(LARGEST + 1, 5, REQUEST, 0) + bytes(LARGEST + 1)
        parts = b"".join(large[at : at + (1 << 20)] for at in range(0, len(large), 1 << 20))
        assert (await ends.send(parts)).status.code == rpc.RESOURCE_EXHAUSTED
        assert not (await ends.say(7, "RegisterPlugin", registration())).status.code
        begun.cancel()
        with suppress(asyncio.CancelledError, TareError):
            await begun

    within(scenario)


class Slow(Plugin):
    """It takes its time, or says too much, as it is told."""

    def __init__(self) -> None:
        self.behaviour: Callable[[], Any] = lambda: None

    async def create_container(self, pod: pb.PodSandbox, container: pb.Container) -> Any:
        """As told."""
        answer = self.behaviour()
        return await answer if asyncio.iscoroutine(answer) else answer


def ask(peer: Peer) -> Awaitable[pb.CreateContainerResponse | None]:
    """About a container."""
    return peer.ask("CreateContainer", pb.CreateContainerRequest(), pb.CreateContainerResponse)


def test_one_that_stalls_is_gone_after_its_time() -> None:
    async def scenario(ends: Ends) -> None:
        plugin = Slow()
        session = await ends.serve(plugin)
        assert ends.peer.wants("CreateContainer") and not ends.peer.wants("RunPodSandbox")
        assert await ask(ends.peer) == pb.CreateContainerResponse()
        plugin.behaviour = lambda: asyncio.sleep(60)
        began = asyncio.get_running_loop().time()
        assert await ask(ends.peer) is None
        assert asyncio.get_running_loop().time() - began < 10
        assert ends.peer.closed and await ask(ends.peer) is None
        await session

    within(scenario, NriConfig(registration_timeout=20.0, request_timeout=1.0))


def test_its_refusal_and_too_much_of_it() -> None:
    async def scenario(ends: Ends) -> None:
        plugin = Slow()
        session = await ends.serve(plugin)

        def fail() -> None:
            raise RuntimeError("not with me")

        plugin.behaviour = fail
        with pytest.raises(PluginFailed, match=r"10-mine .*not with me"):
            await ask(ends.peer)
        plugin.behaviour = lambda: pb.ContainerAdjustment(env=[KeyValue(key="A", value="x" * (LARGEST + 1))])
        with pytest.raises(PluginFailed, match="may have 4194304"):
            await ask(ends.peer)
        with pytest.raises(ResourceExhausted, match="may have 4194304"):
            request = pb.CreateContainerRequest(container=pb.Container(env=["A=" + "x" * LARGEST]))
            await ends.peer.ask("CreateContainer", request, pb.CreateContainerResponse)
        plugin.behaviour = lambda: None
        assert await ask(ends.peer) == pb.CreateContainerResponse() and not ends.peer.closed
        ends.peer.close()
        await session

    within(scenario)


class Synchronized(Plugin):
    """It wants everything updated."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def synchronize(self, pods: list[pb.PodSandbox], containers: list[pb.Container]) -> list[pb.ContainerUpdate]:
        """All at once, in however many messages it came."""
        self.seen.append((len(pods), len(containers)))
        return [ContainerUpdate(container_id=container.id) for container in containers]


def test_what_there_is_comes_in_as_many_messages_as_it_takes() -> None:
    async def scenario(ends: Ends) -> None:
        plugin = Synchronized()
        session = await ends.serve(plugin)
        pods = [pb.PodSandbox(id=str(number)) for number in range(50)]
        containers = [pb.Container(id=str(number), env=["A=" + "x" * 40_000]) for number in range(300)]  # 12 MB
        updates = await ends.peer.synchronize(pods, containers)
        assert plugin.seen == [(50, 300)] and [item.container_id for item in updates] == [
            item.id for item in containers
        ]
        one = pb.Container(id="huge", env=["A=" + "x" * LARGEST])
        with pytest.raises(FailedPrecondition, match="4194304"):
            await ends.peer.synchronize(pods, [one])
        await session

    within(scenario)


def test_older_plugins_are_told_by_state_changes() -> None:
    async def scenario(ends: Ends) -> None:
        changes: list[tuple[int, str, str]] = []

        async def serve(service: str, method: str, payload: bytes) -> bytes:
            assert service == PLUGIN
            if method == "StateChange":
                change = pb.StateChangeEvent.FromString(payload)
                changes.append((change.event, change.pod.id, change.container.id))
            elif method != "Configure":
                raise rpc.RemoteError(rpc.UNIMPLEMENTED, "unheard of")
            return b""

        end = await rpc.Connection.over(
            ends.theirs, calls=TO_RUNTIME, serves=TO_PLUGIN, serve=serve, on_close=lambda: None
        )
        begun = asyncio.ensure_future(ends.peer.begin(ends.ours))
        await end.call(RUNTIME, "RegisterPlugin", registration(), 5)
        await begun
        pod, container = pb.PodSandbox(id="p"), pb.Container(id="c")
        await ends.peer.ask("RunPodSandbox", pb.RunPodSandboxRequest(pod=pod), pb.RunPodSandboxResponse)
        request = pb.StartContainerRequest(pod=pod, container=container)
        await ends.peer.ask("StartContainer", request, pb.StartContainerResponse)
        assert changes == [(pb.RUN_POD_SANDBOX, "p", ""), (pb.START_CONTAINER, "p", "c")]
        with pytest.raises(PluginFailed, match="unheard of"):
            await ask(ends.peer)
        end.close()

    within(scenario)


def test_events_that_there_are_not() -> None:
    async def scenario(ends: Ends) -> None:
        async def serve(service: str, method: str, payload: bytes) -> bytes:
            return pb.ConfigureResponse(events=1 << 20).SerializeToString()

        end = await rpc.Connection.over(
            ends.theirs, calls=TO_RUNTIME, serves=TO_PLUGIN, serve=serve, on_close=lambda: None
        )
        begun = asyncio.ensure_future(ends.peer.begin(ends.ours))
        await end.call(RUNTIME, "RegisterPlugin", registration(), 5)
        with pytest.raises(FailedPrecondition, match="0x100000"):
            await begun
        end.close()

    within(scenario)
