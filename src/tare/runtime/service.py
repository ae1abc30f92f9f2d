"""Pods and containers as CRI asks for them: finds what a call is about, keeps operations on one thing apart, and runs them.

What an operation does is in `pods`, `creating` and `containers`; here is who may do it, when, and who is waited for:

- one operation at a time on a pod and on a container (`locks`); a pod that is being stopped refuses new containers and starts,
  waits for those under way, and then ends its containers without asking them;
- RunPodSandbox, CreateContainer and StartContainer go on when their caller leaves, and are joined by the next (`joining`);
- reads never wait.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from tare import subject
from tare.errors import AlreadyExists, FailedPrecondition, TareError, Unavailable, describe
from tare.handlers.builtin import Process
from tare.runtime import containers, creating, exec, info, lifecycle, plugins, pods, strays, updating
from tare.runtime.abilities import Abilities, check_handler
from tare.runtime.bounds import deadline
from tare.runtime.checkpointing import Checkpointing
from tare.runtime.containers import LOGGER_SECONDS
from tare.runtime.events import Event
from tare.runtime.exits import Watchers
from tare.runtime.joining import Joining, no_effect, nothing_to_discard
from tare.runtime.lifecycle import ContainerEvent, PodEvent
from tare.runtime.locks import Locks
from tare.runtime.plugins import Moment
from tare.runtime.ports import Cgroups, Parts
from tare.runtime.records import ContainerConfig, ContainerRecord, PodConfig, PodRecord, PodState, Resources
from tare.runtime.stats import Stats
from tare.runtime.stopping import Purposes, Stops
from tare.runtime.store import PodView, container_key

log = logging.getLogger(__name__)
BUILTIN = "builtin"
SWEEP_SECONDS = 2.0  # until there is a new launcher for one that was lost


def new_id() -> str:
    """64 lowercase hex digits."""
    return os.urandom(32).hex()


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """CRI RuntimeCondition."""

    type: str
    status: bool
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerInfo:
    """CRI RuntimeHandler, with what it can do."""

    name: str
    recursive_read_only: bool
    user_namespaces: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """CRI RuntimeFeatures."""

    supplemental_groups_policy: bool
    user_namespaces_host_network: bool
    mount_options: bool


class Warmth:
    """Keeps the kernel ready for a process to join a cgroup v1 group when a start is near: else that waits some milliseconds."""

    LASTS = 0.008  # seconds

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups
        self._needed = True
        self._renewed = 0.0

    def renew(self) -> None:
        """In a thread, if it was not done a moment ago."""
        loop = asyncio.get_running_loop()
        if self._needed and loop.time() - self._renewed > self.LASTS:
            self._renewed = loop.time()
            loop.run_in_executor(None, self._warm)

    def _warm(self) -> None:
        self._needed = self._cgroups.warm()


class Runtime:
    """The runtime port of the CRI face."""

    def __init__(self, parts: Parts, watchers: Watchers) -> None:
        self.parts = parts
        self.stats = Stats(parts)
        self.checkpoints = Checkpointing(self)
        self.abilities = Abilities()
        self._store = parts.store
        self._watchers = watchers
        self._stops = Stops(parts.store, parts.handler, watchers, parts.operations)
        self.locks = self._locks = Locks()
        self._closing: set[str] = set()
        self.stopping = Purposes()
        self._warmth = Warmth(parts.cgroups)
        self._exec_numbers = itertools.count(1)
        self.execs: set[Process] = set()
        self._sweep: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()  # of limits, while plugins may want those of other containers changed
        parts.handler.on_lost(self._sweep_soon)
        watchers.on_end = partial(plugins.ended, parts)
        self.runs: Joining[str] = Joining("run pod", claimed=parts.store.claim, discard=self.remove_pod)
        self.creations: Joining[str] = Joining(
            "create container", claimed=parts.store.claim, discard=self.remove_container
        )
        self.starts: Joining[str] = Joining("start container", claimed=no_effect, discard=nothing_to_discard)

    # Pods

    async def run_pod(self, config: PodConfig, handler: str, pod_id: str = "") -> str:
        """A new pod's ID (one that is given, else any). Raises AlreadyExists, InvalidArgument, FailedPrecondition, and what its steps raise."""
        self.abilities.check_pod(config)
        if handler not in ("", BUILTIN):
            await self.parts.handler.look()
        handler = self.parts.handler.choose(handler, config)
        name = config.metadata.key
        self._refuse_taken(self.runs, name, "run pod")
        pod_id = pod_id or new_id()
        return await self.runs.run(name, (config, handler), pod_id, lambda: self._run_pod(pod_id, config, handler))

    async def _run_pod(self, pod_id: str, config: PodConfig, handler: str) -> str:
        name = config.metadata.key
        subject.bind(pod=pod_id)
        self._store.reserve_pod(name, pod_id)
        try:
            async with self._locks.hold(pod_id, f"run pod {pod_id}"):
                run = pods.begin(self.parts, pod_id, config, handler)
                await self.parts.operations.run(pods.RUN_POD, run, run.names)
                if run.namespaces is not None and run.namespaces.pause is not None:
                    self._watchers.watch_pod(pod_id, run.namespaces.pause)
        finally:
            self.parts.plugins.made(pod_id)
            self._store.release_pod(name, pod_id)
        log.info("pod %s runs: %s/%s", pod_id, config.metadata.namespace, config.metadata.name)
        return pod_id

    def _refuse_taken(self, calls: Joining[str], name: str, doing: str) -> None:
        holder = self._store.holder(name)
        if holder is not None and not calls.known(name):
            raise AlreadyExists(f"{doing} {name}", cause=f"the name is held by {holder}")

    async def stop_pod(self, pod_id: str) -> None:
        """It is NOTREADY, and nothing runs in it. Nothing happens where it is unknown or stopped."""
        pod = self._store.find_pod(pod_id, "stop")
        if pod is None:
            return
        self.runs.used(pod.config.metadata.key)
        self.stopping.tell(pod.id)
        async with self._locks.hold(pod.id, f"stop pod {pod.id}"):
            await self._stop_pod(pod.id)

    async def _stop_pod(self, pod_id: str) -> None:
        pod = self._store.pods.get(pod_id)
        if pod is None or (pod.state is PodState.NOTREADY and pod_id not in self._store.pod_facts):
            return
        self._closing.add(pod_id)
        try:
            await self._settle_members(pod_id, f"stop pod {pod_id}")
            ref = pods.PodRef(parts=self.parts, id=pod_id)
            await self.parts.operations.run(pods.STOP_POD, ref, ref.names)
        finally:
            self._closing.discard(pod_id)
        log.info("pod %s stopped", pod_id)

    async def _settle_members(self, pod_id: str, doing: str) -> None:
        """Wait for what is under way on the pod's containers; nothing new begins in a pod that is closing."""
        for member in self._store.members(pod_id):
            async with self._locks.hold(member, doing):
                continue

    async def remove_pod(self, pod_id: str) -> None:
        """It is stopped and emptied first. Nothing happens where it is unknown."""
        pod = self._store.find_pod(pod_id, "remove")
        if pod is None:
            return
        self.runs.used(pod.config.metadata.key)
        self.stopping.tell(pod.id)
        async with self._locks.hold(pod.id, f"remove pod {pod.id}"):
            await self._stop_pod(pod.id)
            await self._settle_members(pod.id, f"remove pod {pod.id}")
            for member in self._store.members(pod.id):
                await self.remove_container(member)
            subject.bind(container="")  # the last one's
            if pod.id not in self._store.pods:
                return
            lifecycle.pod_after(self._store.pods[pod.id].state, PodEvent.REMOVE, pod.id)
            ref = pods.PodRef(parts=self.parts, id=pod.id)
            await self.parts.operations.run(pods.REMOVE_POD, ref, ref.names)
            await plugins.tell_pod(self.parts, Moment.REMOVE_POD, pod)
        log.info("pod %s removed", pod.id)

    def pod_status(self, pod_id: str) -> PodView:
        """Raises NotFound."""
        return self._store.view(self._store.pod(pod_id, "look at"))

    def list_pods(self) -> Sequence[PodRecord]:
        """All, newest first."""
        return sorted(self._store.pods.values(), key=lambda pod: pod.created_at, reverse=True)

    async def update_pod(self, pod_id: str, wanted: Resources, overhead: Resources | None) -> None:
        """These limits hold, all or none. Raises NotFound, FailedPrecondition, InvalidArgument."""
        pod = self._store.pod(pod_id, "update")
        self.runs.used(pod.config.metadata.key)
        async with self._locks.hold(pod.id, f"update pod {pod.id}"):
            update = updating.pod_update(self.parts, self._store.pod(pod.id, "update"), wanted, overhead)
            await plugins.ask_pod(self.parts, Moment.UPDATE_POD, pod, wanted, overhead)
            await self.parts.operations.run(updating.UPDATE_POD, update, update.names)
            await plugins.tell_pod(self.parts, Moment.POD_UPDATED, self._store.pods.get(pod.id))
        log.info("pod %s: limits updated", pod.id)

    # Containers

    async def create_container(self, pod_id: str, config: ContainerConfig, pod_config: PodConfig) -> str:
        """A new container's ID. Raises NotFound, AlreadyExists, FailedPrecondition, InvalidArgument, UnknownError."""
        self.abilities.check_container(config)
        pod = self._store.pod(pod_id, "create a container in")
        check_handler(config, pod.handler, self.parts.handler.abilities())
        self.runs.used(pod.config.metadata.key)
        name = container_key(pod.id, config.metadata)
        self._refuse_taken(self.creations, name, "create container")
        container_id = new_id()
        return await self.creations.run(
            name, config, container_id, lambda: self._create(container_id, pod.id, config, pod_config)
        )

    async def _create(self, container_id: str, pod_id: str, config: ContainerConfig, pod_config: PodConfig) -> str:
        name = container_key(pod_id, config.metadata)
        subject.bind(container=container_id, pod=pod_id)
        self._store.reserve_container(name, container_id, pod_id)
        self._warmth.renew()
        try:
            async with self._locks.hold(container_id, f"create container {container_id}"):
                pod = self._open_pod(pod_id, PodEvent.CREATE)
                creation = creating.begin(self.parts, container_id, pod, config, pod_config)
                await self.parts.operations.run(creating.CREATE_CONTAINER, creation, creation.names)
                await plugins.tell_container(self.parts, Moment.CREATED, container_id)
        finally:
            self.parts.plugins.made(container_id)
            self._store.let_layers_go(container_id)
            self._store.release_container(name, container_id, pod_id)
        log.info("container %s created in pod %s: %s", container_id, pod_id, config.metadata.name)
        return container_id

    def _open_pod(self, pod_id: str, event: PodEvent) -> PodRecord:
        """The pod, if this may happen in it now."""
        pod = self._store.pod(pod_id, event.value)
        lifecycle.pod_after(pod.state, event, pod_id)
        if pod_id in self._closing:
            raise FailedPrecondition(f"{event.value} pod {pod_id}", cause="it is being stopped")
        return pod

    async def start_container(self, container_id: str) -> None:
        """It RUNS. Raises NotFound, FailedPrecondition, StartFailed."""
        record = self._store.container(container_id, "start")
        subject.bind(container=record.id, pod=record.pod_id)
        self.creations.used(container_key(record.pod_id, record.config.metadata))
        await self.starts.run(record.id, None, record.id, lambda: self._start(record.id))

    async def _start(self, container_id: str) -> str:
        self._warmth.renew()
        async with self._locks.hold(container_id, f"start container {container_id}"):
            record = self._store.container(container_id, "start")
            lifecycle.container_after(record.state, ContainerEvent.START, record.id)
            self._open_pod(record.pod_id, PodEvent.START)
            start, operation = containers.begin(self.parts, record), containers.operation_of(self.parts, record)
            try:
                await self.parts.operations.run(operation, start, start.names)
            except Unavailable:
                self.parts.arrivals.dismiss(record.id)
                self._sweep_soon()  # a process of Tare's was lost, which says nothing of the container: it can be started again
                raise
            except Exception as error:
                await self._record_failure(record, error)
                raise
            if operation is containers.START_CONTAINER:
                self._watchers.watch(container_id)
            await plugins.tell_container(self.parts, Moment.STARTED, container_id)
        log.info("container %s runs in pod %s", container_id, record.pod_id)
        return container_id

    async def _record_failure(self, record: ContainerRecord, error: Exception) -> None:
        log.warning("container %s did not start: %s", record.id, describe(error))
        self.parts.arrivals.dismiss(record.id)
        try:
            await containers.record_failure(self.parts, record, error)
            plugins.ended(self.parts, self._store.containers[record.id])
        except (TareError, OSError) as second:
            log.warning("container %s: %s", record.id, describe(second))

    async def stop_container(self, container_id: str, timeout: float) -> None:
        """It does not run any more. `timeout` in seconds. Nothing happens where it is unknown or does not run."""
        record = self._store.find_container(container_id, "stop")
        if record is None:
            return
        self.stopping.tell(record.pod_id)
        subject.bind(container=record.id, pod=record.pod_id)
        self.creations.used(container_key(record.pod_id, record.config.metadata))
        async with self._locks.hold(record.id, f"stop container {record.id}"):
            pass  # a start under way comes first; the grace itself holds up nobody
        await self._stops.stop(record.id, timeout)

    async def remove_container(self, container_id: str) -> None:
        """It is killed first where it runs. Nothing happens where it is unknown."""
        record = self._store.find_container(container_id, "remove")
        if record is None:
            return
        subject.bind(container=record.id, pod=record.pod_id)
        self.creations.used(container_key(record.pod_id, record.config.metadata))
        async with self._locks.hold(record.id, f"remove container {record.id}"):
            if record.id not in self._store.containers:
                return
            ref = containers.removal(self.parts, record.id)
            told = plugins.removal(self.parts, self._store.containers[record.id])
            await self.parts.operations.run(containers.REMOVE_CONTAINER, ref, ref.names)
        await plugins.tell_removed(self.parts, told)  # with no lock: what they want of others may wait for theirs
        log.info("container %s removed", record.id)

    async def update_container(self, container_id: str, wanted: Resources) -> None:
        """These limits hold, all or none. Raises NotFound, FailedPrecondition, InvalidArgument."""
        record = self._store.container(container_id, "update")
        subject.bind(container=record.id, pod=record.pod_id)
        self.creations.used(container_key(record.pod_id, record.config.metadata))
        turn = self._changing if self.parts.plugins.active else nullcontext()
        async with turn, self._locks.hold(record.id, f"update container {record.id}"):
            record = self._store.container(record.id, "update")
            updating.container_update(self.parts, record, wanted)  # plugins are not asked of what will be refused
            await self._limit(record.id, await plugins.ask_limits(self.parts, record, wanted))
            await plugins.tell_container(self.parts, Moment.UPDATED, record.id)

    async def limit_container(self, container_id: str, wanted: Resources) -> None:
        """As `update_container`, for plugins, which are not asked."""
        async with self._locks.hold(container_id, f"update container {container_id}"):
            await self._limit(container_id, wanted)

    async def _limit(self, container_id: str, wanted: Resources) -> None:
        update = updating.container_update(self.parts, self._store.container(container_id, "update"), wanted)
        await self.parts.operations.run(updating.UPDATE_CONTAINER, update, update.names)
        log.info("container %s: limits updated", container_id)

    def list_containers(self) -> Sequence[ContainerRecord]:
        """All, newest first."""
        return sorted(self._store.containers.values(), key=lambda record: record.created_at, reverse=True)

    def container_status(self, container_id: str) -> ContainerRecord:
        """Raises NotFound."""
        return self._store.container(container_id, "look at")

    async def exec_sync(self, container_id: str, command: tuple[str, ...], timeout: float) -> exec.ExecResult:
        """Run a command to its end. Raises NotFound, FailedPrecondition, DeadlineExceeded, StartFailed."""
        record = self._running(container_id, ContainerEvent.EXEC)
        facts = self._store.container_facts[record.id]
        process = exec.process_in(self._store, record, command, tty=False)
        exec_id = f"{record.id}-{next(self._exec_numbers)}"
        parts = self.parts
        try:
            handler = self._store.pods[record.pod_id].handler
            return await exec.exec_sync(
                parts.handler, parts.cgroups, parts.operations, facts, self.execs, exec_id, process, timeout, handler
            )
        except Unavailable:
            self._sweep_soon()
            raise

    def _sweep_soon(self) -> None:
        """A process of Tare's was lost: what it was about to tell of is looked for once there is another."""
        if self._sweep is None or self._sweep.done():
            self._sweep = asyncio.ensure_future(self._sweep_in(SWEEP_SECONDS))

    async def _sweep_in(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        await self.sweep()

    async def sweep(self) -> None:
        """End what an earlier launcher has made and nobody waits for; let go of what statistics keep of things that are no more."""
        await self.stats.tidy()
        parts = self.parts
        await parts.handler.end_stray_commands(parts.handler.launcher_start_time())
        ours = strays.known(self._store) | self.execs | parts.handler.live_commands()
        left = strays.find(parts.run, ours, parts.handler.launcher_start_time())
        await strays.end(parts.run, parts.handler, left)

    async def reopen_log(self, container_id: str) -> None:
        """Raises NotFound, FailedPrecondition."""
        record = self._running(container_id, ContainerEvent.REOPEN_LOG)
        group = self._store.container_facts[record.id].group
        async with deadline(LOGGER_SECONDS, f"reopen the log of container {record.id}"):
            await self.parts.logs.reopen(group, record.id)

    def _running(self, container_id: str, event: ContainerEvent) -> ContainerRecord:
        record = self._store.container(container_id, event.value)
        subject.bind(container=record.id, pod=record.pod_id)
        lifecycle.container_after(record.state, event, record.id)
        return record

    # The node

    def waiting(self) -> int:
        """How many operations wait for another on the same pod or container."""
        return self._locks.waiting()

    def events(self) -> AsyncGenerator[Event]:
        """As `Journal.follow`."""
        return self._store.journal.follow()

    async def use_pod_ranges(self, ranges: Sequence[str]) -> None:
        """New pods get their addresses from these. Raises InvalidArgument, FailedPrecondition."""
        await self.parts.network.use_ranges(ranges)

    async def conditions(self) -> Sequence[Condition]:
        """RuntimeReady and NetworkReady, which a node needs to be ready; and what of it cannot be used."""
        await self.parts.handler.look()
        await self.parts.network.look()
        return (
            condition("RuntimeReady", "LauncherNotReady", await self.parts.handler.trouble()),
            condition("NetworkReady", "NetworkPluginNotReady", self.parts.network.status()),
            condition("CgroupControllersReady", "ControllersMissing", self.parts.cgroups.trouble()),
            condition("RuntimeHandlersReady", "HandlerNotUsable", self.parts.handler.missing()),
        )

    def handlers(self) -> Sequence[HandlerInfo]:
        """The built-in one, and those of the settings that can be used."""
        can = self.abilities
        builtin = HandlerInfo(
            name=BUILTIN,
            recursive_read_only=can.recursive_read_only is None,
            user_namespaces=can.user_namespaces is None,
        )
        others = (
            HandlerInfo(
                name=item.name,
                recursive_read_only=item.recursive_read_only and can.recursive_read_only is None,
                user_namespaces=item.user_namespaces,
            )
            for item in self.parts.handler.abilities()
        )
        return (builtin, *others)

    def default_handler(self) -> str:
        """As the settings have it."""
        return self.parts.config.default_handler

    def features(self) -> Features:
        """What holds for every handler."""
        mapped = self.abilities.user_namespaces is None
        return Features(supplemental_groups_policy=True, user_namespaces_host_network=mapped, mount_options=True)

    def node_info(self) -> Mapping[str, object]:
        """What a verbose status adds: why something cannot be done, and what is wrong with the files that describe devices."""
        limits = {
            "userNamespaces": self.abilities.user_namespaces,
            "recursiveReadOnly": self.abilities.recursive_read_only,
        }
        return {
            "unsupported": {name: why for name, why in limits.items() if why is not None},
            "cdiProblems": self.parts.cdi.problems(),
            "skippedLimits": dict(self.parts.cgroups.skipped),
            "network": self.parts.network.describe(),
            "plugins": list(self.parts.plugins.titles()),
        }

    def cgroup_driver(self) -> str:
        """Who makes control groups, which a kubelet takes over."""
        return self.parts.cgroups.driver

    async def pod_info(self, pod_id: str) -> Mapping[str, object]:
        """What a verbose status adds. Raises NotFound."""
        return await info.of_pod(self.parts, self._store.pod(pod_id, "look at"))

    def container_info(self, container_id: str) -> Mapping[str, object]:
        """What a verbose status adds. Raises NotFound."""
        return info.of_container(self.parts, self._store.container(container_id, "look at"))


def condition(kind: str, reason: str, trouble: str | None) -> Condition:
    """One that holds where there is no trouble."""
    if trouble is None:
        return Condition(type=kind, status=True)
    return Condition(type=kind, status=False, reason=reason, message=trouble)
