"""Statistics through a real gRPC channel, on a runtime kept in memory: streams in pieces, what is left unset, how replies are made."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tare.cgroups.counters import Memory, Pressure, Stall
from tare.cgroups.stats import Counters
from tare.cri import translate_stats
from tare.cri.stats_service import STREAM_BATCH, batches
from tare.cri.v1 import api_pb2 as pb
from tare.runtime.records import (
    ContainerConfig,
    ContainerMetadata,
    ContainerState,
    ImageRef,
    PodConfig,
    PodMetadata,
    PodState,
)
from tare.runtime.stats import ContainerStats, PodStats
from tare.runtime.traffic import Interface
from tests.support.cri_ports import Client, MemoryRuntime, measured, serving

FIELDS = ("rx_packets", "rx_errors", "rx_dropped", "tx_packets", "tx_errors", "tx_dropped")


async def fill(runtime: MemoryRuntime, count: int) -> list[str]:
    """A pod with so many containers that run, and one that does not."""
    pod = await runtime.run_pod(PodConfig(metadata=PodMetadata(name="p", uid="u", namespace="n")), "")
    config = ContainerConfig(metadata=ContainerMetadata(name="c"), image=ImageRef(image="i"))
    first = await runtime.create_container(pod, config, runtime.pods[pod].config)
    record = replace(runtime.containers.pop(first), state=ContainerState.RUNNING)
    made = [f"{number:064x}" for number in range(count)]
    runtime.containers.update({key: replace(record, id=key) for key in made})
    runtime.containers["e" * 64] = replace(record, id="e" * 64, state=ContainerState.EXITED)
    return made


def play(tmp_path: Path, scenario: Callable[[Client, MemoryRuntime], Awaitable[None]]) -> None:
    async def run() -> None:
        runtime = MemoryRuntime()
        async with serving(tmp_path / "tare.sock", runtime) as client:
            await asyncio.wait_for(scenario(client, runtime), 30)

    asyncio.run(run())


def test_a_stream_has_everything_once_in_pieces(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime) -> None:
        made = await fill(runtime, 2 * STREAM_BATCH + 1)
        pieces = [piece async for piece in client.runtime.StreamContainerStats(pb.StreamContainerStatsRequest())]
        assert [len(piece.container_stats) for piece in pieces] == [STREAM_BATCH, STREAM_BATCH, 1]
        assert sorted(item.attributes.id for piece in pieces for item in piece.container_stats) == made
        pods = [piece async for piece in client.runtime.StreamPodSandboxStats(pb.StreamPodSandboxStatsRequest())]
        assert [len(piece.pod_sandbox_stats) for piece in pods] == [1]
        metrics = [piece async for piece in client.runtime.StreamPodSandboxMetrics(pb.StreamPodSandboxMetricsRequest())]
        assert [len(piece.pod_sandbox_metrics) for piece in metrics] == [1]

    play(tmp_path, scenario)


def test_an_empty_stream_ends(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime) -> None:
        assert [piece async for piece in client.runtime.StreamContainerStats(pb.StreamContainerStatsRequest())] == []

    play(tmp_path, scenario)


def test_lists_leave_out_what_has_ended(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime) -> None:
        made = await fill(runtime, 2)
        listed = await client.runtime.ListContainerStats(pb.ListContainerStatsRequest())
        assert sorted(item.attributes.id for item in listed.stats) == made
        ended = await client.runtime.ContainerStats(pb.ContainerStatsRequest(container_id="e" * 64))
        assert (ended.stats.HasField("cpu"), ended.stats.writable_layer.used_bytes.value) == (False, 4096)
        for pod in runtime.pods.values():
            runtime.pods[pod.id] = replace(pod, state=PodState.NOTREADY)
        assert list((await client.runtime.ListPodSandboxStats(pb.ListPodSandboxStatsRequest())).stats) == []

    play(tmp_path, scenario)


@pytest.mark.parametrize(
    ("method", "request_", "field"),
    [
        ("ContainerStats", pb.ContainerStatsRequest(), "container_id"),
        ("PodSandboxStats", pb.PodSandboxStatsRequest(), "pod_sandbox_id"),
    ],
)
def test_an_empty_id_is_named(tmp_path: Path, method: str, request_: object, field: str) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(client.runtime, method)(request_)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert field in (caught.value.details() or "")

    play(tmp_path, scenario)


async def one() -> ContainerStats:
    runtime = MemoryRuntime()
    (container,) = await fill(runtime, 1)
    return measured(runtime.containers[container])


def test_what_was_measured_as_0_is_set() -> None:
    memory = Memory(usage=5, inactive_file=9, rss=0, page_faults=0, major_page_faults=0, swap=0, limit=4, swap_limit=0)
    pressure = Pressure(Stall(0, 0.0, 0.5, 0.0), None)
    counters = Counters(cpu=0, memory=memory, cpu_pressure=pressure)
    shown = translate_stats.container_stats(replace(asyncio.run(one()), counters=counters, nano_cores=0))
    assert shown.cpu.HasField("usage_core_nano_seconds") and shown.cpu.HasField("usage_nano_cores")
    assert shown.memory.HasField("rss_bytes") and shown.memory.HasField("page_faults")
    assert (shown.memory.working_set_bytes.value, shown.memory.available_bytes.value) == (0, 4)
    assert shown.swap.HasField("swap_available_bytes") and shown.swap.HasField("swap_usage_bytes")
    assert shown.cpu.psi.HasField("Some") and not shown.cpu.psi.HasField("Full")
    assert shown.cpu.psi.Some.Avg60 == 0.5
    assert not shown.memory.HasField("psi") and not shown.HasField("io")


def test_what_was_not_measured_is_not_set() -> None:
    shown = translate_stats.container_stats(replace(asyncio.run(one()), counters=Counters(), size=None))
    assert [field.name for field, _ in shown.ListFields()] == ["attributes"]


def test_the_default_interface_is_not_among_the_others() -> None:
    names = ("eth0", "net1", "net2")
    interfaces = tuple(Interface(name=name, rx_bytes=1, tx_bytes=2, **dict.fromkeys(FIELDS, 3)) for name in names)

    async def pod() -> PodStats:
        runtime = MemoryRuntime()
        await fill(runtime, 0)
        (stats,) = await runtime.stats.pods(runtime.list_pods())
        return replace(stats, interfaces=interfaces)

    shown = translate_stats.pod_stats(asyncio.run(pod()))
    network = shown.linux.network
    assert (network.default_interface.name, [item.name for item in network.interfaces]) == ("eth0", ["net1", "net2"])
    assert (network.default_interface.rx_bytes.value, network.default_interface.tx_errors.value) == (1, 3)


def test_pieces_of_a_list() -> None:
    assert batches([]) == []
    assert [len(piece) for piece in batches(range(STREAM_BATCH))] == [STREAM_BATCH]
