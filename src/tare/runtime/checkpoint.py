"""CheckpointContainer and CheckpointPod as lists of steps.

    look ─ directory ─ pause ─ dump ─ describe ─ resume ─ archive ─ clear       undone when it fails, is given up, or takes too long

All containers stand still before the first is dumped, and go on before anything is packed. What is undone lets CRIU come to its end first
(killed in the middle it would leave connections held still), then has the containers go on, and takes away what was written. The archive
gets its name when it is whole: nobody sees half of one.

A pod's checkpoint is a directory: for each container NAME.tar, in a container's own form, and

    pod.options   {"version": 1, "containers": {NAME: "NAME.tar"}, "annotations": {…}}, as checkpointctl reads it
    pod.dump      the configurations of the pod and its containers, for who restores it without giving them
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tare import __version__
from tare.errors import AlreadyExists, DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound
from tare.handlers.criu_dump import Outside
from tare.runtime import checkpoint_archive as archive
from tare.runtime.bounds import kernel_errors
from tare.runtime.exits import process_of
from tare.runtime.pods import kinds_of
from tare.runtime.ports import Parts
from tare.runtime.records import ContainerConfig, ContainerRecord, ContainerState, PodConfig
from tare.runtime.store import ContainerFacts
from tare.state.operations import Operation, Step
from tare.storage.difference import Stop, Stopped
from tare.storage.durable import sync_directory

T = TypeVar("T")
OPTIONS, DUMP = "pod.options", "pod.dump"
VERSION = 1
ENGINE = "org.criu.checkpoint.engine.name"
ENGINE_VERSION = "org.criu.checkpoint.engine.version"
FREEZE_SECONDS = 10.0
COMMAND_SECONDS, COMMAND_PAUSE = 5.0, 0.1  # for a command that runs in a container to end
BUILTIN = ("", "builtin")


@dataclass(frozen=True, slots=True, kw_only=True)
class PodDump:
    """pod.dump."""

    pod: PodConfig
    containers: dict[str, ContainerConfig]


class Limit:
    """How long something may take (`seconds`, 0: as long as it does), and whether somebody has given it up."""

    def __init__(self, seconds: float) -> None:
        self.given_up = asyncio.Event()
        self._seconds = seconds
        self._until = asyncio.get_running_loop().time() + seconds if seconds else None

    async def keep(self, work: Awaitable[T], doing: str) -> T:
        """The result of work that is cancelled when the time is over, or nobody wants it any more. Raises DeadlineExceeded."""
        task = asyncio.ensure_future(work)
        return await self._within(task, task.cancel, doing)

    async def keep_thread(self, work: Callable[[Stop], T], doing: str) -> T:
        """The same for what blocks, and is told to stop. It has, when this returns."""
        stop = Stop()
        return await self._within(asyncio.ensure_future(asyncio.to_thread(work, stop)), stop.set, doing)

    async def _within(self, task: asyncio.Future[T], stop: Callable[[], object], doing: str) -> T:
        given_up = asyncio.ensure_future(self.given_up.wait())
        left = None if self._until is None else max(0.0, self._until - asyncio.get_running_loop().time())
        try:
            await asyncio.wait((task, given_up), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            given_up.cancel()
            if not task.done():
                stop()
                await asyncio.wait((task,))
        if not task.cancelled() and not isinstance(task.exception(), Stopped):
            return task.result()
        if self.given_up.is_set():
            raise DeadlineExceeded(doing, cause="who asked for it has left")
        raise DeadlineExceeded(doing, cause=f"it did not end within {self._seconds:g} s; all goes on as before")


@dataclass(slots=True, kw_only=True)
class Taking:
    """A checkpoint being taken: of one container, or (`pod`) of these of a pod. `limit` is None when it is undone after a crash, by `names`."""

    parts: Parts
    id: str
    location: str
    cgroups: tuple[str, ...]
    containers: tuple[str, ...] = ()
    pod: bool = False
    limit: Limit | None = None
    outside: dict[str, Outside] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """What recovery finds all of it by."""
        kind = "pod" if self.pod else "container"
        return {kind: self.id, "location": self.location, "cgroups": "\n".join(self.cgroups)}

    @property
    def doing(self) -> str:
        """In words."""
        return f"checkpoint {'pod' if self.pod else 'container'} {self.id}"

    @property
    def directory(self) -> Path:
        """Where it is put together."""
        return self.parts.checkpoints.taken(self.id)

    @property
    def partial(self) -> Path:
        """The archive before it is whole; a pod's directory before that."""
        path = Path(self.location)
        return path.parent / f".{path.name}.{self.id[:12]}.partial"

    async def keep(self, work: Awaitable[T]) -> T:
        """Within its time."""
        assert self.limit is not None
        return await self.limit.keep(work, self.doing)

    async def keep_thread(self, work: Callable[[Stop], T]) -> T:
        """The same for what blocks."""
        assert self.limit is not None
        return await self.limit.keep_thread(work, self.doing)


