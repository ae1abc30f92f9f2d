"""The pieces of statistics: rates, sizes of writable layers, interfaces, limits, what a pod's numbers are."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tare.cgroups.counters import Memory
from tare.cgroups.stats import Counters
from tare.cli import stats as cli
from tare.cri.v1 import api_pb2 as pb
from tare.runtime import census, traffic
from tare.runtime.rates import SECOND, Rates
from tare.runtime.stats import completed
from tare.storage import sizes
from tare.storage.overlay import Usage
from tare.storage.sizes import Sizes

DEVICES = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 39618178979 1938821    0    0    0     0          0         0 39618178979 1938821    0    0    0     0       0          0
net1.100:       1       2    3    4    0     0          0         0        5       6    7    8    0     0       0          0
  eth0:1029714404   32187    0    1    0     0          0         0  1817307   20941    0    2    0     0       0          0
"""


def test_the_first_question_has_no_rate() -> None:
    rates = Rates()
    assert rates.of("c", 5, 0) is None
    assert rates.of("c", 5 + SECOND, 2 * SECOND) == SECOND // 2


def test_questions_in_quick_succession_look_further_back() -> None:
    rates = Rates()
    rates.of("c", 0, 0)
    assert rates.of("c", 1000, SECOND // 10) == 10_000, "there is nothing further back yet"
    assert rates.of("c", SECOND, 2 * SECOND) == SECOND // 2
    assert rates.of("c", SECOND, 2 * SECOND + 1) == SECOND * SECOND // (2 * SECOND + 1)
    assert rates.of("c", SECOND, 4 * SECOND) == 0


def test_a_counter_that_starts_anew_has_no_rate() -> None:
    rates = Rates()
    rates.of("c", 1000, 0)
    assert rates.of("c", 10, 2 * SECOND) is None
    assert rates.of("c", 20, 2 * SECOND) is None, "no time has passed"
    rates.keep({"other"})
    assert rates.of("c", 30, 9 * SECOND) is None


def test_interfaces_of_a_namespace() -> None:
    first, second = traffic.parse(DEVICES)
    assert (first.name, first.rx_bytes, first.rx_dropped, first.tx_packets) == ("eth0", 1029714404, 1, 20941)
    fields = (second.rx_bytes, second.rx_packets, second.rx_errors, second.rx_dropped)
    assert (second.name, *fields) == ("net1.100", 1, 2, 3, 4)
    assert (second.tx_bytes, second.tx_packets, second.tx_errors, second.tx_dropped) == (5, 6, 7, 8)


def test_a_census_of_this_process(tmp_path: Path) -> None:
    before = census.take([os.getpid()], os.getpid())
    assert before.sockets is not None
    with socket.socket(), (tmp_path / "file").open("w"):
        after = census.take([os.getpid(), 4_000_000], os.getpid())
    assert (after.processes, after.descriptors - before.descriptors) == (2, 2)
    assert after.sockets == before.sockets + 1
    assert after.open_files is not None
    assert census.take([os.getpid()], 1).open_files is None, "not one of them"


def test_too_many_descriptors_are_counted_and_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(census, "MOST_DESCRIPTORS", 0)
    found = census.take([os.getpid()], 0)
    assert found.descriptors > 0
    assert found.sockets is None


def memory(usage: int, limit: int | None = None) -> Memory:
    return Memory(usage=usage, inactive_file=1, rss=2, page_faults=3, major_page_faults=4, swap=5, limit=limit)


def test_what_a_pods_own_group_does_not_tell_is_summed_up() -> None:
    inside = [Counters(cpu=1, memory=memory(10, 100)), Counters(), Counters(cpu=2, memory=memory(20))]
    assert completed(Counters(cpu=9, memory=memory(50, 60)), inside) == Counters(cpu=9, memory=memory(50, 60))
    found = completed(Counters(cpu=9), inside)
    assert (found.cpu, found.memory) == (
        9,
        Memory(usage=30, inactive_file=2, rss=4, page_faults=6, major_page_faults=8, swap=10),
    )
    assert completed(Counters(), []) == Counters()


# Sizes of writable layers


def play(scenario: Callable[[], object]) -> None:
    async def run() -> None:
        await asyncio.wait_for(scenario(), 20)  # type: ignore[arg-type]

    asyncio.run(run())


class Layers:
    """Layers that are counted in no time, and how often each was; one in `slow` takes until `gate` is set."""

    def __init__(self) -> None:
        self.counted: list[str] = []
        self.cost = 0.0
        self.slow: set[str] = set()
        self.broken: set[str] = set()
        self.gate = threading.Event()

    def count(self, container_id: str) -> tuple[Usage, float]:
        if container_id in self.broken:
            raise OSError("no")
        if container_id in self.slow:
            assert self.gate.wait(20)
        self.counted.append(container_id)
        return Usage(bytes=len(self.counted) * 512, inodes=1), self.cost


def test_a_layer_is_not_counted_at_each_question() -> None:
    layers = Layers()
    known = Sizes(layers.count)

    async def scenario() -> None:
        first = await known.get(["a", "b"])
        assert await known.get(["b", "a"]) == first
        assert layers.counted == ["a", "b"]
        assert first["a"].at <= time.time_ns()

    play(scenario)


def test_a_layer_is_counted_anew_when_its_count_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "FRESH", 0.0)
    layers = Layers()
    known = Sizes(layers.count)

    async def scenario() -> None:
        assert (await known.get(["a"]))["a"].bytes == 512
        assert (await known.get(["a"]))["a"].bytes == 1024
        layers.cost = 1000.0  # what takes long is kept for long
        assert (await known.get(["a"]))["a"].bytes == 1536
        assert (await known.get(["a"]))["a"].bytes == 1536

    play(scenario)


