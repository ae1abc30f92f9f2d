"""Calls that go on when their caller leaves, and whose result waits for the caller to come back.

A kubelet that loses patience (or its connection) with RunPodSandbox or CreateContainer asks again under the same name. Undoing
and starting over would never end where each try is too slow for the caller; so the first try goes on, and

    same name, same request, under way        → the second caller waits with the first
    same name, same request, ended unclaimed  → the second caller gets the result
    same name, other request                  → ALREADY_EXISTS with the holder's ID
    nobody comes back in time                 → the result is discarded

Using what was made is a claim too (`used`): a kubelet finds an unclaimed pod in a list and goes on with it. Whether a name is
taken by something that was claimed before is the caller's to know (`store`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from tare.errors import AlreadyExists, describe

log = logging.getLogger(__name__)
R = TypeVar("R")

KEEP = 240.0  # seconds for which an unclaimed result is kept


@dataclass(slots=True)
class _Call(Generic[R]):
    """One request under its name: under way, or ended and (with a timer) unclaimed."""

    holder: str
    request: object
    future: asyncio.Future[R]
    callers: int = 0
    timer: asyncio.TimerHandle | None = None


class Joining(Generic[R]):
    """The calls of one kind, by name.

    `claimed` is told when a result has found its caller, `discard` undoes one that nobody came for; it must not mind that it is gone.
    """

    def __init__(
        self,
        kind: str,
        *,
        claimed: Callable[[R], None],
        discard: Callable[[R], Awaitable[None]],
        keep: float = KEEP,
    ) -> None:
        self._kind = kind
        self._claimed = claimed
        self._discard = discard
        self._keep = keep
        self._calls: dict[str, _Call[R]] = {}
        self._discarding: set[asyncio.Task[None]] = set()

    @property
    def unclaimed(self) -> int:
        """How many results nobody has come for yet."""
        return sum(call.timer is not None for call in self._calls.values())

    def known(self, name: str) -> bool:
        """Is a call of this name under way or unclaimed?"""
        return name in self._calls

    async def run(self, name: str, request: object, holder: str, start: Callable[[], Awaitable[R]]) -> R:
        """The result of `start()`, or of the earlier call of this name when its request equals this one.

        `holder` is the ID that the result of this call is to have. Raises AlreadyExists, or what `start` raised.
        """
        call = self._calls.get(name)
        if call is None:
            call = self._calls[name] = self._begin(name, request, holder, start)
        elif call.request != request:
            cause = f"{call.holder} holds the name, and was asked for with another configuration"
            raise AlreadyExists(f"{self._kind} {name}", cause=cause)
        call.callers += 1
        try:
            result = await asyncio.shield(call.future)
            self._claim(name, call)
            return result
        finally:
            call.callers -= 1
            self._settle(name, call)

    def offer(self, name: str, request: object, holder: str, result: R, age: float) -> None:
        """A result of an earlier daemon that nobody has claimed, `age` seconds old."""
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        future.set_result(result)
        call = self._calls[name] = _Call(holder, request, future)
        self._keep_for(name, call, max(0.0, self._keep - age))

    def used(self, name: str) -> None:
        """Somebody uses what the call of this name made, if it has ended."""
        call = self._calls.get(name)
        if call is not None and call.timer is not None:
            self._claim(name, call)

    def _begin(self, name: str, request: object, holder: str, start: Callable[[], Awaitable[R]]) -> _Call[R]:
        call = _Call(holder, request, asyncio.ensure_future(start()))

        def ended(future: asyncio.Future[R]) -> None:
            if not call.callers and not future.cancelled() and (error := future.exception()) is not None:
                log.warning("%s %s failed after its caller had left: %s", self._kind, name, describe(error))
            self._settle(name, call)

        call.future.add_done_callback(ended)
        return call

    def _claim(self, name: str, call: _Call[R]) -> None:
        if self._calls.get(name) is not call:
            return
        del self._calls[name]
        if call.timer is not None:
            call.timer.cancel()
        self._claimed(call.future.result())

    def _settle(self, name: str, call: _Call[R]) -> None:
        """Decide what becomes of a call that has ended and that nobody awaits."""
        if self._calls.get(name) is not call or call.callers or call.timer is not None or not call.future.done():
            return
        if call.future.cancelled() or call.future.exception() is not None:
            del self._calls[name]
        else:
            self._keep_for(name, call, self._keep)

    def _keep_for(self, name: str, call: _Call[R], seconds: float) -> None:
        call.timer = asyncio.get_running_loop().call_later(seconds, self._expire, name, call)

    def _expire(self, name: str, call: _Call[R]) -> None:
        del self._calls[name]
        task = asyncio.ensure_future(self._discarded(name, call))
        self._discarding.add(task)
        task.add_done_callback(self._discarding.discard)

    async def _discarded(self, name: str, call: _Call[R]) -> None:
        log.info("%s %s: nobody came for %s, it is undone", self._kind, name, call.holder)
        try:
            await self._discard(call.future.result())
        except Exception as error:  # noqa: BLE001 - nobody waits for this; what is left stays listed and can be removed by its ID
            log.warning("%s %s: undo %s: %s", self._kind, name, call.holder, describe(error))


def no_effect(_: str) -> None:
    """A start needs no claim."""


async def nothing_to_discard(_: str) -> None:
    """A container whose start nobody came back for runs all the same."""
