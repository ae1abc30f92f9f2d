"""What a new daemon does before it serves: makes what is recorded and what exists agree.

    intents of creating operations    undone, but for a start whose container came to run: that is finished
    records without facts             of an earlier boot: pods NOTREADY, running containers EXITED 255 Unknown
    containers with facts             waited for; one that ended meanwhile is recorded with its true end
    pods with facts                   NOTREADY where a namespace or its PID 1 is gone
    intents of ending operations      finished
    what no record names              removed, among our own names only
    offers                            results that no caller has had can be collected, or are discarded in time

Nothing here keeps the daemon from serving: what cannot be settled is logged and met again at the next start.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tare.errors import FailedPrecondition, describe
from tare.runtime import (
    checkpoint,
    checkpointing,
    containers,
    creating,
    exec,
    exits,
    lifecycle,
    podfiles,
    pods,
    stopping,
    strays,
    updating,
)
from tare.runtime.bounds import deadline
from tare.runtime.exits import Watchers, process_of
from tare.runtime.ports import Parts
from tare.runtime.records import ContainerState, PodState
from tare.runtime.service import Runtime
from tare.runtime.store import PodFacts, container_key
from tare.state.operations import Operation

log = logging.getLogger(__name__)
EXEC_SECONDS = 5.0
REBOOT = "the node was restarted, or its run directory was lost"


async def recover(runtime: Runtime, watchers: Watchers) -> None:
    """Once, after the handler is connected and before the first call."""
    parts = runtime.parts
    pending = parts.operations.pending()
    starts = (containers.START_CONTAINER.name, containers.START_HELD.name)
    started = [intent.subject["container"] for intent in pending if intent.operation in starts]
    for container_id in started:
        await attempt(f"go on with the start of container {container_id}", go_on(parts, container_id))
    await undo(parts)
    forget_other_boots(parts)
    for container_id in parts.store.container_facts:
        watchers.watch(container_id)
    for pod_id, facts in list(parts.store.pod_facts.items()):
        look_at_pod(parts, watchers, pod_id, facts)
    await finish(parts)
    await attempt("remove pods that were being restored", undo_revived(runtime))
    await attempt("recover the network", parts.network.recover(set(parts.store.pod_facts)))
    await sweep(parts)
    offer(runtime, started)


async def go_on(parts: Parts, container_id: str) -> None:
    """Put on record what runs already, or did: a program that has begun is not begun a second time."""
    record, facts = parts.store.containers.get(container_id), parts.store.container_facts.get(container_id)
    if record is None or facts is None or record.state is not ContainerState.CREATED:
        return
    if parts.store.plan(container_id).checkpoint is not None:  # what is on record is restored, and may stand still
        await parts.cgroups.thaw(facts.cgroup, EXEC_SECONDS)
    async with deadline(EXEC_SECONDS, f"see container {container_id} run"):
        ran = await parts.handler.came_to_run(process_of(facts.process))
    if ran:
        containers.put_running(parts, record, time.time_ns())


def nothing(parts: Parts, names: Mapping[str, str]) -> None:
    """For what leaves nothing of its own: who asked for a stop asks again, and commands that nobody waits for are swept."""


Restore = Callable[[Parts, Mapping[str, str]], Any]
UNDONE: tuple[tuple[Operation[Any], Restore], ...] = (
    (checkpoint.CHECKPOINT_CONTAINER, checkpoint.restore),
    (checkpoint.CHECKPOINT_POD, checkpoint.restore),
    (containers.RESTORE_CONTAINER, containers.restore),
    (containers.START_HELD, containers.restore),
    (containers.START_CONTAINER, containers.restore),
    (creating.CREATE_CONTAINER, creating.restore),
    (pods.RUN_POD, pods.restore),
    (updating.UPDATE_CONTAINER, updating.restore),
    (updating.UPDATE_POD, updating.restore),
    (stopping.STOP_CONTAINER, nothing),
    (exec.EXEC, nothing),
)
FINISHED: tuple[tuple[Operation[Any], Restore], ...] = (
    (pods.STOP_POD, pods.restore_ref),
    (containers.REMOVE_CONTAINER, containers.restore_removal),
    (pods.REMOVE_POD, pods.restore_ref),
)


async def settle(parts: Parts, some: Iterable[tuple[Operation[Any], Restore]], only: str | None = None) -> int:
    """Undo or finish what stands of these operations; how many there were."""
    count = 0
    for operation, restore in some:
        count += await parts.operations.recover(operation, functools.partial(restore, parts), only)
    return count


async def again(parts: Parts, key: str, name: str) -> None:
    """Undo or finish one intent once more, of a daemon that serves. Raises FailedPrecondition where it stands still."""
    known = [(operation, restore) for operation, restore in (*UNDONE, *FINISHED) if operation.name == name]
    await settle(parts, known, key)
    left = [intent for intent in parts.operations.pending(key) if intent.operation == name]
    if left:
        cause = "; ".join(left[0].failures) or "only the daemon's next start takes it up"
        raise FailedPrecondition(f"finish {name}", cause=cause)


async def undo(parts: Parts) -> None:
    """Half-made pods, containers and starts, and half-made changes of them."""
    count = await settle(parts, UNDONE)
    if count:
        log.info("%d operations that an earlier daemon left half done were taken back", count)


async def finish(parts: Parts) -> None:
    """Stops and removals that were under way."""
    count = await settle(parts, FINISHED)
    if count:
        log.info("%d operations that an earlier daemon left half done were finished", count)


def forget_other_boots(parts: Parts) -> None:
    """Records that say more than this boot's facts."""
    store = parts.store
    for record in list(store.containers.values()):
        if record.state is ContainerState.RUNNING and record.id not in store.container_facts:
            log.warning("container %s: %s", record.id, REBOOT)
            store.put_container(exits.lost(record, REBOOT))
    for pod in list(store.pods.values()):
        if pod.state is PodState.READY and pod.id not in store.pod_facts:
            log.warning("pod %s: %s", pod.id, REBOOT)
            pods.record_state(parts, pod.id, lifecycle.PodEvent.LOST)


