"""StopContainer: the stop signal once, a grace, then SIGKILL.

Callers of one container share its grace: a later one with a shorter timeout shortens it, none sends the signal again, and it
goes on when they leave.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from tare.runtime.exits import Watchers, process_of
from tare.runtime.ports import Handler
from tare.runtime.records import ContainerState
from tare.runtime.store import Store

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Grace:
    """How long a container has until it is killed, on the event loop's clock. `bound` is there while it is waited for."""

    until: float
    bound: asyncio.Timeout | None = None
    task: asyncio.Task[None] | None = None


class Stops:
    """The containers that are being stopped."""

    def __init__(self, store: Store, handler: Handler, watchers: Watchers) -> None:
        self._store = store
        self._handler = handler
        self._watchers = watchers
        self._graces: dict[str, _Grace] = {}

    async def stop(self, container_id: str, timeout: float) -> None:
        """Until its end is on record. `timeout` in seconds; zero or less kills at once."""
        record = self._store.containers.get(container_id)
        facts = self._store.container_facts.get(container_id)
        if record is None or record.state is not ContainerState.RUNNING or facts is None:
            return
        until = asyncio.get_running_loop().time() + max(0.0, timeout)
        grace = self._graces.get(container_id)
        if grace is None:
            grace = self._graces[container_id] = _Grace(until)
            if timeout > 0:
                self._handler.signal(process_of(facts.process), record.stop_signal)
            grace.task = asyncio.ensure_future(self._end(container_id, grace))
        elif until < grace.until:
            grace.until = until
            if grace.bound is not None:
                grace.bound.reschedule(until)
        assert grace.task is not None
        await asyncio.shield(grace.task)

    async def _end(self, container_id: str, grace: _Grace) -> None:
        try:
            async with asyncio.timeout_at(grace.until) as grace.bound:
                await self._watchers.recorded(container_id)
        except TimeoutError:
            grace.bound = None
            await self._watchers.kill(container_id, "stop")
        finally:
            grace.bound = None
            del self._graces[container_id]
