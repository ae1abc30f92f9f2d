"""Locks by ID: exclusive for one thing, independent for two, and a wait that says for whom."""

from __future__ import annotations

import asyncio

import pytest

from tare.errors import DeadlineExceeded
from tare.runtime.locks import Locks


def test_one_at_a_time_in_order() -> None:
    async def test() -> list[str]:
        locks, seen = Locks(), []

        async def work(name: str) -> None:
            async with locks.hold("a", name):
                seen.append(f"{name} in")
                await asyncio.sleep(0)
                seen.append(f"{name} out")

        await asyncio.gather(work("1"), work("2"), work("3"))
        assert len(locks) == 0
        return seen

    assert asyncio.run(test()) == ["1 in", "1 out", "2 in", "2 out", "3 in", "3 out"]


def test_two_things_do_not_wait_for_each_other() -> None:
    async def test() -> None:
        locks = Locks()
        async with locks.hold("a", "one"), locks.hold("b", "two"):
            assert len(locks) == 2

    asyncio.run(test())


def test_a_wait_ends_and_names_the_holder() -> None:
    async def test() -> None:
        locks = Locks(patience=0.01)
        async with locks.hold("a", "stop pod a"):
            with pytest.raises(
                DeadlineExceeded, match=r"remove pod a: at step wait: stop pod a did not end within 0\.01 s"
            ):
                async with locks.hold("a", "remove pod a"):
                    raise AssertionError("had while held")
        async with locks.hold("a", "again"):
            pass
        assert len(locks) == 0

    asyncio.run(test())


def test_a_cancelled_wait_leaves_nothing() -> None:
    async def test() -> None:
        locks = Locks()

        async def wait() -> None:
            async with locks.hold("a", "two"):
                raise AssertionError("had while held")

        async with locks.hold("a", "one"):
            waiter = asyncio.ensure_future(wait())
            await asyncio.sleep(0)
            waiter.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiter
        assert len(locks) == 0

    asyncio.run(test())