def look_at_pod(parts: Parts, watchers: Watchers, pod_id: str, facts: PodFacts) -> None:
    """Whether what the pod's containers share is there."""
    gone = [kind for kind, path in facts.pins.items() if not os.path.ismount(path)]
    if facts.pause is not None:
        pause = process_of(facts.pause)
        if parts.handler.alive(pause):
            watchers.watch_pod(pod_id, pause)
        else:
            gone.append("PID 1")
    if gone:
        log.warning("pod %s: %s gone", pod_id, ", ".join(gone))
        pods.record_state(parts, pod_id, lifecycle.PodEvent.LOST)


async def sweep(parts: Parts) -> None:
    """Remove what no record names."""
    store = parts.store
    for pod_id in strangers(parts.run / "pods", store.pod_facts):
        await attempt(f"remove the namespaces of pod {pod_id}", parts.handler.remove_pod_namespaces(pod_id, None))
        if pod_id not in store.pods:
            await attempt(f"remove the directory of pod {pod_id}", remove_directory(parts, pod_id))
    for container_id in set(parts.handler.bundles()) - set(store.container_facts):
        await attempt(f"take away the bundle of container {container_id}", parts.handler.release(container_id))
    for container_id in strangers(parts.run / "containers", store.container_facts):
        await attempt(f"remove the streams of container {container_id}", remove_streams(parts, container_id))
    for container_id in parts.snapshots.list():
        if container_id not in store.containers:
            log.info("the writable layer %s belongs to no container: removed", container_id)
            await attempt(f"remove the writable layer {container_id}", parts.snapshots.remove(container_id))
    await attempt("remove what is left of removed writable layers", parts.snapshots.collect())
    await attempt("remove what is left of checkpoints", sweep_checkpoints(parts))
    await attempt("end commands that nobody waits for", parts.handler.end_stray_commands(None))
    left = strays.find(parts.run, strays.known(store) | parts.handler.live_commands(), None)
    await attempt("end processes that nobody waits for", strays.end(parts.run, parts.handler, left))


async def undo_revived(runtime: Runtime) -> None:
    """Pods that RestorePod was making: removed as any other is, and so when their containers are watched."""
    restore = functools.partial(checkpointing.restore, runtime)
    await runtime.parts.operations.recover(checkpointing.RESTORE_POD, restore)


async def sweep_checkpoints(parts: Parts) -> None:
    """Those that were being taken, and those that nothing is to be restored from any more."""
    kept = {record.id for record in parts.store.containers.values() if record.state is ContainerState.CREATED}
    unfinished = {name for intent in parts.operations.pending() for name in intent.subject.values()}
    for name in set(parts.checkpoints.list_taken()) - unfinished:
        await parts.checkpoints.remove(parts.checkpoints.taken(name))
    for name in set(parts.checkpoints.list_restored()) - kept:
        await parts.checkpoints.remove(parts.checkpoints.restored(name))
    await parts.checkpoints.collect()


def strangers(directory: Path, known: Iterable[str]) -> list[str]:
    """Names in a directory of ours that are not known."""
    try:
        return sorted(set(os.listdir(directory)) - set(known))
    except FileNotFoundError:
        return []


async def remove_directory(parts: Parts, pod_id: str) -> None:
    """A pod's directory."""
    podfiles.remove(parts.pod_directory(pod_id))


async def remove_streams(parts: Parts, container_id: str) -> None:
    """A container's FIFOs."""
    directory = parts.run / "containers" / container_id
    for name in os.listdir(directory):
        (directory / name).unlink()
    directory.rmdir()


def offer(runtime: Runtime, started: Iterable[str]) -> None:
    """What was made for callers that had no answer: pods and containers, and starts that were on record and not yet answered."""
    store = runtime.parts.store
    for thing, age in store.offered():
        pod, container = store.pods.get(thing), store.containers.get(thing)
        if pod is not None:
            runtime.runs.offer(pod.config.metadata.key, (pod.config, pod.handler), thing, thing, age)
        elif container is not None:
            runtime.creations.offer(
                container_key(container.pod_id, container.config.metadata), container.config, thing, thing, age
            )
        else:
            store.claim(thing)
    for container_id in started:
        record = store.containers.get(container_id)
        if record is not None and record.state is not ContainerState.CREATED:
            runtime.starts.offer(container_id, None, container_id, container_id, 0.0)


async def attempt(doing: str, effect: Awaitable[None]) -> None:
    """Do it, or log why not."""
    try:
        await effect
    except Exception as error:  # noqa: BLE001 - the daemon serves what it can; the next start tries again
        log.warning("%s: %s", doing, describe(error))
