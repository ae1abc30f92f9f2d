"""StartContainer and RemoveContainer as lists of steps.

    start    logger ─ cgroup ─ process ─ record       undone when it fails: CREATED again, or EXITED where the start itself failed
    remove   kill ─ cgroup ─ snapshot ─ checkpoint ─ record        finished after a crash

What a start needs was settled by CreateContainer and is read from its plan. Steps know nothing of locks and of who waits (`service`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.errors import FailedPrecondition, TareError, describe
from tare.handlers.builtin import Process
from tare.runtime import lifecycle, reviving
from tare.runtime.bounds import deadline, twice
from tare.runtime.exits import process_of
from tare.runtime.plugins import Moment, of_container
from tare.runtime.ports import Parts
from tare.runtime.records import ContainerRecord, ContainerState, NamespaceMode, ProcessFact
from tare.runtime.store import Checkpointed, ContainerFacts
from tare.state.operations import Operation, Step

if TYPE_CHECKING:
    from tare.cgroups.manager import Cgroup

log = logging.getLogger(__name__)
START_SECONDS = 90.0
LOGGER_SECONDS = 20.0
END_SECONDS = 10.0
RELEASE_SECONDS = 60.0
SIGKILL = 9
START_ERROR_CODE = 128


@dataclass(slots=True, kw_only=True)
class Start:
    """A container on its way to running; `record` is None when it is being undone after a crash, from `names` alone.

    `let_go_at`: when its process was about to become the program, in ns since the epoch. `logging` ends when its logger reads its output.
    `committed`: a start that was on record when the daemon died has nothing to be undone.
    """

    parts: Parts
    id: str
    group: str
    cgroup_path: str
    record: ContainerRecord | None = None
    spec: dict[str, Any] = field(default_factory=dict)
    lowers: tuple[Path, ...] = ()
    committed: bool = False
    cgroup: Cgroup | None = None
    process: Process | None = None
    logging: asyncio.Task[None] | None = None
    let_go_at: int = 0
    checkpoint: Checkpointed | None = None

    @property
    def names(self) -> dict[str, str]:
        """What recovery finds all of it by."""
        return {"container": self.id, "group": self.group, "cgroup": self.cgroup_path}

    @property
    def container(self) -> ContainerRecord:
        """The record, which a container being started has."""
        assert self.record is not None
        return self.record

    @property
    def owns_pid_namespace(self) -> bool:
        """As `owns_pid_namespace` of its configuration."""
        return owns_pid_namespace(self.spec)

    async def clean(self) -> None:
        """Take back a first attempt at making its process, and make its group anew."""
        # A group in which cgroup.kill was used is good for nothing more: the kernel kills what is then cloned into it (CLONE_INTO_CGROUP).
        await end_process(self)
        await remove_cgroup(self)
        await make_cgroup(self)


def begin(parts: Parts, record: ContainerRecord) -> Start:
    """The start of a CREATED container in a READY pod."""
    plan = parts.store.plan(record.id)
    group = parts.store.pod_facts[record.pod_id].group
    return Start(
        parts=parts,
        id=record.id,
        group=group,
        cgroup_path=plan.cgroup,
        record=record,
        spec=plan.spec,
        lowers=tuple(map(Path, plan.lowers)),
        checkpoint=plan.checkpoint,
    )


def restore(parts: Parts, names: Mapping[str, str]) -> Start:
    """The start that an intent speaks of."""
    record = parts.store.containers.get(names["container"])
    committed = record is not None and record.state is ContainerState.RUNNING
    return Start(
        parts=parts,
        id=names["container"],
        group=names["group"],
        cgroup_path=names["cgroup"],
        committed=committed,
    )


def owns_pid_namespace(spec: Mapping[str, Any]) -> bool:
    """Whether the container's main process is PID 1 of a namespace of its own, so that nothing in it outlives it."""
    return any(item["type"] == "pid" and not item.get("path") for item in spec["linux"]["namespaces"])


# StartContainer


async def add_logger(start: Start) -> None:
    """Streams that lead to the log file: asked for now, and waited for before the process may write. A terminal's master is handed over once
    there is one (`start_process`)."""
    if not start.container.config.tty:
        start.logging = asyncio.create_task(_serve_streams(start, None))
        await asyncio.sleep(0)  # so that it is asked now


async def _serve_streams(start: Start, terminal: int | None) -> None:
    config = start.container.config
    async with deadline(LOGGER_SECONDS, f"have the output of container {start.id} logged"):
        await start.parts.logs.add(
            start.group,
            start.id,
            start.container.log_path,
            tty=terminal,
            stdin=config.stdin,
            max_line=start.parts.config.max_log_line,
        )


