"""The processes of a container that is restored: made out of its checkpoint, standing still, and let go.

StartContainer    restore ─ let go
RestorePod        restore … of all containers, so that they find each other's connections; StartContainer lets each go
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from tare.errors import FailedPrecondition
from tare.handlers.criu_restore import Restoring
from tare.runtime.bounds import deadline, twice
from tare.runtime.exits import process_of
from tare.runtime.records import ContainerRecord, ContainerState, ProcessFact
from tare.runtime.store import Checkpointed, ContainerFacts

if TYPE_CHECKING:
    from tare.handlers.processes import Process
    from tare.runtime.containers import Start
    from tare.runtime.ports import Parts

RESTORE_SECONDS = 600.0
THAW_SECONDS = 10.0


def is_held(parts: Parts, record: ContainerRecord) -> bool:
    """Whether a container has its processes already, which stand still."""
    facts = parts.store.container_facts.get(record.id)
    return (
        record.state is ContainerState.CREATED and facts is not None and parts.handler.alive(process_of(facts.process))
    )


async def restore_process(start: Start) -> None:
    """The main process with all that was below it. It is on record when this returns, and stands still."""
    parts, checkpoint = start.parts, start.checkpoint
    assert checkpoint is not None
    placing = parts.cgroups.placing(start.cgroup_path, start.spec["linux"].get("resources", {}))

    async def place(process: Process) -> None:
        assert placing is not None
        await placing(process.pid)

    async def freeze() -> None:
        await parts.cgroups.freeze(start.cgroup_path, THAW_SECONDS)

    async def attempt() -> Process:
        assert start.cgroup is not None
        async with deadline(RESTORE_SECONDS, f"restore container {start.id}"):
            return await parts.criu.restore(
                start.id,
                start.spec,
                what(checkpoint, objects=checkpoint.objects and first_of_pod(parts, start.container)),
                overlay=parts.snapshots.get(start.id, start.lowers),
                cgroup=start.cgroup,
                freeze=freeze,
                place=None if placing is None else place,
            )

    if start.logging is not None:
        await start.logging
    start.process = process = await twice(attempt, start.clean)
    facts = ContainerFacts(
        process=ProcessFact(pid=process.pid, start_time=process.start_time),
        cgroup=start.cgroup_path,
        group=start.group,
        owns_pid_namespace=start.owns_pid_namespace,
    )
    parts.store.put_container_facts(start.id, facts)


def first_of_pod(parts: Parts, record: ContainerRecord) -> bool:
    """Whether no other container of the pod has been restored: what was in the IPC namespace that they share is put there once."""
    others = (name for name in parts.store.members(record.pod_id) if name != record.id)
    return not any(
        name in parts.store.container_facts and parts.store.plan(name).checkpoint is not None for name in others
    )


def what(checkpoint: Checkpointed, *, objects: bool) -> Restoring:
    """A checkpoint on record as the handler takes it."""
    return Restoring(
        images=Path(checkpoint.images),
        work=Path(checkpoint.work),
        external=checkpoint.external,
        streams=checkpoint.streams,
        established=checkpoint.established,
        objects=objects,
    )


async def let_go(start: Start) -> None:
    """They go on. Raises FailedPrecondition where they have ended, standing still as they were."""
    parts = start.parts
    facts = parts.store.container_facts.get(start.id)
    if facts is None or not parts.handler.alive(process_of(facts.process)):
        raise FailedPrecondition(f"start container {start.id}", cause="the processes that were restored have ended")
    start.process = process_of(facts.process)
    await parts.arrivals.admit(start.id)
    start.let_go_at = time.time_ns()
    await parts.cgroups.thaw(start.cgroup_path, THAW_SECONDS)
