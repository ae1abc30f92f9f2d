"""Work in threads and work that is shared: cancellation waits, joiners share, the last to leave cancels."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tare.images.threads import Shared, Syncer, in_thread


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_a_cancelled_caller_waits_for_the_thread() -> None:
    async def main() -> None:
        entered, leave, left = threading.Event(), threading.Event(), []

        def work() -> None:
            entered.set()
            leave.wait()
            left.append(True)

        with ThreadPoolExecutor(2) as executor:
            for stop in (None, leave.set):
                entered.clear()
                leave.clear()
                left.clear()
                task = asyncio.create_task(in_thread(executor, work, stop))
                await asyncio.to_thread(entered.wait)
                task.cancel()
                await asyncio.sleep(0)
                assert stop is not None or not task.done()
                leave.set()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert left == [True]

    run(main())


def test_results_and_errors_come_from_the_thread() -> None:
    def fail() -> None:
        raise ValueError("no")

    async def main() -> None:
        with ThreadPoolExecutor(1) as executor:
            assert await in_thread(executor, lambda: 3) == 3
            with pytest.raises(ValueError, match="no"):
                await in_thread(executor, fail)

    run(main())


def test_work_under_way_is_joined() -> None:
    async def main() -> None:
        shared: Shared[int] = Shared()
        started, gate = [], asyncio.Event()

        async def work() -> int:
            started.append(1)
            await gate.wait()
            return 7

        tasks = [asyncio.create_task(shared.run("k", work)) for _ in range(5)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.sleep(0)
        gate.set()
        assert await asyncio.gather(*tasks[1:]) == [7] * 4
        assert (started, shared.running()) == ([1], set())

    run(main())


def test_the_last_to_leave_cancels_and_waits() -> None:
    async def main() -> None:
        shared: Shared[None] = Shared()
        entered, cleaned = asyncio.Event(), []

        async def work() -> None:
            entered.set()
            try:
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                cleaned.append(True)

        tasks = [asyncio.create_task(shared.run("k", work)) for _ in range(2)]
        await entered.wait()
        for task in tasks:
            assert not cleaned
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert cleaned == [True]

    run(main())


def test_who_joined_tries_himself_where_the_owner_is_to_blame() -> None:
    async def main() -> None:
        shared: Shared[str] = Shared()
        gate = asyncio.Event()

        async def refused() -> str:
            await gate.wait()
            raise PermissionError

        async def allowed() -> str:
            return "mine"

        owner = asyncio.create_task(shared.run("k", refused, PermissionError))
        await asyncio.sleep(0)
        joiner = asyncio.create_task(shared.run("k", allowed, PermissionError))
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(PermissionError):
            await owner
        assert await joiner == "mine"

    run(main())


def test_one_sync_serves_all_who_asked_before_it_began() -> None:
    async def main() -> None:
        entered, leave, count = threading.Event(), threading.Event(), []

        def sync() -> None:
            count.append(1)
            entered.set()
            leave.wait()

        with ThreadPoolExecutor(1) as executor:
            syncer = Syncer(sync, executor)
            first = asyncio.create_task(syncer.sync())
            await asyncio.to_thread(entered.wait)
            others = [asyncio.create_task(syncer.sync()) for _ in range(5)]
            await asyncio.sleep(0)
            leave.set()
            await asyncio.gather(first, *others)
            assert len(count) == 2

    run(main())


def test_a_failed_sync_fails_all_who_waited() -> None:
    def sync() -> None:
        raise OSError("disk")

    async def main() -> None:
        with ThreadPoolExecutor(1) as executor:
            syncer = Syncer(sync, executor)
            results = await asyncio.gather(syncer.sync(), syncer.sync(), return_exceptions=True)
            assert [str(result) for result in results] == ["disk", "disk"]
            with pytest.raises(OSError, match="disk"):
                await syncer.sync()

    run(main())