async def remove_logger(start: Start) -> None:
    """Nothing is logged any more; the log file stays."""
    if start.logging is not None:
        await asyncio.gather(start.logging, return_exceptions=True)  # it has a deadline of its own
    if not start.committed:
        async with deadline(LOGGER_SECONDS, f"leave the logger of container {start.id}"):
            await start.parts.logs.remove(start.group, start.id)


async def make_cgroup(start: Start) -> None:
    """The container's group, with its limits; where systemd makes it, that waits for the process."""
    start.cgroup = start.parts.cgroups.prepare(start.cgroup_path, resources_of(start))


def resources_of(start: Start) -> Mapping[str, object]:
    """The container's limits (OCI linux.resources)."""
    resources: Mapping[str, object] = start.spec["linux"].get("resources", {})
    return resources


async def remove_cgroup(start: Start) -> None:
    """It goes."""
    if not start.committed:
        await start.parts.cgroups.remove(start.cgroup_path)


def check_target(start: Start) -> None:
    """Refuse to join the PID namespace of a container that has ended since this one was created: its PID may be another's by now."""
    options = start.container.config.security.namespaces
    if options is None or options.pid is not NamespaceMode.TARGET:
        return
    store = start.parts.store
    facts = store.container_facts.get(store.container(options.target_id, "share the PID namespace of").id)
    joined = f"/proc/{facts.process.pid}/ns/pid" if facts is not None else ""
    alive = facts is not None and start.parts.handler.alive(process_of(facts.process))
    if not alive or all(item.get("path") != joined for item in start.spec["linux"]["namespaces"]):
        cause = f"container {options.target_id}, whose PID namespace it is to share, has ended"
        raise FailedPrecondition(f"start container {start.id}", cause=cause)


async def start_process(start: Start) -> None:
    """The main process, past its exec. It is on record before that, so that after a crash there is no process that nobody knows."""
    if start.checkpoint is not None:
        await reviving.restore_process(start)
        await reviving.let_go(start)
        return
    check_target(start)
    parts = start.parts
    overlay = parts.snapshots.get(start.id, start.lowers)

    async def created(process: Process) -> None:
        start.process = process
        facts = ContainerFacts(
            process=ProcessFact(pid=process.pid, start_time=process.start_time),
            cgroup=start.cgroup_path,
            group=start.group,
            owns_pid_namespace=start.owns_pid_namespace,
        )
        parts.store.put_container_facts(start.id, facts)
        check_target(start)  # again: one that lives now had its PID when the launcher opened the namespace by it
        if parts.plugins.active:
            await parts.plugins.ask(Moment.START, of_container(parts.store, start.container))
        if start.logging is not None:
            await start.logging
            await parts.arrivals.admit(start.id)
        start.let_go_at = time.time_ns()

    async def terminal(master: int) -> None:
        await _serve_streams(start, master)
        await parts.arrivals.admit(start.id)

    placing = parts.cgroups.placing(start.cgroup_path, resources_of(start))

    async def place(process: Process) -> None:
        assert placing is not None
        await placing(process.pid)

    async def attempt() -> Process:
        assert start.cgroup is not None
        async with deadline(START_SECONDS, f"start container {start.id}"):
            return await parts.handler.start(
                start.id,
                start.spec,
                handler=parts.store.pods[start.container.pod_id].handler,
                overlay=overlay,
                cgroup=start.cgroup,
                tty_sink=terminal if start.container.config.tty else None,
                on_created=created,
                place=None if placing is None else place,
            )

    await twice(attempt, start.clean)


async def end_process(start: Start) -> None:
    """Whatever was started ends, and is forgotten."""
    if start.committed:
        return
    parts = start.parts
    facts = parts.store.container_facts.get(start.id)
    process = start.process or (process_of(facts.process) if facts is not None else None)
    if process is not None:
        parts.handler.signal(process, SIGKILL)
    await parts.cgroups.kill(start.cgroup_path)
    if process is not None:
        async with deadline(END_SECONDS, f"see the process of container {start.id} end"):
            await parts.handler.wait(process)
        parts.handler.forget(process)
    async with deadline(RELEASE_SECONDS, f"take away what is left of the start of container {start.id}"):
        await parts.handler.release(start.id)
    start.process = None
    parts.store.drop_container_facts(start.id)


async def record_running(start: Start) -> None:
    """From here on the container runs."""
    put_running(start.parts, start.container, start.let_go_at)
    start.committed = True
    start.parts.arrivals.start(start.id)
    if start.checkpoint is not None:
        try:
            await start.parts.checkpoints.remove(start.parts.checkpoints.restored(start.id))
        except TareError as error:  # RemoveContainer tries again
            log.warning("container %s: %s", start.id, describe(error))