def begin(parts: Parts, record: ContainerRecord, location: str, limit: Limit) -> Taking:
    """The checkpoint of one container."""
    facts = parts.store.container_facts.get(record.id)
    cgroups = (facts.cgroup,) if facts is not None else ()
    return Taking(parts=parts, id=record.id, location=location, cgroups=cgroups, containers=(record.id,), limit=limit)


def begin_pod(parts: Parts, pod_id: str, containers: tuple[str, ...], location: str, limit: Limit) -> Taking:
    """The checkpoint of these containers of a pod, or of all that run where none is named. Raises NotFound, InvalidArgument."""
    members = parts.store.members(pod_id)
    wanted = [parts.store.container(name, "checkpoint").id for name in containers]
    strangers = [name for name in wanted if name not in members]
    if strangers:
        raise InvalidArgument(f"checkpoint pod {pod_id}", cause=f"container {strangers[0]} is in another pod")
    records = (parts.store.containers.get(name) for name in members)
    running = [record.id for record in records if record is not None and record.state is ContainerState.RUNNING]
    chosen = tuple(wanted or running)
    facts = (parts.store.container_facts.get(name) for name in chosen)
    cgroups = tuple(item.cgroup for item in facts if item is not None)
    return Taking(parts=parts, id=pod_id, location=location, cgroups=cgroups, containers=chosen, pod=True, limit=limit)


def restore(parts: Parts, names: Mapping[str, str]) -> Taking:
    """The checkpoint that an intent speaks of."""
    cgroups = tuple(filter(None, names["cgroups"].split("\n")))
    pod = "pod" in names
    owner = names["pod"] if pod else names["container"]
    return Taking(parts=parts, id=owner, location=names["location"], cgroups=cgroups, pod=pod)


async def look(taking: Taking) -> None:
    """All that can be known before anything stands still."""
    parts, doing = taking.parts, taking.doing
    await parts.criu.require(doing)
    if not taking.containers:
        raise FailedPrecondition(doing, cause="none of its containers runs")
    for name in taking.containers:
        check_container(parts, parts.store.container(name, "checkpoint"))
    with kernel_errors(doing):
        await asyncio.to_thread(check_location, taking)


def check_container(parts: Parts, record: ContainerRecord) -> ContainerFacts:
    """What is known of a container that can be dumped. Raises FailedPrecondition."""
    doing = f"checkpoint container {record.id}"
    pod = parts.store.pods[record.pod_id]
    facts = parts.store.container_facts.get(record.id)
    if record.state is not ContainerState.RUNNING or facts is None:
        raise FailedPrecondition(doing, cause=f"it is {record.state.name}, not RUNNING")
    if pod.handler not in BUILTIN:
        cause = f"runtime handler {pod.handler} has made it; only containers of the built-in one can be checkpointed"
        raise FailedPrecondition(doing, cause=cause)
    if "user" in kinds_of(pod.config):
        raise FailedPrecondition(doing, cause="its pod has a user namespace, which cannot be checkpointed")
    if record.config.tty:
        raise FailedPrecondition(doing, cause="it has a terminal, which cannot be checkpointed")
    return facts


