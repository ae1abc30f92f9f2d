"""Clients that attach to a container before it starts, to hear it from its first byte.

    attach: expect ──── waits ────► admitted ─► joins the output ─► joined ─┐              ┌─► started ─► joins the input
    start:  … process made, its streams served ─► admit: waits ◄────────────┘ ─► its exec ─┴─► start

A start waits for those that are there, for JOIN_SECONDS at most. One that fails, or a container that is removed, dismisses them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

JOIN_SECONDS = 5.0


class Arrival:
    """One client that waits."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.admitted: asyncio.Future[bool] = loop.create_future()  # the output can be joined, or never
        self.started: asyncio.Future[bool] = loop.create_future()
        self.joined = asyncio.Event()

    def tell(self, starts: bool) -> None:
        """The container has started, or will not."""
        for future in (self.admitted, self.started):
            if not future.done():
                future.set_result(starts)


async def known(future: asyncio.Future[bool], gone: asyncio.Event) -> bool | None:
    """What a future tells; None where the client leaves before."""
    leaving = asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait((future, leaving), return_when=asyncio.FIRST_COMPLETED)
        return future.result() if future.done() else None
    finally:
        leaving.cancel()


class Arrivals:
    """Who waits for which container, by its ID."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[Arrival]] = {}

    @contextmanager
    def expect(self, container_id: str) -> Iterator[Arrival]:
        """A client waits from now on. However this ends, no start waits for it any more."""
        arrival = Arrival()
        self._waiting.setdefault(container_id, set()).add(arrival)
        try:
            yield arrival
        finally:
            arrival.joined.set()
            waiting = self._waiting[container_id]
            waiting.discard(arrival)
            if not waiting:
                del self._waiting[container_id]

    async def admit(self, container_id: str) -> None:
        """Let all that wait join, before the process goes on."""
        waiting = list(self._waiting.get(container_id, ()))
        if not waiting:
            return
        for arrival in waiting:
            if not arrival.admitted.done():
                arrival.admitted.set_result(True)
        try:
            async with asyncio.timeout(JOIN_SECONDS):
                for arrival in waiting:
                    await arrival.joined.wait()
        except TimeoutError:
            log.warning(
                "container %s starts without a client that does not join it within %g s", container_id, JOIN_SECONDS
            )

    def start(self, container_id: str) -> None:
        """It runs."""
        for arrival in self._waiting.get(container_id, ()):
            arrival.tell(True)

    def dismiss(self, container_id: str) -> None:
        """It does not start, or not any more."""
        for arrival in self._waiting.get(container_id, ()):
            arrival.tell(False)
