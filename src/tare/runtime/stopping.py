"""StopContainer: the stop signal once, a grace, then SIGKILL.

Callers of one container share its grace: a later one with a shorter timeout shortens it, none sends the signal again, and it
goes on when they leave. A daemon that is killed meanwhile forgets it: whoever asked asks again, and the next one begins anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from tare.runtime.exits import Watchers, process_of
from tare.runtime.ports import Handler
from tare.runtime.records import ContainerState
from tare.runtime.store import Store
from tare.state.operations import Operation, Operations, Step

log = logging.getLogger(__name__)


class Purposes:
    """Who is told of pods that somebody stops or removes, or stops a container in: before it happens, by the pod's ID."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[str], None]] = []

    def tell(self, pod_id: str) -> None:
        """Somebody is about to."""
        for listener in self.listeners:
            listener(pod_id)


@dataclass(slots=True, kw_only=True)
class Stop:
    """A container that is being stopped: how long it has until it is killed, on the event loop's clock. `bound` is there while it is waited for.

    Without `signal` (the number) it is killed at once.
    """

    container: str
    handler: Handler
    store: Store
    watchers: Watchers
    signal: int | None
    until: float
    bound: asyncio.Timeout | None = None
    task: asyncio.Task[None] | None = None


async def ask(stop: Stop) -> None:
    """The stop signal, if it still runs."""
    facts = stop.store.container_facts.get(stop.container)
    if stop.signal is not None and facts is not None:
        stop.handler.signal(process_of(facts.process), stop.signal)


async def end(stop: Stop) -> None:
    """Its end is on record: its own within the grace, else SIGKILL's."""
    try:
        async with asyncio.timeout_at(stop.until) as stop.bound:
            await stop.watchers.recorded(stop.container)
    except TimeoutError:
        stop.bound = None
        await stop.watchers.kill(stop.container, "stop")
    finally:
        stop.bound = None


STOP_CONTAINER: Operation[Stop] = Operation("StopContainer", (Step("signal", ask), Step("end", end)), ends=True)


class Stops:
    """The containers that are being stopped."""

    def __init__(self, store: Store, handler: Handler, watchers: Watchers, operations: Operations) -> None:
        self._store = store
        self._handler = handler
        self._watchers = watchers
        self._operations = operations
        self._stops: dict[str, Stop] = {}

    async def stop(self, container_id: str, timeout: float) -> None:
        """Until its end is on record. `timeout` in seconds; zero or less kills at once."""
        record = self._store.containers.get(container_id)
        facts = self._store.container_facts.get(container_id)
        if record is None or record.state is not ContainerState.RUNNING or facts is None:
            return
        until = asyncio.get_running_loop().time() + max(0.0, timeout)
        stop = self._stops.get(container_id)
        if stop is None:
            stop = self._stops[container_id] = Stop(
                container=container_id,
                handler=self._handler,
                store=self._store,
                watchers=self._watchers,
                signal=record.stop_signal if timeout > 0 else None,
                until=until,
            )
            stop.task = asyncio.ensure_future(self._stop(stop))
        elif until < stop.until:
            stop.until = until
            if stop.bound is not None:
                stop.bound.reschedule(until)
        assert stop.task is not None
        await asyncio.shield(stop.task)

    async def _stop(self, stop: Stop) -> None:
        try:
            await self._operations.run(STOP_CONTAINER, stop, {"container": stop.container})
        finally:
            del self._stops[stop.container]
