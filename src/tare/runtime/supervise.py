"""Containers of `tare run` that are started again when they end, and whose health is looked at: the daemon's part.

    store ─► it runs ─────► on record here; its health is looked at
             it ended ────► (the policy says so) a wait ─► the next attempt, in the same pod ─► old attempts tidied away
             its pod is gone with a reboot ─► the same pod anew, then the next attempt
    a stop that somebody asks for ends it all, until something is started in the pod again

Attempts are containers of their own, as a kubelet makes them, each with its log file; of those that have ended the last few are kept.
A kubelet's pods are no business of this (`supervise_policy.ours`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from tare.errors import FailedPrecondition, TareError, describe
from tare.runtime import health, renewing
from tare.runtime import supervise_policy as policy
from tare.runtime.events import Kind
from tare.runtime.records import ContainerConfig, ContainerRecord, ContainerState, PodConfig, PodRecord, PodState
from tare.runtime.stopping import Purposes
from tare.runtime.store import Store
from tare.runtime.supervise_policy import Supervised
from tare.state.database import Database

log = logging.getLogger(__name__)
KEPT = 3  # attempts that have ended, of one pod
KEPT_LOGS = 10
STOP_SECONDS = 10.0
OURS: ContextVar[bool] = ContextVar("ours", default=False)  # what is stopped or removed is so by the supervisor itself


class Runtime(renewing.Containers, Protocol):
    """What is done with pods and containers. `stopping` tells of the pods that somebody stops."""

    stopping: Purposes

    async def run_pod(self, config: PodConfig, handler: str) -> str:
        """Its ID."""

    async def remove_pod(self, pod_id: str) -> None:
        """It is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One pod for who asks; `state` is "running", "waiting" or "ended", `next_start` ns since the epoch while it waits."""

    pod_id: str
    row: Supervised
    state: str
    next_start: int
    probes: tuple[health.Probe, ...]


Execute = Callable[[str, tuple[str, ...], float], Awaitable[tuple[int, bytes]]]
ReadConfig = Callable[[str], Awaitable[health.Check]]


class Supervisor:
    """`execute` runs a command in a container: (exit code, output); `check_of` is what an image says of health."""

    def __init__(self, runtime: Runtime, store: Store, state: Database, execute: Execute, check_of: ReadConfig) -> None:
        self._runtime = runtime
        self._store = store
        self._execute = execute
        self._check_of = check_of
        self._table = state.table("supervision", Supervised)
        self._rows = dict(self._table.items())
        self._waits: dict[str, int] = {}
        self._restarts: dict[str, asyncio.Task[None]] = {}
        self._moved: dict[str, str] = {}
        self._due: dict[str, float] = {}
        self._monitors: dict[str, tuple[health.Monitor | None, asyncio.Task[None]]] = {}
        self._stopped_meanwhile: set[str] = set()
        self._live = False
        store.listeners.append(self._told)
        runtime.stopping.listeners.append(self._stopped)

    # Looking

    def views(self) -> Iterator[View]:
        """All pods that have a policy, or whose health is looked at."""
        for pod_id, row in self._rows.items():
            monitor = self._monitors.get(pod_id, (None, None))[0]
            record = self._store.containers.get(row.container_id)
            runs = record is not None and record.state is ContainerState.RUNNING
            yield View(
                pod_id=pod_id,
                row=row,
                state="running" if runs else "waiting" if pod_id in self._restarts else "ended",
                next_start=self._waits.get(pod_id, 0),
                probes=tuple(monitor.probes) if monitor is not None else (),
            )

    # What happens

    def recover(self) -> None:
        """Once, when the records are what is so: what was to run is started, as far as the policies say so."""
        self._live = True
        for pod_id, row in list(self._rows.items()):
            if pod_id not in self._store.pods and row.revival is None:
                self._drop(pod_id)
        for pod in list(self._store.pods.values()):
            record = self._newest(pod)
            if record is not None and record.state is ContainerState.RUNNING:
                self._runs(pod, record, self._rows.get(pod.id))
        for pod_id, row in list(self._rows.items()):
            record = self._store.containers.get(row.container_id)
            if record is not None and record.state is ContainerState.RUNNING:
                continue
            code = record.exit_code if record is not None else 255
            if row.revival is not None or policy.wants_start(row, code, new_daemon=True):
                self._put(pod_id, replace(row, stopped=False))
                self._later(pod_id, 0.0 if record is None else row.delay)

    def _newest(self, pod: PodRecord) -> ContainerRecord | None:
        """The container that is the pod's now, if the pod is ours and there is one."""
        records = self._store.view(pod).containers if policy.ours(pod.config) else ()
        return max(records, key=lambda record: record.config.metadata.attempt, default=None)

    def _told(self, kind: Kind, thing: str, pod: PodRecord) -> None:
        """By the store, of everything."""
        if not policy.ours(pod.config):
            return
        if kind is Kind.DELETED and thing == pod.id:
            row = self._rows.get(pod.id)
            if row is not None and row.revival is None:
                self._drop(pod.id)
            return
        record = self._store.containers.get(thing)
        if record is None or not self._live:
            return
        if kind is Kind.STARTED:
            self._runs(pod, record, policy.started(self._rows.get(pod.id), record))
        elif kind is Kind.STOPPED and record.started_at:
            self._ended(pod, record)

    def _runs(self, pod: PodRecord, record: ContainerRecord, row: Supervised | None) -> None:
        row = row or policy.started(None, record)
        if pod.id in self._rows or policy.parse(row.policy).kind is not policy.Kind.NO:
            self._put(pod.id, row)
        self._end_monitor(pod.id)
        task = asyncio.ensure_future(self._look_after(pod.id, record, row))
        task.add_done_callback(partial(told_of, f"look after the health of container {record.id}"))
        self._monitors[pod.id] = (None, task)

    def _ended(self, pod: PodRecord, record: ContainerRecord) -> None:
        self._end_monitor(pod.id)
        row = self._rows.get(pod.id)
        if (
            row is None
            or row.container_id != record.id
            or not policy.wants_start(row, record.exit_code, new_daemon=False)
        ):
            return
        row = policy.next_wait(row, policy.lasted(record))
        self._put(pod.id, row)
        self._later(pod.id, row.delay)

    def _stopped(self, pod_id: str) -> None:
        """Somebody stops the pod or its container."""
        row = self._rows.get(pod_id)
        if row is None or OURS.get():
            return
        self._put(pod_id, replace(row, stopped=True, revival=None))
        self._waits.pop(pod_id, None)
        self._due.pop(pod_id, None)
        task = self._restarts.pop(pod_id, None)
        if task is not None:
            self._stopped_meanwhile.add(pod_id)
            task.cancel()

    # Starting again

    def _later(self, pod_id: str, seconds: float) -> None:
        if not self._live:
            return
        if pod_id in self._restarts:  # it has ended again before what started it was done
            self._due[pod_id] = seconds
            return
        self._waits[pod_id] = time.time_ns() + int(seconds * 1e9)
        task = self._restarts[pod_id] = asyncio.ensure_future(self._restart(pod_id, seconds))
        task.add_done_callback(partial(self._done, pod_id))

    def _done(self, pod_id: str, task: asyncio.Task[None]) -> None:
        if self._restarts.get(pod_id) is task:
            del self._restarts[pod_id]
            self._waits.pop(pod_id, None)
            if pod_id in self._due:
                self._later(pod_id, self._due.pop(pod_id))
        told_of(f"supervise pod {pod_id}", task)

    async def _restart(self, pod_id: str, seconds: float) -> None:
        """Until it runs again, or is not to any more."""
        while True:
            await asyncio.sleep(seconds)
            self._waits.pop(pod_id, None)
            row = self._rows.get(pod_id)
            if row is None or row.stopped:
                return
            try:
                await asyncio.shield(asyncio.ensure_future(self._attempt(pod_id, row)))
                return
            except (TareError, OSError) as error:
                log.warning("pod %s: its container could not be started again: %s", pod_id, describe(error))
            pod_id = self._moved.pop(pod_id, pod_id)
            row = self._rows.get(pod_id)
            if row is None or not policy.wants_start(row, 128, new_daemon=False):
                return
            row = policy.next_wait(row, 0.0)
            self._put(pod_id, row)
            seconds = row.delay
            self._waits[pod_id] = time.time_ns() + int(seconds * 1e9)

    async def _attempt(self, pod_id: str, row: Supervised) -> None:
        """The next attempt, past its start. Raises what creating and starting raise."""
        OURS.set(True)
        self._stopped_meanwhile.discard(pod_id)
        pod = self._store.pods.get(pod_id)
        if pod is None or pod.state is not PodState.READY:
            await self._revive(pod_id, row)
            return
        record = self._newest(pod)
        if record is None:
            if row.revival is not None:
                await self._start(pod_id, pod.config, row.revival.container)
            return
        if record.state is ContainerState.CREATED:  # a daemon before this one has come so far
            await self._runtime.start_container(record.id)
        elif record.state is ContainerState.EXITED:
            config = next_attempt(self._runtime, record)
            await self._start(pod_id, pod.config, config)
        try:
            await self._tidy(pod_id)
        except (TareError, OSError) as error:  # it runs: what is left over is tidied away after the next attempt
            log.warning("pod %s: old attempts stay for now: %s", pod_id, describe(error))

    async def _start(self, pod_id: str, pod: PodConfig, config: ContainerConfig) -> None:
        container = await self._runtime.create_container(pod_id, config, pod)
        try:
            if pod_id in self._stopped_meanwhile:
                raise FailedPrecondition(f"start container {container}", cause="its pod was stopped meanwhile")
            await self._runtime.start_container(container)
        except (TareError, OSError):
            await self._runtime.remove_container(container)
            raise
        row = self._rows.get(pod_id)
        if pod_id in self._stopped_meanwhile and row is not None:
            self._put(pod_id, replace(row, stopped=True))
            await self._runtime.stop_container(container, STOP_SECONDS)

    async def _revive(self, pod_id: str, row: Supervised) -> None:
        """The pod anew. What it is made of is on record before the old one goes, so that a daemon that dies in between costs nothing."""
        pod = self._store.pods.get(pod_id)
        revival = row.revival
        if revival is None:
            record = self._newest(pod) if pod is not None else None
            if pod is None or record is None:
                self._drop(pod_id)
                return
            revival = policy.revival_of(pod, next_attempt(self._runtime, record), record.image_id)
            self._put(pod_id, replace(row, revival=revival))
        if pod is not None:
            await self._runtime.remove_pod(pod_id)
        # A daemon before this one may have come as far as to make the new one.
        new = self._store.holder(revival.pod.metadata.key)
        new = new or await self._runtime.run_pod(revival.pod, revival.handler)
        self._put(new, replace(row, container_id="", revival=revival))
        self._move(pod_id, new)
        await self._start(new, revival.pod, revival.container)

    def _move(self, old: str, new: str) -> None:
        """The work on a pod goes on under another's name."""
        task = self._restarts.pop(old, None)
        if task is not None:
            self._restarts[new] = task
            self._moved[old] = new
            task.add_done_callback(partial(self._done, new))
        self._drop(old)

    async def _tidy(self, pod_id: str) -> None:
        """Of the attempts that have ended the last few stay, and some more of the logs."""
        pod = self._store.pods.get(pod_id)
        if pod is None:
            return
        records = [record for record in self._store.view(pod).containers if record.state is ContainerState.EXITED]
        records.sort(key=lambda record: record.config.metadata.attempt)
        for record in records[:-KEPT]:
            await self._runtime.remove_container(record.id)
        newest = self._newest(pod)
        if newest is not None and newest.log_path:
            oldest = newest.config.metadata.attempt - KEPT_LOGS
            await asyncio.to_thread(drop_log, Path(newest.log_path).parent, oldest)

    # Health

    async def _look_after(self, pod_id: str, record: ContainerRecord, row: Supervised) -> None:
        check = await self._check(record)
        if not check.command:
            self._forget_health(pod_id)
            return
        self._put(pod_id, self._rows.get(pod_id, row))  # somebody may have stopped it meanwhile

        def changed(status: str, streak: int) -> None:
            current = self._rows.get(pod_id)
            if current is not None and current.container_id == record.id:
                self._put(pod_id, replace(current, health=status, streak=streak))

        age = max(0.0, (time.time_ns() - record.started_at) / 1e9)
        run = partial(self._execute, record.id)
        monitor = health.Monitor(check, run, changed, status=row.health, streak=row.streak, running_for=age)
        task = asyncio.current_task()
        assert task is not None
        self._monitors[pod_id] = (monitor, task)
        await monitor.watch()

    async def _check(self, record: ContainerRecord) -> health.Check:
        """What is looked at: what `tare run` says, then what the image says."""
        try:
            own = health.decode(record.config.annotations.get(health.ANNOTATION, "{}"))
        except ValueError as error:
            log.warning("container %s: its health is not looked at: %s", record.id, error)
            return health.Check()
        if own.test == (health.NONE,):
            return own
        try:
            return health.merged(own, await self._check_of(record.image_id))
        except (TareError, OSError, ValueError) as error:
            log.warning("container %s: what its image says of health: %s", record.id, describe(error))
            return health.merged(own)

    def _forget_health(self, pod_id: str) -> None:
        row = self._rows.get(pod_id)
        if row is None:
            return
        if policy.parse(row.policy).kind is policy.Kind.NO:
            self._drop(pod_id)
        elif row.health:
            self._put(pod_id, replace(row, health="", streak=0))

    def _end_monitor(self, pod_id: str) -> None:
        found = self._monitors.pop(pod_id, None)
        if found is not None and found[1] is not asyncio.current_task():
            found[1].cancel()

    # The table

    def _put(self, pod_id: str, row: Supervised) -> None:
        """What is known counts for this daemon also where it cannot be written down."""
        if self._rows.get(pod_id) != row:
            self._rows[pod_id] = row
            try:
                self._table.put(pod_id, row)
            except TareError as error:
                log.warning("supervise pod %s: %s", pod_id, describe(error))

    def _drop(self, pod_id: str) -> None:
        self._end_monitor(pod_id)
        if self._rows.pop(pod_id, None) is not None:
            try:
                self._table.delete(pod_id)
            except TareError as error:  # the next daemon finds that there is no such pod
                log.warning("supervise pod %s: %s", pod_id, describe(error))

    async def close(self) -> None:
        """Nothing is started any more; the next daemon goes on."""
        self._live = False
        tasks = [*self._restarts.values(), *(task for _, task in self._monitors.values())]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def told_of(doing: str, task: asyncio.Task[None]) -> None:
    """Log what a task that nobody waits for has failed with."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s", doing, exc_info=error)


def next_attempt(runtime: renewing.Containers, record: ContainerRecord) -> ContainerConfig:
    """The container's configuration, of the same image, one attempt later, with a log of its own."""
    config = renewing.again(runtime, record, record.image_id)
    log_path = policy.log_name(config.metadata.attempt) if record.config.log_path else ""
    return replace(config, log_path=log_path)


def drop_log(directory: Path, oldest: int) -> None:
    """The log files of attempts before `oldest`."""
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            stem, _, end = name.partition(".")
            if end == "log" and stem.isdecimal() and int(stem) < oldest:
                (directory / name).unlink(missing_ok=True)
