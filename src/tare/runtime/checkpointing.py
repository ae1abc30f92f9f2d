"""CheckpointContainer, CheckpointPod and RestorePod as CRI asks for them: who may do it, when, and for how long.

A checkpoint has its container, or its pod and all of that one's, to itself. When its caller leaves it is given up, and undone in its own time.
RestorePod makes a pod and its containers by the calls that there are for that, and their processes; if one fails, or the daemon is killed in
between, the pod is removed.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tare.errors import AlreadyExists, InvalidArgument
from tare.runtime import checkpoint, containers, silence
from tare.runtime.checkpoint import Limit
from tare.runtime.records import ContainerConfig, PodConfig
from tare.runtime.restoring import TCP
from tare.state.operations import Operation, Step

if TYPE_CHECKING:
    from tare.runtime.service import Runtime

log = logging.getLogger(__name__)
T = TypeVar("T")
DOING = "restore a pod"


class Checkpointing:
    """The calls of one runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._tasks: set[asyncio.Task[Any]] = set()

    async def checkpoint_container(self, container_id: str, location: str, timeout: float) -> None:
        """Write a running container into the archive `location`, within `timeout` seconds (0: however long it takes); it goes on meanwhile and after.

        Raises NotFound, FailedPrecondition, InvalidArgument, DeadlineExceeded.
        """
        record = self._runtime.parts.store.container(container_id, "checkpoint")
        limit = Limit(timeout)
        await self._until_given_up(limit, self._checkpoint_container(record.id, location, limit))

    async def _checkpoint_container(self, container_id: str, location: str, limit: Limit) -> None:
        runtime = self._runtime
        async with runtime.locks.hold(container_id, f"checkpoint container {container_id}"):
            record = runtime.parts.store.container(container_id, "checkpoint")
            taking = checkpoint.begin(runtime.parts, record, location, limit)
            await runtime.parts.operations.run(checkpoint.CHECKPOINT_CONTAINER, taking, taking.names)
        log.info("container %s: checkpoint written to %s", container_id, location)

    async def checkpoint_pod(
        self, pod_id: str, location: str, container_ids: Sequence[str], options: Mapping[str, str]
    ) -> None:
        """Write these containers of a pod (all that run, where none is named) into the directory `location`; they stand still together.

        Raises as `checkpoint_container`, and AlreadyExists where there are files in the directory.
        """
        if options:
            raise InvalidArgument(f"checkpoint pod {pod_id}", cause=f"option {min(options)} is unknown")
        pod = self._runtime.parts.store.pod(pod_id, "checkpoint")
        limit = Limit(0.0)
        await self._until_given_up(limit, self._checkpoint_pod(pod.id, location, tuple(container_ids), limit))

    async def _checkpoint_pod(self, pod_id: str, location: str, containers: tuple[str, ...], limit: Limit) -> None:
        runtime = self._runtime
        doing = f"checkpoint pod {pod_id}"
        async with AsyncExitStack() as held:
            await held.enter_async_context(runtime.locks.hold(pod_id, doing))
            runtime.parts.store.pod(pod_id, "checkpoint")
            for member in sorted(runtime.parts.store.members(pod_id)):
                await held.enter_async_context(runtime.locks.hold(member, doing))
            taking = checkpoint.begin_pod(runtime.parts, pod_id, containers, location, limit)
            await runtime.parts.operations.run(checkpoint.CHECKPOINT_POD, taking, taking.names)
        log.info("pod %s: checkpoint written to %s", pod_id, location)

    async def restore_pod(
        self,
        location: str,
        config: PodConfig | None,
        handler: str,
        containers: Sequence[ContainerConfig],
        options: Mapping[str, str],
    ) -> tuple[str, dict[str, str]]:
        """A new pod and its containers out of the directory `location`: the pod's ID, and theirs by name. They are CREATED.

        Configurations that are not given are those in the checkpoint. Raises as RunPodSandbox and CreateContainer do.
        """
        doing = f"restore a pod from {location}"
        unknown = sorted(set(options) - {TCP})
        if unknown:
            raise InvalidArgument(doing, cause=f"option {unknown[0]} is unknown", hint=f"there is {TCP}")
        await self._runtime.parts.criu.require(doing)
        archives, dump = await asyncio.to_thread(checkpoint.read_pod, Path(location), doing)
        pod = config or (dump.pod if dump is not None else None)
        if pod is None:
            raise InvalidArgument(
                doing, cause="there is no configuration of the pod, neither given nor in the checkpoint"
            )
        given = {item.metadata.name: item for item in containers} or (dump.containers if dump is not None else {})
        if set(given) != set(archives):
            cause = f"the checkpoint has containers {', '.join(sorted(archives))}; there are configurations of {', '.join(sorted(given)) or 'none'}"
            raise InvalidArgument(doing, cause=cause)
        wanted = {name: from_archive(given[name], archives[name], options) for name in sorted(given)}
        subject = Reviving(runtime=self._runtime, pod=os.urandom(32).hex(), config=pod, handler=handler, wanted=wanted)
        work = self._runtime.parts.operations.run(RESTORE_POD, subject, subject.names)
        await self._until_given_up(subject.limit, work)
        log.info("pod %s restored from %s", subject.pod, location)
        return subject.pod, subject.made

    async def _until_given_up(self, limit: Limit, work: Coroutine[Any, Any, T]) -> T:
        """What comes of it; where the caller leaves, it is given up, and comes to its end by itself."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            limit.given_up.set()
            raise

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has it; where nobody did, the operation has said what it undid


def from_archive(config: ContainerConfig, archive: Path, options: Mapping[str, str]) -> ContainerConfig:
    """A container's configuration, whose image is its archive."""
    annotations = {**config.annotations, **options}
    return replace(config, image=replace(config.image, image=str(archive)), annotations=annotations)


