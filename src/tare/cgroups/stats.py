"""Reading what control groups count: each call is one pass over a group's files, three to ten microseconds a file.

What a file says is `counters`'s to know; here is where each is. A group may go at any moment, and a kernel may lack a file or a
controller: what cannot be read is None, and never a failure. On a hybrid layout pressure is told by the unified tree, whichever
controllers it has. Call from a thread: the kernel may have sums to make (memory.stat) before it answers.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from tare.cgroups import counters
from tare.cgroups.counters import Memory, Pressure, Transfer
from tare.cgroups.layout import Hierarchy, Layout
from tare.cgroups.names import detached, relative

# Not there, gone while it was read, and switched off (pressure, with psi=0 or cgroup.pressure).
ABSENT = (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP)
LARGE = 1 << 15
HUGEPAGES = "/sys/kernel/mm/hugepages"
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """A group and those below it. `cpu` is nanoseconds."""

    cpu: int | None = None
    memory: Memory | None = None
    cpu_pressure: Pressure | None = None
    memory_pressure: Pressure | None = None
    io_pressure: Pressure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Details:
    """What metrics tell beside `Counters`. Values of `memory`, `throttling` and `events` are under `counters`'s names.

    `threads_max` is 0 where there is no limit; `hugepages` are (size such as "2MB", bytes used, most bytes ever used or None).
    """

    user: int | None = None
    system: int | None = None
    throttling: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    threads: int | None = None
    threads_max: int | None = None
    moved: list[Transfer] = field(default_factory=list)
    requests: list[Transfer] = field(default_factory=list)
    hugepages: list[tuple[str, int, int | None]] = field(default_factory=list)


class Place:
    """A group in one tree: its directory, or the one that it is set aside in."""

    __slots__ = ("_aside", "_directory")

    def __init__(self, tree: Hierarchy | None, path: str) -> None:
        name = relative(path)
        self._directory = f"{tree.directory}/{name}" if tree is not None else None
        self._aside = f"{tree.directory}/{detached(name)}" if tree is not None and tree.version == 1 else None

    def text(self, file: str) -> str | None:
        """A file's text."""
        if self._directory is None:
            return None
        found = read(f"{self._directory}/{file}")
        if found is None and self._aside is not None and os.path.isdir(self._aside):
            self._directory, self._aside = self._aside, None
            return read(f"{self._directory}/{file}")
        return found

    def value(self, file: str, parse: Callable[[str], T]) -> T | None:
        """What a file's text comes to."""
        found = self.text(file)
        return None if found is None else parse(found)


