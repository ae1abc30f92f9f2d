"""Calls that go on without their caller, are joined, collected, claimed by use, and discarded."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tare.errors import AlreadyExists, InternalError
from tare.runtime.joining import Joining


class Work:
    """A call that ends when it is told to, and what became of its result."""

    def __init__(self, keep: float = 240.0) -> None:
        self.begun = 0
        self.go = asyncio.Event()
        self.claimed: list[str] = []
        self.discarded: list[str] = []
        self.undone = asyncio.Event()
        self.failure: Exception | None = None
        self.calls: Joining[str] = Joining("run pod", claimed=self.claimed.append, discard=self.discard, keep=keep)

    async def discard(self, result: str) -> None:
        self.discarded.append(result)
        self.undone.set()

    async def start(self) -> str:
        self.begun += 1
        await self.go.wait()
        if self.failure is not None:
            raise self.failure
        return "id-1"

    def call(self, request: object = "request") -> asyncio.Task[str]:
        return asyncio.ensure_future(self.calls.run("name", request, "id-1", self.start))


async def turn() -> None:
    """Let everything that is ready run."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def test_the_result_goes_to_the_caller() -> None:
    async def test() -> None:
        work = Work()
        work.go.set()
        assert await work.call() == "id-1"
        assert work.claimed == ["id-1"]
        assert not work.calls.known("name")

    run(test)


def test_a_second_caller_joins_the_first() -> None:
    async def test() -> None:
        work = Work()
        first, second = work.call(), work.call()
        await turn()
        work.go.set()
        assert await first == await second == "id-1"
        assert work.begun == 1
        assert work.claimed == ["id-1"]

    run(test)


def test_another_configuration_is_refused_with_the_holders_id() -> None:
    async def test() -> None:
        work = Work()
        first = work.call()
        await turn()
        with pytest.raises(AlreadyExists, match="id-1"):
            await work.call("something else")
        work.go.set()
        await first

    run(test)


def test_the_call_goes_on_without_its_caller_and_is_collected() -> None:
    async def test() -> None:
        work = Work()
        first = work.call()
        await turn()
        first.cancel()
        await turn()
        work.go.set()
        await turn()
        assert work.calls.known("name")
        assert work.claimed == []
        assert await work.call() == "id-1"
        assert work.begun == 1
        assert work.claimed == ["id-1"]

    run(test)


def test_a_caller_that_leaves_as_the_call_ends_has_not_taken_the_result() -> None:
    async def test() -> None:
        work = Work()
        first = work.call()
        await turn()
        work.go.set()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await turn()
        assert work.calls.known("name")
        assert work.claimed == []

    run(test)


def test_one_of_two_callers_leaving_changes_nothing_for_the_other() -> None:
    async def test() -> None:
        work = Work()
        first, second = work.call(), work.call()
        await turn()
        first.cancel()
        await turn()
        work.go.set()
        assert await second == "id-1"
        assert work.claimed == ["id-1"]

    run(test)


def test_what_nobody_comes_for_is_discarded() -> None:
    async def test() -> None:
        work = Work(keep=0.0)
        first = work.call()
        await turn()
        first.cancel()
        await turn()
        work.go.set()
        await work.undone.wait()
        assert work.discarded == ["id-1"]
        assert work.claimed == []
        assert not work.calls.known("name")

    run(test)


def test_using_what_was_made_is_a_claim() -> None:
    async def test() -> None:
        work = Work()
        first = work.call()
        await turn()
        first.cancel()
        work.go.set()
        await turn()
        work.calls.used("name")
        assert work.claimed == ["id-1"]
        assert not work.calls.known("name")
        work.calls.used("name")
        assert work.claimed == ["id-1"]

    run(test)


def test_a_failure_goes_to_the_caller_and_the_next_starts_over() -> None:
    async def test() -> None:
        work = Work()
        work.failure = InternalError("broken")
        work.go.set()
        with pytest.raises(InternalError):
            await work.call()
        work.failure = None
        assert await work.call() == "id-1"
        assert work.begun == 2

    run(test)


def test_a_failure_without_a_caller_is_logged_and_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        work = Work()
        work.failure = InternalError("broken")
        first = work.call()
        await turn()
        first.cancel()
        await turn()
        work.go.set()
        await turn()
        assert not work.calls.known("name")

    run(test)
    assert "failed after its caller had left: broken" in caplog.text


def test_an_offer_of_an_earlier_daemon_is_collected() -> None:
    async def test() -> None:
        work = Work()
        work.calls.offer("name", "request", "id-1", "id-1", age=10.0)
        with pytest.raises(AlreadyExists):
            await work.call("something else")
        assert await work.call() == "id-1"
        assert work.begun == 0
        assert work.claimed == ["id-1"]

    run(test)


def test_an_offer_that_is_too_old_is_discarded() -> None:
    async def test() -> None:
        work = Work()
        work.calls.offer("name", "request", "id-1", "id-1", age=1000.0)
        await work.undone.wait()
        assert work.discarded == ["id-1"]

    run(test)


def test_a_discard_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        tried = asyncio.Event()

        async def refuse(_: str) -> None:
            tried.set()
            raise InternalError("busy")

        calls: Joining[str] = Joining("run pod", claimed=lambda _: None, discard=refuse)
        calls.offer("name", "request", "id-1", "id-1", age=1000.0)
        await tried.wait()
        await turn()

    run(test)
    assert "undo id-1: busy" in caplog.text
