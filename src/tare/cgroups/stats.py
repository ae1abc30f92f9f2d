"""Reading what control groups count.

What a file says is `counters`'s to know; here is where each is. A group may go at any moment, and a kernel may lack a file or a
controller: what cannot be read is None, and never a failure. On a hybrid layout pressure is told by the unified tree, whichever
controllers it has. Call from a thread: the kernel may have sums to make (memory.stat) before it answers.

The files of `Reader.read` are kept open (`held`), since opening one costs nine microseconds and reading it one.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TypeVar

from tare.cgroups import counters
from tare.cgroups.counters import Memory, Pressure, Transfer
from tare.cgroups.layout import Hierarchy, Layout
from tare.cgroups.names import detached, relative

# Not there, gone while it was read, and switched off (pressure, with psi=0 or cgroup.pressure).
ABSENT = (errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP)
LARGE = 1 << 14
MOST_OPEN = 4096  # descriptors, and no more than a quarter of what this process may have
MEMORY_V1 = ("memory.stat", "memory.usage_in_bytes", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
MEMORY_V2 = ("memory.stat", "memory.current", "memory.max", "memory.swap.current", "memory.swap.max")
PRESSURE = ("cpu.pressure", "memory.pressure", "io.pressure")
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
        self._directory, self._aside = directories(tree, path)

    def text(self, file: str) -> str | None:
        """A file's text."""
        if not self._directory:
            return None
        found = read(f"{self._directory}/{file}")
        if found is None and self._aside and os.path.isdir(self._aside):
            self._directory, self._aside = self._aside, ""
            return read(f"{self._directory}/{file}")
        return found

    def value(self, file: str, parse: Callable[[str], T]) -> T | None:
        """What a file's text comes to."""
        found = self.text(file)
        return None if found is None else parse(found)


def directories(tree: Hierarchy | None, path: str) -> tuple[str, str]:
    """Where a group is in a tree, and where it would be set aside; "" for nowhere."""
    if tree is None:
        return "", ""
    name = relative(path)
    return f"{tree.directory}/{name}", f"{tree.directory}/{detached(name)}"


class Reader:
    """Reads the groups of one layout; `version` is that of the tree that has the memory controller (2 where none has)."""

    def __init__(self, layout: Layout, hugepages: str = HUGEPAGES) -> None:
        trees = {name: layout.tree_of(name) for name in ("cpu", "cpuacct", "memory", "pids", "blkio", "io", "hugetlb")}
        unified = layout.unified
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
        files = [(self._memory, file) for file in (MEMORY_V1 if self.version == 1 else MEMORY_V2)]
        files += [(unified, file) for file in PRESSURE]
        files.append((self._cpuacct, "cpuacct.usage") if self._cpuacct is not None else (unified, "cpu.stat"))
        self._held = Held([(tree, file) for tree, file in files if tree is not None])

    def read(self, path: str) -> Counters:
        """What a kubelet asks for again and again."""
        texts = self._held.read(path)
        cpu_pressure, memory_pressure, io_pressure = (parsed(texts, file, counters.pressure) for file in PRESSURE)
        return Counters(
            cpu=self._cpu_time(texts),
            memory=self._memory_of(texts),
            cpu_pressure=cpu_pressure,
            memory_pressure=memory_pressure,
            io_pressure=io_pressure,
        )

    def keep(self, paths: Set[str]) -> None:
        """Of all other groups, keep nothing open."""
        self._held.keep(paths)

    def close(self) -> None:
        """Keep nothing open."""
        self._held.keep(frozenset())

    def _cpu_time(self, texts: Mapping[str, str]) -> int | None:
        if self._cpuacct is not None:
            return parsed(texts, "cpuacct.usage", int)
        return counters.nanoseconds(parsed(texts, "cpu.stat", counters.flat) or {}, "usage_usec")

    def _memory_of(self, texts: Mapping[str, str]) -> Memory | None:
        stat = parsed(texts, "memory.stat", counters.flat)
        usage = parsed(texts, "memory.usage_in_bytes" if self.version == 1 else "memory.current", int)
        if stat is None or usage is None:
            return None
        if self.version == 1:
            bound = parsed(texts, "memory.limit_in_bytes", counters.limit)
            return counters.memory_v1(stat, usage, bound, parsed(texts, "memory.memsw.limit_in_bytes", counters.limit))
        swap = parsed(texts, "memory.swap.current", int) or 0
        bound, swap_limit = (parsed(texts, file, counters.limit) for file in ("memory.max", "memory.swap.max"))
        return counters.memory_v2(stat, usage, bound, swap, swap_limit)

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


class Held:
    """The same files of many groups, kept open; `files` are their trees and names. A group's that would be too many are opened each time.

    The calls of several threads wait for each other, since a descriptor that one closes may be another file the next moment.
    """

    def __init__(self, files: Sequence[tuple[Hierarchy, str]]) -> None:
        self._files = files
        self._open: dict[str, dict[str, int]] = {}
        self._lock = threading.Lock()
        self._most = min(MOST_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4) // max(1, len(files))

    def read(self, path: str) -> dict[str, str]:
        """The texts of those files of a group that are there."""
        with self._lock:
            group = self._open.get(path)
            if group is None:
                return self._read_new(path)
            try:
                return self._texts(path, group)
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
                # The group has gone. Another may have its name by now.
                self._close(path)
                return self._read_new(path)

    def _read_new(self, path: str) -> dict[str, str]:
        self._open[path] = {}
        try:
            texts = self._texts(path, self._open[path])
        except OSError as error:
            self._close(path)
            if error.errno not in ABSENT:
                raise
            return {}
        if not texts or len(self._open) > self._most:
            self._close(path)
        return texts

    def _texts(self, path: str, group: dict[str, int]) -> dict[str, str]:
        """Raises OSError where the group has gone."""
        texts = {}
        for tree, file in self._files:
            fd = group.get(file)
            if fd is None:
                fd = open_in(tree, path, file)
                if fd is None:
                    continue
                group[file] = fd
            try:
                texts[file] = whole(fd)
            except OSError as error:
                # Pressure that is switched off: its file is there, and cannot be read.
                if error.errno != errno.EOPNOTSUPP:
                    raise
        return texts

    def keep(self, paths: Set[str]) -> None:
        """Close the files of all other groups."""
        with self._lock:
            for path in self._open.keys() - paths:
                self._close(path)

    def _close(self, path: str) -> None:
        for fd in self._open.pop(path).values():
            os.close(fd)


def open_in(tree: Hierarchy, path: str, file: str) -> int | None:
    """A descriptor of a group's file; None where it is not there."""
    for directory in filter(None, directories(tree, path)):
        try:
            return os.open(f"{directory}/{file}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
    return None


def whole(fd: int) -> str:
    """A file's text from its beginning. Raises OSError."""
    # The kernel makes the text at each read from the beginning, and all of it: only a full buffer leaves something to read.
    parts = [os.pread(fd, LARGE, 0)]
    while len(parts[-1]) == LARGE:
        parts.append(os.pread(fd, LARGE, LARGE * len(parts)))
    return b"".join(parts).decode()


def parsed(texts: Mapping[str, str], file: str, parse: Callable[[str], T]) -> T | None:
    """What a file's text comes to; None where it is not among them."""
    text = texts.get(file)
    return None if text is None else parse(text)


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