def put_running(parts: Parts, record: ContainerRecord, started_at: int) -> None:
    """The container RUNS, since then (ns since the epoch)."""
    state = lifecycle.container_after(record.state, lifecycle.ContainerEvent.START, record.id)
    assert state is not None
    parts.store.put_container(replace(record, state=state, started_at=started_at))


START_CONTAINER: Operation[Start] = Operation(
    "StartContainer",
    (
        Step("logger", add_logger, remove_logger),
        Step("cgroup", make_cgroup, remove_cgroup),
        Step("process", start_process, end_process),
        Step("record", record_running),
    ),
)


async def end_held(start: Start) -> None:
    """All that there is of a container whose processes stood still."""
    await end_process(start)
    await remove_cgroup(start)
    await remove_logger(start)


RESTORE_CONTAINER: Operation[Start] = Operation(
    "RestoreContainer",
    (
        Step("logger", add_logger, remove_logger),
        Step("cgroup", make_cgroup, remove_cgroup),
        Step("process", reviving.restore_process, end_process),
    ),
)
"""As far as its processes, which stand still: a container of RestorePod, which stays CREATED."""

START_HELD: Operation[Start] = Operation(
    "StartRestored", (Step("process", reviving.let_go, end_held), Step("record", record_running))
)
"""The start of such a container."""


def operation_of(parts: Parts, record: ContainerRecord) -> Operation[Start]:
    """How a container is started."""
    return START_HELD if reviving.is_held(parts, record) else START_CONTAINER


async def record_failure(parts: Parts, record: ContainerRecord, error: Exception) -> None:
    """A start that failed leaves an EXITED container that says why, with a log file, as a kubelet expects of one that ran."""
    state = lifecycle.container_after(record.state, lifecycle.ContainerEvent.START_FAILED, record.id)
    assert state is not None
    now = time.time_ns()
    failed = replace(
        record,
        state=state,
        started_at=0,
        finished_at=now,
        exit_code=START_ERROR_CODE,
        reason="StartError",
        message=str(error),
    )
    parts.store.put_container(failed)
    if record.log_path:
        async with deadline(LOGGER_SECONDS, f"make the log file of container {record.id}"):
            await asyncio.to_thread(make_log_file, record.log_path)


def make_log_file(path: str) -> None:
    """An empty log file, where there is none."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640))


# RemoveContainer


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerRef:
    """A container that is being removed. Its cgroup is named, since the plan is gone once the last step has been done."""

    parts: Parts
    id: str
    cgroup: str

    @property
    def names(self) -> dict[str, str]:
        """What recovery finds it by."""
        return {"container": self.id, "cgroup": self.cgroup}


def removal(parts: Parts, container_id: str) -> ContainerRef:
    """The removal of a container that there is."""
    return ContainerRef(parts=parts, id=container_id, cgroup=parts.store.plan(container_id).cgroup)


def restore_removal(parts: Parts, names: Mapping[str, str]) -> ContainerRef:
    """The removal that an intent speaks of."""
    return ContainerRef(parts=parts, id=names["container"], cgroup=names["cgroup"])


async def end_run(container: ContainerRef) -> None:
    """A running container is killed."""
    await container.parts.exits.kill(container.id, "remove")


async def clear_cgroup(container: ContainerRef) -> None:
    """Its group goes, where it did not go when the container ended."""
    if container.parts.cgroups.exists(container.cgroup):
        await container.parts.cgroups.kill(container.cgroup)
        await container.parts.cgroups.remove(container.cgroup)


async def clear_snapshot(container: ContainerRef) -> None:
    """Its writable layer goes."""
    await container.parts.snapshots.remove(container.id)


async def clear_checkpoint(container: ContainerRef) -> None:
    """What it was to be restored from goes."""
    await container.parts.checkpoints.remove(container.parts.checkpoints.restored(container.id))


async def clear_record(container: ContainerRef) -> None:
    """The container is no more."""
    record = container.parts.store.containers.get(container.id)
    if record is not None:
        lifecycle.container_after(record.state, lifecycle.ContainerEvent.REMOVE, container.id)
    container.parts.store.drop_container(container.id)
    container.parts.arrivals.dismiss(container.id)


REMOVE_CONTAINER: Operation[ContainerRef] = Operation(
    "RemoveContainer",
    (
        Step("kill", end_run),
        Step("cgroup", clear_cgroup),
        Step("snapshot", clear_snapshot),
        Step("checkpoint", clear_checkpoint),
        Step("record", clear_record),
    ),
    finish=True,
)
