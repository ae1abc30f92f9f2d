"""The journal of events, alone and as subscribers meet it over the socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path

import grpc
import grpc.aio
import pytest

from tare.cri.stream_service import PIECE_BYTES, PIECE_ITEMS, pieces
from tare.cri.v1 import api_pb2 as pb
from tare.errors import ResourceExhausted, Unavailable
from tare.runtime.events import Event, Journal, Kind
from tare.runtime.records import PodConfig, PodMetadata, PodRecord, PodState
from tests.support.cri_ports import Client, MemoryRuntime, serving


def pod(annotation: str = "") -> PodRecord:
    """Some pod."""
    metadata = PodMetadata(name="a", uid="b", namespace="c")
    config = PodConfig(metadata=metadata, annotations={"long": annotation})
    return PodRecord(id="p", config=config, handler="", state=PodState.READY, created_at=1)


def fill(journal: Journal, first: int, last: int) -> None:
    """Events of things named by numbers."""
    for number in range(first, last + 1):
        journal.add(Kind.CREATED, str(number), pod(), ())


async def take(events: AsyncGenerator[Event], count: int) -> list[str]:
    """The next things that something happens to."""
    return [(await anext(events)).id for _ in range(count)]


def run(play: Callable[[], Awaitable[None]]) -> None:
    """In an event loop, for ten seconds at most."""

    async def bounded() -> None:
        await asyncio.wait_for(play(), 10)

    asyncio.run(bounded())


def test_a_second_follower_hears_what_comes_after_it() -> None:
    async def play() -> None:
        journal = Journal()
        fill(journal, 1, 2)
        first = journal.follow()
        assert await take(first, 2) == ["1", "2"]
        second = journal.follow()
        fill(journal, 3, 3)
        assert await take(first, 1) == await take(second, 1) == ["3"]
        for follower in (first, second):
            await follower.aclose()

    run(play)


def test_the_next_follower_goes_on_where_the_last_one_was() -> None:
    async def play() -> None:
        journal = Journal()
        fill(journal, 1, 3)
        first = journal.follow()
        await take(first, 2)
        await first.aclose()
        fill(journal, 4, 4)
        second = journal.follow()
        assert await take(second, 3) == ["2", "3", "4"]  # the second one may not have arrived
        await second.aclose()

    run(play)


def test_what_nobody_has_read_is_kept_for_a_while_only() -> None:
    async def play() -> None:
        journal = Journal(keep=0)
        fill(journal, 1, 3)
        await asyncio.sleep(0.001)
        follower = journal.follow()
        fill(journal, 4, 4)
        assert await take(follower, 1) == ["4"]
        await follower.aclose()

    run(play)


def test_who_waits_is_woken_by_an_event_and_by_the_end() -> None:
    async def play() -> None:
        journal = Journal()
        follower = journal.follow()
        waiting = asyncio.ensure_future(take(follower, 1))
        await asyncio.sleep(0)
        fill(journal, 1, 1)
        assert await waiting == ["1"]
        waiting = asyncio.ensure_future(take(follower, 1))
        await asyncio.sleep(0)
        journal.close()
        with pytest.raises(Unavailable):
            await waiting

    run(play)


def test_who_falls_behind_is_cut_off_in_the_place_of_what_is_lost() -> None:
    async def play() -> None:
        journal = Journal(limit=3)
        follower = journal.follow()
        fill(journal, 1, 1)
        assert await take(follower, 1) == ["1"]
        fill(journal, 2, 4)
        assert await take(follower, 1) == ["2"]
        fill(journal, 5, 8)
        with pytest.raises(ResourceExhausted, match="subscribe again"):
            await take(follower, 1)

    run(play)


def test_a_client_that_does_not_read_is_cut_off_with_a_status(tmp_path: Path) -> None:
    """What the transport takes is bounded; the rest waits in the journal, and never in between."""

    async def play() -> None:
        runtime = MemoryRuntime(journal=Journal(limit=50))
        async with serving(tmp_path / "tare.sock", runtime) as client:
            call = client.runtime.GetContainerEvents(pb.GetEventsRequest())
            await call.initial_metadata()
            for number in range(200):
                runtime.journal.add(Kind.CREATED, str(number), pod("x" * 200_000), ())
                await asyncio.sleep(0.002)
            heard = []
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                async for event in call:
                    heard.append(int(event.container_id))
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert heard == list(range(len(heard))), "a gap"
            assert len(heard) < 150

    run(play)


def test_pieces_of_a_list_are_bounded_in_number_and_in_bytes() -> None:
    small = [pb.Container(id=str(number)) for number in range(5000)]
    found = list(pieces(small))
    assert [item.id for piece in found for item in piece] == [item.id for item in small]
    assert max(map(len, found)) == PIECE_ITEMS
    big = [pb.Container(id="x" * (PIECE_BYTES // 3)) for _ in range(10)]
    assert [len(piece) for piece in pieces(big)] == [3, 3, 3, 1]
    assert list(pieces(small[:0])) == []


def test_pod_ranges_and_updates_reach_the_runtime(tmp_path: Path) -> None:
    async def scenario(client: Client, runtime: MemoryRuntime) -> None:
        def configured(text: str) -> pb.UpdateRuntimeConfigRequest:
            network = pb.NetworkConfig(pod_cidr=text)
            return pb.UpdateRuntimeConfigRequest(runtime_config=pb.RuntimeConfig(network_config=network))

        await client.runtime.UpdateRuntimeConfig(configured("fd00::/64,10.1.0.0/24"))
        await client.runtime.UpdateRuntimeConfig(configured(""))
        assert runtime.calls == [("use_pod_ranges", "fd00::/64", "10.1.0.0/24")]
        for wrong in ("10.1.0.300/24", "nonsense", "10.1.0.0/24,"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.runtime.UpdateRuntimeConfig(configured(wrong))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "pod_cidr" in caught.value.details()

    async def play() -> None:
        runtime = MemoryRuntime()
        async with serving(tmp_path / "tare.sock", runtime) as client:
            await scenario(client, runtime)

    run(play)