def check_location(taking: Taking) -> None:
    """Raise where nothing can be written there. Blocks."""
    path, doing = Path(taking.location), taking.doing
    if not path.is_absolute() or "\0" in taking.location:
        raise InvalidArgument(doing, cause=f"location {taking.location!r} is not an absolute path")
    if not path.parent.is_dir():
        raise InvalidArgument(doing, cause=f"there is no directory {path.parent}")
    if taking.pod and path.is_dir():
        if any(path.iterdir()):
            raise AlreadyExists(doing, cause=f"there are files in {path}")
    elif path.is_dir() or (taking.pod and os.path.lexists(path)):
        raise InvalidArgument(doing, cause=f"there is something else at {path}")


async def make_directory(taking: Taking) -> None:
    """Where the checkpoint is put together."""
    with kernel_errors(taking.doing):
        await taking.parts.checkpoints.make(taking.directory)
        for name in taking.containers:
            (taking.directory / name).mkdir(mode=0o700)
            (taking.directory / name / archive.IMAGES).mkdir(mode=0o700)


async def remove_directory(taking: Taking) -> None:
    """It goes."""
    await taking.parts.checkpoints.remove(taking.directory)


async def pause(taking: Taking) -> None:
    """All of them stand still, and have no commands in them (a probe's, say) that CRIU could not put back. Raises FailedPrecondition."""
    until = asyncio.get_running_loop().time() + COMMAND_SECONDS
    while True:
        await taking.keep(together([taking.parts.cgroups.freeze(path, FREEZE_SECONDS) for path in taking.cgroups]))
        commands = {name: found for name in taking.containers if (found := strangers(taking.parts, name))}
        if not commands:
            return
        await resume(taking)
        if asyncio.get_running_loop().time() > until:
            name, found = next(iter(commands.items()))
            cause = f"a command runs in container {name} (PID {', '.join(map(str, found))})"
            raise FailedPrecondition(
                taking.doing,
                cause=cause,
                hint="wait for its end, or end it: only the container's own processes can be dumped",
            )
        await taking.keep(asyncio.sleep(COMMAND_PAUSE))


def strangers(parts: Parts, name: str) -> list[int]:
    """PIDs of commands that run in a container. Raises FailedPrecondition where that has ended."""
    facts = parts.store.container_facts.get(name)
    if facts is None:
        raise FailedPrecondition(f"checkpoint container {name}", cause="it has ended")
    return parts.criu.strangers(process_of(facts.process), parts.cgroups.processes(facts.cgroup))


async def together(work: list[Awaitable[None]]) -> None:
    """All of it at once; the first failure, once all has ended."""
    for result in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


async def resume(taking: Taking) -> None:
    """All of them go on. A container that has ended meanwhile needs nothing."""
    for path in taking.cgroups:
        with contextlib.suppress(NotFound):
            await taking.parts.cgroups.thaw(path, FREEZE_SECONDS)


async def dump(taking: Taking) -> None:
    """CRIU writes down one after the other."""
    for name in taking.containers:
        await taking.keep(dump_one(taking, name))


async def dump_one(taking: Taking, name: str) -> None:
    """One container."""
    parts = taking.parts
    facts = parts.store.container_facts[name]
    cgroup = parts.cgroups.open(facts.cgroup)
    taking.outside[name] = await parts.criu.dump(
        process_of(facts.process),
        parts.store.plan(name).spec,
        cgroup=cgroup,
        fifos=parts.run / "containers" / name,
        directory=taking.directory / name,
        doing=f"checkpoint container {name}",
    )


async def outlive_dump(taking: Taking) -> None:
    """What CRIU was doing has come to an end."""
    await taking.parts.criu.outlive()


async def describe(taking: Taking) -> None:
    """The rest of what is in each container's archive, while nothing changes it."""
    with kernel_errors(taking.doing):
        for name in taking.containers:
            await taking.keep_thread(partial(archive.describe, subject(taking, name), taking.directory / name))
        if taking.pod:
            await asyncio.to_thread(describe_pod, taking)


def subject(taking: Taking, name: str) -> archive.Subject:
    """What is written down of a container."""
    parts = taking.parts
    record, plan = parts.store.containers[name], parts.store.plan(name)
    overlay = parts.snapshots.get(name, tuple(map(Path, plan.lowers)))
    pod = parts.store.pods[record.pod_id]
    shared = parts.pod_directory(pod.id) / "shm" if "ipc" in kinds_of(pod.config) else None
    return archive.Subject(
        container=record,
        pod=pod,
        spec=plan.spec,
        pid=parts.store.container_facts[name].process.pid,
        streams=taking.outside[name].streams,
        lowers=overlay.lowers,
        upper=overlay.upper,
        shared=shared if shared is not None and any(shared.iterdir()) else None,
    )


