"""How containers end: each running one is waited for, and its end is put on record once everything it wrote is in its log.

    main process ended ─► (PID namespace not its own: the rest of its cgroup is killed) ─► streams drained, bounded
        ─► OOM kills read ─► EXITED on record ─► cgroup, logger's share, exit record and facts go

Facts go last: a container that is EXITED and still has facts was being cleaned up when the daemon died, and is again. What fails
on the way is logged and does not keep the end from being recorded; RemoveContainer tries again.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace

from tare import subject
from tare.errors import DeadlineExceeded, describe
from tare.handlers.builtin import ExitRecord, Process
from tare.runtime import lifecycle
from tare.runtime.bounds import deadline
from tare.runtime.ports import Cgroups, Handler, Logs
from tare.runtime.records import ContainerRecord, ContainerState, ProcessFact
from tare.runtime.store import ContainerFacts, Store

log = logging.getLogger(__name__)

DRAIN_SECONDS = 5.0
KILL_SECONDS = 30.0
RETRY_SECONDS, RETRY_LIMIT = 0.5, 30.0
SIGKILL = 9
UNKNOWN_CODE = 255


def reason_of(code: int, oom_kills: int, known: bool) -> str:
    """CRI's reason for an end: an OOM kill in the container's group explains every end but a good one."""
    if not known:
        return "Unknown"
    if code == 0:
        return "Completed"
    return "OOMKilled" if oom_kills else "Error"


def ended(record: ContainerRecord, end: ExitRecord, oom_kills: int) -> ContainerRecord:
    """The container after its main process has ended."""
    state = lifecycle.container_after(record.state, lifecycle.ContainerEvent.EXIT, record.id)
    assert state is not None
    return replace(
        record,
        state=state,
        finished_at=end.finished_at if end.known else time.time_ns(),
        exit_code=end.code if end.known else UNKNOWN_CODE,
        reason=reason_of(end.code, oom_kills, end.known),
        message="" if end.known else "its exit code was lost with the processes that waited for it",
    )


def lost(record: ContainerRecord, message: str) -> ContainerRecord:
    """The container after its processes went with nobody to see how it ended."""
    state = lifecycle.container_after(record.state, lifecycle.ContainerEvent.LOST, record.id)
    assert state is not None
    return replace(
        record, state=state, finished_at=time.time_ns(), exit_code=UNKNOWN_CODE, reason="Unknown", message=message
    )


def process_of(fact: ProcessFact) -> Process:
    """A process on record as the handler knows it."""
    return Process(fact.pid, fact.start_time)


@dataclass(slots=True)
class _Watch:
    recorded: asyncio.Event = field(default_factory=asyncio.Event)
    cleaned: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Watchers:
    """Waits for the ends of containers, and of the processes that hold pods' PID namespaces."""

    def __init__(self, store: Store, handler: Handler, cgroups: Cgroups, logs: Logs) -> None:
        self._store = store
        self._handler = handler
        self._cgroups = cgroups
        self._logs = logs
        self._watches: dict[str, _Watch] = {}
        self._pods: dict[str, asyncio.Task[None]] = {}
        self.on_end: Callable[[ContainerRecord], None] | None = None  # told of each whose end is on record

    def watch(self, container_id: str) -> None:
        """From now on. The container RUNS, or is EXITED with facts left to clean up."""
        watch = self._watches[container_id] = _Watch()
        # In a context of its own: its end is no part of the call that started it.
        loop, context = asyncio.get_running_loop(), contextvars.Context()
        watch.task = loop.create_task(self._follow(container_id, watch), context=context)
        try:
            self._cgroups.watch(self._store.container_facts[container_id].cgroup)
        except OSError as error:  # no descriptors, a full disk: its end matters more than what it died of
            log.warning("container %s: watch for OOM kills: %s", container_id, describe(error))

    def watch_pod(self, pod_id: str, pause: Process) -> None:
        """From now on: a pod whose PID namespace ends is not ready any more."""
        self._pods[pod_id] = asyncio.ensure_future(self._follow_pod(pod_id, pause))

    def unwatch_pod(self, pod_id: str) -> None:
        """Its PID namespace is about to be ended on purpose."""
        task = self._pods.pop(pod_id, None)
        if task is not None:
            task.cancel()

    async def recorded(self, container_id: str) -> None:
        """Until the container's end is on record; at once where it does not run."""
        watch = self._watches.get(container_id)
        if watch is not None:
            await watch.recorded.wait()

    async def kill(self, container_id: str, doing: str) -> None:
        """End a container by SIGKILL, if it runs, and wait until nothing of its run is left. Raises DeadlineExceeded, naming what lives on."""
        facts = self._store.container_facts.get(container_id)
        watch = self._watches.get(container_id)
        if watch is None or facts is None:
            return
        try:
            async with deadline(KILL_SECONDS, f"{doing}: kill container {container_id}"):
                if not watch.recorded.is_set():
                    self._handler.signal(process_of(facts.process), SIGKILL)
                    await self._cgroups.kill(facts.cgroup)
                await watch.cleaned.wait()
        except DeadlineExceeded as error:
            alive = self._cgroups.processes(facts.cgroup)
            hint = (
                f"processes {', '.join(map(str, alive))} do not end: what does the kernel wait for?" if alive else None
            )
            raise DeadlineExceeded(error.doing, step=error.step, cause=error.cause, hint=hint) from error

    async def _follow(self, container_id: str, watch: _Watch) -> None:
        """See a container to its end. What goes wrong on the way (a full disk, no descriptors) is tried again until it does not."""
        record = self._store.containers.get(container_id)
        subject.bind(container=container_id, pod=record.pod_id if record is not None else "")
        pause = RETRY_SECONDS
        while not watch.cleaned.is_set():
            try:
                await self._see_to_its_end(container_id, watch)
            except Exception:
                log.exception("container %s: its end could not be recorded, tried again in %g s", container_id, pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, RETRY_LIMIT)

    async def _see_to_its_end(self, container_id: str, watch: _Watch) -> None:
        facts = self._store.container_facts[container_id]
        end = await self._handler.wait(process_of(facts.process))
        record = self._store.containers.get(container_id)
        if record is not None and record.state is ContainerState.RUNNING:
            await self._record(record, facts, end)
        watch.recorded.set()
        await self._clean(container_id, facts)
        watch.cleaned.set()
        self._watches.pop(container_id, None)

    async def _record(self, record: ContainerRecord, facts: ContainerFacts, end: ExitRecord) -> None:
        if not facts.owns_pid_namespace:
            await self._try(record.id, "kill what its main process left", self._cgroups.kill(facts.cgroup))
        await self._try(record.id, "drain its output", self._drain(facts.group, record.id))
        oom_kills = self._cgroups.oom_kills(facts.cgroup)
        current = self._store.containers.get(record.id, record)
        after = ended(current, end, oom_kills)
        self._store.put_container(after)
        if self.on_end is not None:
            self.on_end(after)
        log.info("container %s exited: code %d, %s", record.id, after.exit_code, after.reason)

    async def _drain(self, group: str, container_id: str) -> None:
        if not await self._logs.drain(group, container_id, DRAIN_SECONDS):
            log.warning("container %s: its output was not all logged within %g s", container_id, DRAIN_SECONDS)

    async def _clean(self, container_id: str, facts: ContainerFacts) -> None:
        await self._try(container_id, "take away what its handler keeps", self._handler.release(container_id))
        await self._try(container_id, "remove its cgroup", self._cgroups.remove(facts.cgroup))
        await self._try(container_id, "leave its logger", self._logs.remove(facts.group, container_id))
        self._handler.forget(process_of(facts.process))
        self._store.drop_container_facts(container_id)

    async def _try(self, container_id: str, doing: str, effect: Awaitable[None]) -> None:
        try:
            await effect
        except Exception as error:  # noqa: BLE001 - the end has to be recorded whatever else fails
            log.warning("container %s: %s: %s", container_id, doing, describe(error))

    async def _follow_pod(self, pod_id: str, pause: Process) -> None:
        await self._handler.wait(pause)
        self._handler.forget(pause)
        self._pods.pop(pod_id, None)
        pod = self._store.pods.get(pod_id)
        if pod is None:
            return
        state = lifecycle.pod_after(pod.state, lifecycle.PodEvent.LOST, pod_id)
        if state is not None and state is not pod.state:
            log.warning("pod %s: its PID namespace has ended", pod_id)
            self._store.put_pod(replace(pod, state=state))