class Reader:
    """Reads the groups of one layout; `version` is that of the tree that has the memory controller (2 where none has)."""

    def __init__(self, layout: Layout, hugepages: str = HUGEPAGES) -> None:
        trees = {name: layout.tree_of(name) for name in ("cpu", "cpuacct", "memory", "pids", "blkio", "io", "hugetlb")}
        unified = layout.unified
        self._unified = unified
        self._cpu = trees["cpu"] or unified
        self._cpuacct = trees["cpuacct"]
        self._memory = trees["memory"]
        self._pids = trees["pids"]
        self._blkio = trees["blkio"]
        self._io = trees["io"]
        self._hugetlb = trees["hugetlb"]
        self._members = self._pids or unified or layout.hierarchies[0]
        self._sizes = page_sizes(hugepages)
        self.version = self._memory.version if self._memory is not None else 2

    def read(self, path: str) -> Counters:
        """What a kubelet asks for again and again."""
        unified = Place(self._unified, path)
        return Counters(
            cpu=self._cpu_time(path),
            memory=self._memory_of(path),
            cpu_pressure=unified.value("cpu.pressure", counters.pressure),
            memory_pressure=unified.value("memory.pressure", counters.pressure),
            io_pressure=unified.value("io.pressure", counters.pressure),
        )

    def _cpu_time(self, path: str) -> int | None:
        if self._cpuacct is not None:
            return Place(self._cpuacct, path).value("cpuacct.usage", int)
        stat = Place(self._unified, path).value("cpu.stat", counters.flat) or {}
        return counters.nanoseconds(stat, "usage_usec")

    def _memory_of(self, path: str) -> Memory | None:
        place = Place(self._memory, path)
        stat = place.value("memory.stat", counters.flat)
        if stat is None:
            return None
        if self.version == 1:
            usage = place.value("memory.usage_in_bytes", int)
            bound = place.value("memory.limit_in_bytes", counters.limit)
            both = place.value("memory.memsw.limit_in_bytes", counters.limit)
            return None if usage is None else counters.memory_v1(stat, usage, bound, both)
        usage = place.value("memory.current", int)
        swap = place.value("memory.swap.current", int) or 0
        bound, swap_limit = (place.value(file, counters.limit) for file in ("memory.max", "memory.swap.max"))
        return None if usage is None else counters.memory_v2(stat, usage, bound, swap, swap_limit)

    def details(self, path: str) -> Details:
        """The rest."""
        cpu, pids = Place(self._cpu, path), Place(self._pids, path)
        stat = cpu.value("cpu.stat", counters.flat) or {}
        if self._cpuacct is not None:
            account = Place(self._cpuacct, path)
            user, system = account.value("cpuacct.usage_user", int), account.value("cpuacct.usage_sys", int)
        else:
            user, system = (counters.nanoseconds(stat, name) for name in ("user_usec", "system_usec"))
        moved, requests = self._transfers(path)
        most = pids.text("pids.max")
        return Details(
            user=user,
            system=system,
            throttling=counters.throttling(stat),
            memory=self._memory_details(path),
            threads=pids.value("pids.current", int),
            threads_max=None if most is None else counters.limit(most) or 0,
            moved=moved,
            requests=requests,
            hugepages=self._hugepages(path),
        )

    def _memory_details(self, path: str) -> dict[str, int]:
        place = Place(self._memory, path)
        stat = place.value("memory.stat", counters.flat)
        if stat is None:
            return {}
        if self.version == 1:
            names = {
                "peak": "memory.max_usage_in_bytes",
                "failures": "memory.failcnt",
                "kernel": "memory.kmem.usage_in_bytes",
            }
            found = {ours: place.value(file, int) for ours, file in names.items()}
            return counters.details_v1(stat, {ours: value for ours, value in found.items() if value is not None})
        events = place.value("memory.events", counters.flat) or {}
        peak = place.value("memory.peak", int)
        files = {"failures": events["max"], "events_max": events["max"]} if "max" in events else {}
        files |= {"events_high": events["high"]} if "high" in events else {}
        return counters.details_v2(stat, files if peak is None else {**files, "peak": peak})

    def _transfers(self, path: str) -> tuple[list[Transfer], list[Transfer]]:
        """Bytes and requests, by block device."""
        if self._blkio is not None:
            place = Place(self._blkio, path)
            files = ("blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_serviced_recursive")
            moved, requests = (place.value(file, counters.transfers_v1) or [] for file in files)
            return moved, requests
        text = Place(self._io, path).text("io.stat") or ""
        return counters.transfers_v2(text, counters.BYTES_V2), counters.transfers_v2(text, counters.REQUESTS_V2)

    def _hugepages(self, path: str) -> list[tuple[str, int, int | None]]:
        if self._hugetlb is None:
            return []
        place = Place(self._hugetlb, path)
        first = self._hugetlb.version == 1
        found = []
        for size in self._sizes:
            used = place.value(f"hugetlb.{size}.{'usage_in_bytes' if first else 'current'}", int)
            most = place.value(f"hugetlb.{size}.max_usage_in_bytes", int) if first else None
            if used is not None:
                found.append((size, used, most))
        return found

    def members(self, path: str) -> list[int]:
        """PIDs in the group and below it, from one tree."""
        tree = self._members
        name = relative(path)
        found: list[int] = []
        for place in (name, detached(name)):
            for directory, _, _ in os.walk(f"{tree.directory}/{place}"):
                # In a threaded group the list cannot be read; its processes are in that of the group above.
                text = read(f"{directory}/cgroup.procs") or ""
                found += [int(line) for line in text.split()]
        return [pid for pid in dict.fromkeys(found) if pid]


def read(path: str) -> str | None:
    """A file's text; None where it is not there, or its group has just gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
    try:
        parts = []
        while part := os.read(fd, LARGE):
            parts.append(part)
        return b"".join(parts).decode()
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
    finally:
        os.close(fd)


def page_sizes(directory: str) -> tuple[str, ...]:
    """The sizes of huge pages of this machine, as the hugetlb controller's files name them: "2MB", "1GB"."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return ()
    sizes = sorted(int(name.removeprefix("hugepages-").removesuffix("kB")) for name in names)
    return tuple(size_name(size) for size in sizes)


def size_name(kilobytes: int) -> str:
    """In the largest unit that it fills."""
    for unit, length in (("GB", 1 << 20), ("MB", 1 << 10)):
        if kilobytes >= length:
            return f"{kilobytes // length}{unit}"
    return f"{kilobytes}KB"
