"""Mending what an audit has found, one finding at a time, each as an operation of its own.

    orphan        taken away, by the same calls that take it away in the usual course; left where somebody uses it
    lost          made again where that can be; else the record is brought to what is so (a pod whose namespace is gone is NOTREADY)
    unfinished    done once more

Who calls holds the locks of those whose things they are, and has looked a moment ago. Everything is idempotent.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tare.errors import FailedPrecondition, NotFound
from tare.handlers.pins import PIN_FLAGS, PROC_PIN, unpin_proc
from tare.images.auth import RegistryAuth
from tare.images.store import ImageStore
from tare.launch import tasks
from tare.network.addresses import Leases
from tare.network.attach import Remembered
from tare.runtime import exits, lifecycle, podfiles, pods, recovery, strays
from tare.runtime.audit import Finding, State
from tare.runtime.audit_node import members, places
from tare.runtime.ports import Parts
from tare.runtime.records import ContainerState, PodState
from tare.state.database import Database
from tare.state.operations import Operation, Step


class Networks(Protocol):
    """What makes the network's bridges and tables."""

    async def setup(self) -> None:
        """Make what is missing."""


class Images(Protocol):
    """Images' store and its collection."""

    @property
    def store(self) -> ImageStore:
        """What is on this machine."""

    async def collect(self) -> None:
        """Remove what nobody needs."""


class Verifier(Protocol):
    """Makes anew what is damaged of an image."""

    def repair(self, text: str, auth: RegistryAuth | None) -> Any:
        """Asynchronous generator of what was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """What mending works with; `database` is state.db."""

    parts: Parts
    network: Networks
    images: Images
    verifier: Verifier
    root: Path
    database: Database


@dataclass(slots=True, kw_only=True)
class Mend:
    """One finding, and in the end what was done about it."""

    tools: Tools
    finding: Finding
    said: str = ""


async def do(mend: Mend) -> None:
    """What is right for this kind. Raises FailedPrecondition where it is to be left alone."""
    action = ACTIONS.get((mend.finding.state, mend.finding.kind))
    if action is None:
        raise FailedPrecondition(
            f"mend {mend.finding.kind} {mend.finding.name}", cause="nothing can be done about it here"
        )
    mend.said = await action(mend.tools, mend.finding)


REPAIR: Operation[Mend] = Operation(
    "Repair", (Step("mend", do),), ends=True
)  # cut off, it is found anew by the next audit


# What nobody has


async def drop_namespace(tools: Tools, finding: Finding) -> str:
    """Pins and mounts of a pod that has none in this boot."""
    name = Path(finding.name)
    if name.name in PIN_FLAGS:
        users = await asyncio.to_thread(lambda: list(in_namespace(name)))
        if users:
            raise in_use(finding, users)
        await tools.parts.handler.remove_pod_namespaces(finding.owner, None)
        return "let go"
    if name.name == PROC_PIN:
        unpin_proc(name)
    else:
        podfiles.unmount_shm(name.parent)
    return "unmounted"


async def drop_directory(tools: Tools, finding: Finding) -> str:
    """A directory that no pod and no container has."""
    parts, path = tools.parts, Path(finding.name)
    if path.parent == tools.root / "containers":
        users = await asyncio.to_thread(lambda: list(mounted_from(str(path))))
        if users:
            raise in_use(finding, users)
        await parts.snapshots.remove(finding.owner)
    elif path.parent.name == "pods":
        podfiles.remove(path)
    elif path.parent.name == "containers":
        await recovery.remove_streams(parts, finding.owner)
    else:
        await parts.handler.release(finding.owner)
    return "removed"


async def drop_cgroup(tools: Tools, finding: Finding) -> str:
    """A group that no record names, if nobody is in it."""
    users = members(places(tools.parts.cgroups.found, finding.name))
    if users:
        raise in_use(finding, users)
    await tools.parts.cgroups.remove(finding.name)
    return "removed"


async def drop_from_network(tools: Tools, finding: Finding) -> str:
    """Links, leases and ports of pods without a network."""
    await tools.parts.network.recover(set(tools.parts.store.pod_facts))
    return "released"


async def make_table(tools: Tools, finding: Finding) -> str:
    """Bridge and table as they should be."""
    await tools.network.setup()
    return "made anew"


async def end_process(tools: Tools, finding: Finding) -> str:
    """A process of ours that nobody waits for, or what is left of one."""
    process = strays.parse_name(Path(finding.name).name)
    if process is None:
        Path(finding.name).unlink(missing_ok=True)
        return "removed"
    await strays.end(tools.parts.run, tools.parts.handler, [process])
    return "ended" if finding.kind == "process" else "removed"


async def drop_layer(tools: Tools, finding: Finding) -> str:
    """A directory among the layers that is no image's."""
    layers = tools.images.store.layers
    users = await asyncio.to_thread(lambda: list(mounted_from(str(layers.path(finding.name)))))
    if users:
        raise in_use(finding, users)
    layers.forget(finding.name)
    await asyncio.to_thread(layers.empty_trash)
    return "removed"


