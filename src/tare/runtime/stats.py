"""What pods and containers use, looked up when somebody asks: nothing runs between questions.

    question ─► one pass over the control groups (a thread) ─► rates from the question before ─► ContainerStats, PodStats
            └─► sizes of writable layers (`storage/sizes.py`), of now or of a while ago
            └─► interfaces in the pods' network namespaces (`traffic`), for pods only

A pod's numbers are its own control group's where it has one to itself; where the group is not there in some tree, or other pods
are in it too, they are the sum of its containers'.
"""

from __future__ import annotations

import asyncio
import collections
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tare.cgroups.counters import Memory
from tare.cgroups.stats import Counters, Details, Reader
from tare.runtime import census, traffic
from tare.runtime.census import Census
from tare.runtime.ports import Parts
from tare.runtime.rates import Rates
from tare.runtime.records import ContainerRecord, ContainerState, PodRecord, PodState
from tare.runtime.traffic import Interface
from tare.storage.sizes import Size, Sizes

NOTHING = Counters()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerStats:
    """`at` is ns since the epoch; `counters` are empty for a container that does not run; `size` is None until it has been counted."""

    record: ContainerRecord
    at: int
    counters: Counters
    nano_cores: int | None
    size: Size | None
    file_system: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PodStats:
    """`interfaces` is None for a pod without a network namespace of its own; `processes` counts those of its containers."""

    record: PodRecord
    at: int
    counters: Counters
    nano_cores: int | None
    interfaces: tuple[Interface, ...] | None
    processes: int
    containers: tuple[ContainerStats, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSystem:
    """What writable layers lie on: its block device's numbers, and what it holds in all."""

    major: int
    minor: int
    bytes: int
    inodes: int
    inodes_free: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerDetails:
    """All that metrics tell of a container."""

    stats: ContainerStats
    cgroup: str
    details: Details
    census: Census
    oom_kills: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PodDetails:
    """All that metrics tell of a pod."""

    record: PodRecord
    at: int
    interfaces: tuple[Interface, ...] | None
    containers: tuple[ContainerDetails, ...]
    file_system: FileSystem


@dataclass(frozen=True, slots=True)
class Reading:
    """A group's counters, and when they were read: `at` in ns since the epoch, `clock` in ns of a clock that is never set."""

    at: int
    clock: int
    counters: Counters


class Stats:
    """The statistics port of the CRI face. Lists are of what runs: others use nothing, and a kubelet does not expect them."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._store = parts.store
        self._reader = Reader(parts.cgroups.found)
        self._sizes = Sizes(parts.snapshots.count)
        self._rates = Rates()

    @property
    def cgroup_version(self) -> int:
        """Whose counters there are."""
        return self._reader.version

    # Containers

    async def container(self, container_id: str) -> ContainerStats:
        """One, in any state. Raises NotFound."""
        (stats,) = await self.containers([self._store.container(container_id, "measure")])
        return stats

    async def containers(self, records: Sequence[ContainerRecord]) -> list[ContainerStats]:
        """Each of these."""
        # One after the other: threads that do next to nothing but call the kernel hinder each other.
        sizes = await self._sizes.get(record.id for record in records)
        readings = await asyncio.to_thread(self._read, [self._group(record.id) for record in records])
        self._forget()
        return [self._stats(record, reading, sizes) for record, reading in zip(records, readings, strict=True)]

    def _stats(self, record: ContainerRecord, reading: Reading, sizes: Mapping[str, Size]) -> ContainerStats:
        return ContainerStats(
            record=record,
            at=reading.at,
            counters=reading.counters,
            nano_cores=self._rate(record.id, reading),
            size=sizes.get(record.id),
            file_system=str(self._parts.snapshots.file_system),
        )

    def _group(self, container_id: str) -> str:
        """Where a container's group is; "" where it does not run."""
        facts = self._store.container_facts.get(container_id)
        return facts.cgroup if facts is not None else ""

    def _rate(self, key: str, reading: Reading) -> int | None:
        usage = reading.counters.cpu
        return None if usage is None else self._rates.of(key, usage, reading.clock)

    def _read(self, paths: Iterable[str]) -> list[Reading]:
        """Blocks."""
        self._keep_open()
        return [
            Reading(time.time_ns(), time.monotonic_ns(), self._reader.read(path) if path else NOTHING) for path in paths
        ]

    def _forget(self) -> None:
        """Keep nothing of what is no more."""
        self._sizes.keep(self._store.containers.keys())
        self._rates.keep(self._store.containers.keys() | self._store.pods.keys())

    def running(self, pod_id: str) -> list[ContainerRecord]:
        """A pod's containers that run, oldest first."""
        members = (self._store.containers.get(member) for member in self._store.members(pod_id))
        return [record for record in members if record is not None and record.state is ContainerState.RUNNING]

    # Pods

    async def pod(self, pod_id: str) -> PodStats:
        """One, in any state. Raises NotFound."""
        (stats,) = await self.pods([self._store.pod(pod_id, "measure")])
        return stats

    async def pods(self, records: Sequence[PodRecord]) -> list[PodStats]:
        """Each of these."""
        members = {record.id: self.running(record.id) for record in records}
        ready = {pod.id: pod.cgroup_parent for pod in self._store.pods.values() if pod.state is PodState.READY}
        owners = collections.Counter(ready.values())
        parents = [pod.cgroup_parent if pod.id in ready and owners[pod.cgroup_parent] == 1 else "" for pod in records]
        inside = [record for pod in records for record in members[pod.id]]
        containers = await self.containers(inside)
        groups, counts, interfaces = await asyncio.to_thread(
            lambda: (
                self._read(parents),
                self._count(self._group(record.id) for record in inside),
                traffic.look(self._namespaces(records)),
            )
        )
        stats, processes = iter(containers), iter(counts)
        found = []
        for record, reading in zip(records, groups, strict=True):
            own = tuple(next(stats) for _ in members[record.id])
            reading = Reading(reading.at, reading.clock, completed(reading.counters, [item.counters for item in own]))
            found.append(
                PodStats(
                    record=record,
                    at=reading.at,
                    counters=reading.counters,
                    nano_cores=self._rate(record.id, reading),
                    interfaces=interfaces.get(self._namespace(record.id)),
                    processes=sum(next(processes) for _ in own),
                    containers=own,
                )
            )
        return found

    def _count(self, paths: Iterable[str]) -> list[int]:
        """How many processes are in each group. Blocks."""
        return [len(self._reader.members(path)) if path else 0 for path in paths]

    def _namespace(self, pod_id: str) -> Path:
        """Where a pod's network namespace is pinned; nowhere ("") for one with the node's."""
        facts = self._store.pod_facts.get(pod_id)
        return Path(facts.pins.get("net", "")) if facts is not None else Path()

    def _namespaces(self, records: Iterable[PodRecord]) -> list[Path]:
        found = (self._namespace(record.id) for record in records)
        return [path for path in found if path != Path()]

    # Metrics

    async def details(self) -> list[PodDetails]:
        """Everything, of all pods that are READY."""
        records = [record for record in self._store.pods.values() if record.state is PodState.READY]
        members = [record for pod in records for record in self.running(pod.id)]
        stats = await self.containers(members)
        found, interfaces, disk = await asyncio.to_thread(
            lambda: (
                self._details(stats),
                traffic.look(self._namespaces(records)),
                file_system(self._parts.snapshots.file_system),
            )
        )
        by_pod: dict[str, list[ContainerDetails]] = {}
        for item, group, more, taken in found:
            # Not in the thread: what counts OOM kills for systemd's scopes belongs to the loop.
            kills = self._parts.cgroups.oom_kills(group)
            told = ContainerDetails(stats=item, cgroup=group, details=more, census=taken, oom_kills=kills)
            by_pod.setdefault(item.record.pod_id, []).append(told)
            await asyncio.sleep(0)
        return [
            PodDetails(
                record=record,
                at=time.time_ns(),
                interfaces=interfaces.get(self._namespace(record.id)),
                containers=tuple(by_pod.get(record.id, ())),
                file_system=disk,
            )
            for record in records
        ]

    def _details(self, containers: Iterable[ContainerStats]) -> list[tuple[ContainerStats, str, Details, Census]]:
        """Of those that run still, with where their groups are. Blocks."""
        found = []
        for stats in containers:
            facts = self._store.container_facts.get(stats.record.id)
            if facts is not None:
                taken = census.take(self._reader.members(facts.cgroup), facts.process.pid)
                found.append((stats, facts.cgroup, self._reader.details(facts.cgroup), taken))
        return found

    # Housekeeping

    async def tidy(self) -> None:
        """Let go of what is kept open of groups that are no more, also where nobody asks any more."""
        await asyncio.to_thread(self._keep_open)
        self._forget()

    def _keep_open(self) -> None:
        containers = {facts.cgroup for facts in list(self._store.container_facts.values())}
        pods = {pod.cgroup_parent for pod in list(self._store.pods.values()) if pod.state is PodState.READY}
        self._reader.keep(containers | pods)


def completed(own: Counters, inside: Sequence[Counters]) -> Counters:
    """A pod's counters, with what its own group does not tell summed up from its containers'."""
    used = [item.cpu for item in inside if item.cpu is not None]
    memories = [item.memory for item in inside if item.memory is not None]
    return Counters(
        cpu=own.cpu if own.cpu is not None else sum(used) if used else None,
        memory=own.memory if own.memory is not None else summed(memories) if memories else None,
        cpu_pressure=own.cpu_pressure,
        memory_pressure=own.memory_pressure,
        io_pressure=own.io_pressure,
    )


def summed(memories: Sequence[Memory]) -> Memory:
    """What they use together; a sum has no limit."""
    return Memory(
        usage=sum(item.usage for item in memories),
        inactive_file=sum(item.inactive_file for item in memories),
        rss=sum(item.rss for item in memories),
        page_faults=sum(item.page_faults for item in memories),
        major_page_faults=sum(item.major_page_faults for item in memories),
        swap=sum(item.swap for item in memories),
    )


def file_system(path: Path) -> FileSystem:
    """The file system that a path is on. Raises OSError."""
    whole, device = os.statvfs(path), os.stat(path).st_dev
    return FileSystem(
        major=os.major(device),
        minor=os.minor(device),
        bytes=whole.f_blocks * whole.f_frsize,
        inodes=whole.f_files,
        inodes_free=whole.f_ffree,
    )