@dataclass(slots=True, kw_only=True)
class Reviving:
    """A pod on its way out of a checkpoint; without `config` it is being undone after a crash, by its ID alone."""

    runtime: Runtime
    pod: str
    config: PodConfig | None = None
    handler: str = ""
    wanted: dict[str, ContainerConfig] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    limit: Limit = field(default_factory=lambda: Limit(0.0))

    @property
    def names(self) -> dict[str, str]:
        """What recovery finds it by."""
        return {"pod": self.pod}

    @property
    def asked(self) -> PodConfig:
        """The configuration of a pod being made."""
        assert self.config is not None
        return self.config


async def make_pod(subject: Reviving) -> None:
    """As RunPodSandbox."""
    made = await subject.limit.keep(subject.runtime.run_pod(subject.asked, subject.handler, subject.pod), DOING)
    if made != subject.pod:  # somebody was making the same pod without a checkpoint
        raise AlreadyExists(DOING, cause=f"the name is held by {made}")


async def remove_pod(subject: Reviving) -> None:
    """With all that is in it."""
    await subject.runtime.remove_pod(subject.pod)


async def make_containers(subject: Reviving) -> None:
    """As CreateContainer."""
    for name, config in subject.wanted.items():
        work = subject.runtime.create_container(subject.pod, config, subject.asked)
        subject.made[name] = await subject.limit.keep(work, DOING)


async def silence_network(subject: Reviving) -> None:
    """Nothing is received in the pod until all of it is there. Without a network of its own nothing is done."""
    pin = subject.runtime.parts.store.pod_facts[subject.pod].pins.get("net")
    if pin is not None:
        await asyncio.to_thread(silence.keep, Path(pin))


async def end_silence(subject: Reviving) -> None:
    """What is sent to the pod's containers is received; they stand still meanwhile."""
    pin = subject.runtime.parts.store.pod_facts[subject.pod].pins.get("net")
    if pin is not None:
        await asyncio.to_thread(silence.end, Path(pin))


async def hold_all(subject: Reviving) -> None:
    """Their processes, which stand still until StartContainer."""
    for container_id in subject.made.values():
        await hold(subject.runtime, container_id)


async def hold(runtime: Runtime, container_id: str) -> None:
    """Those of one container. Its end is waited for, as any other's."""
    async with runtime.locks.hold(container_id, f"restore container {container_id}"):
        start = containers.begin(runtime.parts, runtime.parts.store.container(container_id, "restore"))
        await runtime.parts.operations.run(containers.RESTORE_CONTAINER, start, start.names)
        runtime.parts.exits.watch(container_id)


def restore(runtime: Runtime, names: Mapping[str, str]) -> Reviving:
    """The pod that an intent speaks of."""
    return Reviving(runtime=runtime, pod=names["pod"])


RESTORE_POD: Operation[Reviving] = Operation(
    "RestorePod",
    (
        Step("pod", make_pod, remove_pod),
        Step("containers", make_containers),
        Step("silence", silence_network),
        Step("processes", hold_all),
        Step("network", end_silence),
    ),
)