def test_nobody_waits_for_a_big_layer_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "SLICE", 0.0)
    layers = Layers()
    layers.slow = {"big"}
    known = Sizes(layers.count, patience=0.05)

    async def scenario() -> None:
        found = await known.get(["small", "big"])
        assert list(found) == ["small"]
        assert list(await known.get(["big"])) == []
        layers.gate.set()
        while not await known.get(["big"]):
            await asyncio.sleep(0.01)
        assert layers.counted.count("big") == 1

    play(scenario)


def test_a_layer_that_cannot_be_counted_keeps_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "FRESH", 0.0)
    layers = Layers()
    known = Sizes(layers.count)

    async def scenario() -> None:
        first = await known.get(["a"])
        layers.broken = {"a", "b"}
        assert await known.get(["a", "b"]) == first
        known.keep({"b"})
        assert await known.get(["a"]) == {}

    play(scenario)


# The command


def test_rows_of_the_table() -> None:
    known = pb.ContainerStats(
        attributes=pb.ContainerAttributes(id="a" * 64, metadata=pb.ContainerMetadata(name="web")),
        cpu=pb.CpuUsage(usage_nano_cores=pb.UInt64Value(value=1_250_000_000)),
        memory=pb.MemoryUsage(
            working_set_bytes=pb.UInt64Value(value=4_000_000), available_bytes=pb.UInt64Value(value=60_000_000)
        ),
        swap=pb.SwapUsage(swap_usage_bytes=pb.UInt64Value(value=0)),
        writable_layer=pb.FilesystemUsage(used_bytes=pb.UInt64Value(value=8192)),
    )
    bare = pb.ContainerStats(attributes=pb.ContainerAttributes(id="b" * 64, metadata=pb.ContainerMetadata(name="new")))
    assert cli.rows([known, bare], {"a" * 64: "shop"}) == [
        ["a" * 13, "web", "shop", "125.0%", "4MB", "64MB", "0B", "8.19kB"],
        ["b" * 13, "new", "-", "-", "-", "-", "-", "-"],
    ]