async def drop_blob(tools: Tools, finding: Finding) -> str:
    """A blob that no image needs, and that may have come past the store."""
    await tools.images.collect()
    content = tools.images.store.content
    if content.size(finding.name) is None:
        content.forget(finding.name)
        await asyncio.to_thread(content.empty_trash)
    return "removed"


async def drop_record(tools: Tools, finding: Finding) -> str:
    """A record of something that is no more, or in a pod that is none."""
    store, (table, _, key) = tools.parts.store, finding.name.partition("/")
    if table == "containers":
        await tools.parts.exits.kill(key, "repair")
        await tools.parts.snapshots.remove(key)
        store.drop_container(key)
    elif table in ("plans", "container_facts"):
        store.drop_container(key)
    elif table == "pod_facts":
        store.drop_pod(key)
    else:
        store.claim(key)
    return "dropped"


# What is not there


async def make_marker(tools: Tools, finding: Finding) -> str:
    """The marker of a process that lives; a stream cannot be made again, since the container has the other end of the old one."""
    process = strays.parse_name(Path(finding.name).name)
    if Path(finding.name).parent.name == "pods" or Path(finding.name).name in podfiles.FILES:
        return rewrite(tools, finding)
    if process is None or not tools.parts.handler.alive(process):
        raise FailedPrecondition(f"make {finding.name} again", cause="the other end of it is gone", hint=finding.hint)
    tasks.mark(str(tools.parts.run), process.pid, process.start_time)
    return "made again"


def rewrite(tools: Tools, finding: Finding) -> str:
    """A pod's files."""
    parts = tools.parts
    pod = parts.store.pod(finding.owner, "repair")
    owner = pods.owner_of(pod.id, pod.config, parts.confinement())
    directory = parts.pod_directory(pod.id)
    directory.mkdir(mode=0o700, exist_ok=True)
    podfiles.write(directory, podfiles.contents(pod.config, pods.hostname_of(pod.config), pod.ips), owner)
    return "written again"


async def mount_shm(tools: Tools, finding: Finding) -> str:
    """A pod's /dev/shm, for containers to come."""
    parts = tools.parts
    pod = parts.store.pod(finding.owner, "repair")
    podfiles.mount_shm(parts.pod_directory(pod.id), pods.owner_of(pod.id, pod.config, parts.confinement()))
    return "mounted again, empty"


async def lose_pod(tools: Tools, finding: Finding) -> str:
    """A pod without its namespace or link is of no use any more."""
    pod = tools.parts.store.pod(finding.owner, "repair")
    if pod.state is PodState.READY:
        pods.record_state(tools.parts, pod.id, lifecycle.PodEvent.LOST)
    return "its pod is NOTREADY"


async def lease_again(tools: Tools, finding: Finding) -> str:
    """The pod's address, if no other pod has it by now; else the pod is of no use any more."""
    networks = tools.database.table("networks", Remembered).items()
    address = ipaddress.ip_address(finding.name)
    for _, remembered in networks:
        if address in ipaddress.ip_network(remembered.subnet):
            if Leases(tools.database).regain(remembered.subnet, finding.name, finding.owner):
                return "held again"
            break
    return await lose_pod(tools, finding)