def describe_pod(taking: Taking) -> None:
    """pod.options and pod.dump."""
    store = taking.parts.store
    records = [store.containers[name] for name in taking.containers]
    names = [record.config.metadata.name for record in records]
    options = {
        "version": VERSION,
        "containers": {name: f"{name}.tar" for name in names},
        "annotations": {ENGINE: "tare", ENGINE_VERSION: __version__},
    }
    archive.put(taking.directory / OPTIONS, options)
    whole = PodDump(
        pod=store.pods[taking.id].config,
        containers={record.config.metadata.name: record.config for record in records},
    )
    archive.put(taking.directory / DUMP, msgspec.to_builtins(whole))


async def write_archive(taking: Taking) -> None:
    """Under another name first."""
    with kernel_errors(taking.doing):
        await taking.keep_thread(partial(pack, taking))


def pack(taking: Taking, stop: Stop) -> None:
    """The archive, or the pod's directory with one for each container. Blocks."""
    unfinished, target = taking.partial, Path(taking.location)
    remove_partial(unfinished)
    if taking.pod:
        unfinished.mkdir(mode=0o700)
        for name in taking.containers:
            metadata = taking.parts.store.containers[name].config.metadata
            archive.pack(taking.directory / name, unfinished / f"{metadata.name}.tar", stop)
        for name in (OPTIONS, DUMP):
            archive.copy(taking.directory / name, unfinished / name, stop)
        sync_directory(unfinished)
    else:
        archive.pack(taking.directory / taking.id, unfinished, stop)
    stop.check()
    os.rename(unfinished, target)
    sync_directory(target.parent)


async def drop_archive(taking: Taking) -> None:
    """What was written of it goes."""
    with kernel_errors(taking.doing):
        await asyncio.to_thread(remove_partial, taking.partial)


def remove_partial(path: Path) -> None:
    """A file, or a directory of files."""
    if path.is_dir():
        for inner in path.iterdir():
            inner.unlink()
        path.rmdir()
    path.unlink(missing_ok=True)


STEPS: tuple[Step[Taking], ...] = (
    Step("look", look),
    Step("directory", make_directory, remove_directory),
    Step("pause", pause, resume),
    Step("dump", dump, outlive_dump),
    Step("describe", describe),
    Step("resume", resume),
    Step("archive", write_archive, drop_archive),
    Step("clear", remove_directory),
)
CHECKPOINT_CONTAINER: Operation[Taking] = Operation("CheckpointContainer", STEPS)
CHECKPOINT_POD: Operation[Taking] = Operation("CheckpointPod", STEPS)


def read_pod(directory: Path, doing: str) -> tuple[dict[str, Path], PodDump | None]:
    """The archives of a pod's checkpoint by container, and the configurations in it. Blocks. Raises InvalidArgument."""
    if not directory.is_absolute() or not directory.is_dir():
        raise InvalidArgument(doing, cause=f"{directory} is no directory by its absolute path")
    options: Mapping[str, Any] = archive.document(directory / OPTIONS, dict, doing)
    listed = options.get("containers")
    if options.get("version") != VERSION or not isinstance(listed, dict) or not listed:
        raise InvalidArgument(doing, cause=f"{OPTIONS} of the checkpoint is not what it is to be")
    found = {}
    for name, file in listed.items():
        if not isinstance(file, str) or not file or "/" in file or file.startswith("."):
            raise InvalidArgument(doing, cause=f"{OPTIONS} of the checkpoint names the file {file!r}")
        found[name] = directory / file
    if not (directory / DUMP).exists():
        return found, None
    try:
        whole = msgspec.convert(archive.document(directory / DUMP, dict, doing), PodDump)
    except msgspec.ValidationError as error:
        raise InvalidArgument(doing, cause=f"{DUMP} of the checkpoint: {error}") from error
    return found, whole