async def link_again(tools: Tools, finding: Finding) -> str:
    """A bridge is made anew; a pod without its link is of no use."""
    return await (lose_pod if finding.owner else make_table)(tools, finding)


async def lose_container(tools: Tools, finding: Finding) -> str:
    """A container of which nothing is known does not run."""
    record = tools.parts.store.containers.get(finding.owner)
    if record is not None and record.state is ContainerState.RUNNING:
        tools.parts.store.put_container(exits.lost(record, "what was known of it was lost"))
    return "it is EXITED, code 255"


async def make_images(tools: Tools, finding: Finding) -> str:
    """What an image has lost, from its registry."""
    if not finding.owner:
        tools.images.store.layers.forget(finding.name)
        return "its record is dropped"
    done = [item.name async for item in tools.verifier.repair(finding.owner, None)]
    if finding.kind == "layer" and finding.name not in done:
        raise NotFound(f"make {finding.kind} {finding.name} again", cause="the repair of its image did not come by it")
    return "made again"


async def finish(tools: Tools, finding: Finding) -> str:
    """An operation, once more."""
    key, operation = finding.name.split(" ")[:2]
    await recovery.again(tools.parts, key, operation)
    return "done"


# Who uses it


def in_use(finding: Finding, pids: Iterable[int]) -> FailedPrecondition:
    """Why something is left alone."""
    names = ", ".join(f"{pid} ({name_of(pid)})" for pid in sorted(pids)[:10])
    return FailedPrecondition(f"remove {finding.kind} {finding.name}", cause=f"it is in use, by processes {names}")


def name_of(pid: int) -> str:
    """What a process calls itself."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return "ended"


def in_namespace(pin: Path) -> Iterator[int]:
    """Processes in a pinned namespace."""
    try:
        wanted = pin.stat().st_ino
    except FileNotFoundError:
        return
    for pid in all_pids():
        try:
            if os.stat(f"/proc/{pid}/ns/{pin.name}").st_ino == wanted:
                yield pid
        except OSError:
            continue


def mounted_from(directory: str) -> Iterator[int]:
    """A process of each mount namespace in which an overlay stands on this directory."""
    seen: set[int] = set()
    for pid in all_pids():
        try:
            namespace = os.stat(f"/proc/{pid}/ns/mnt").st_ino
            if namespace in seen:
                continue
            seen.add(namespace)
            text = Path(f"/proc/{pid}/mountinfo").read_text(errors="surrogateescape")
        except OSError:
            continue
        options = (line.rpartition(" - ")[2] for line in text.splitlines())
        if any(directory in option for option in options):
            yield pid


def all_pids() -> list[int]:
    """Every process that this PID namespace shows."""
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


Action = Callable[[Tools, Finding], Awaitable[str]]
ACTIONS: Mapping[tuple[State, str], Action] = {
    (State.ORPHAN, "namespace"): drop_namespace,
    (State.ORPHAN, "mount"): drop_namespace,
    (State.ORPHAN, "directory"): drop_directory,
    (State.ORPHAN, "cgroup"): drop_cgroup,
    (State.ORPHAN, "link"): drop_from_network,
    (State.ORPHAN, "lease"): drop_from_network,
    (State.ORPHAN, "port"): drop_from_network,
    (State.ORPHAN, "rule"): make_table,
    (State.ORPHAN, "process"): end_process,
    (State.ORPHAN, "file"): end_process,
    (State.ORPHAN, "layer"): drop_layer,
    (State.ORPHAN, "blob"): drop_blob,
    (State.ORPHAN, "record"): drop_record,
    (State.LOST, "record"): lose_container,
    (State.LOST, "namespace"): lose_pod,
    (State.LOST, "mount"): mount_shm,
    (State.LOST, "file"): make_marker,
    (State.LOST, "rule"): make_table,
    (State.LOST, "link"): link_again,
    (State.LOST, "lease"): lease_again,
    (State.LOST, "layer"): make_images,
    (State.LOST, "blob"): make_images,
    (State.UNFINISHED, "operation"): finish,
}
