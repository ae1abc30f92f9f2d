"""What a control group counts, from the text of its files, v1's or v2's. Pure; `stats` reads the files.

Sources: kernel admin-guide/cgroup-v2.rst, cgroup-v1/{cpuacct,memory,blkio-controller}.rst and accounting/psi.rst. Units are one set for
both versions: nanoseconds of CPU, bytes of memory, microseconds of pressure. A key that a kernel does not have is left out, not made 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

MICROSECOND = 1000  # in nanoseconds
# v1 has no word for "no limit": its counters end a page below 2**63.
NO_LIMIT_V1 = 1 << 62

Counts = Mapping[str, int]


class Stall(NamedTuple):
    """One line of a pressure file: the time in all (µs), and its share (%) of the last 10, 60 and 300 s."""

    total: int
    avg10: float
    avg60: float
    avg300: float


class Pressure(NamedTuple):
    """`some`: at least one task waited; `full`: all did (None where the kernel does not say)."""

    some: Stall
    full: Stall | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """`usage` with page cache and kernel memory; `inactive_file` is cache that is reclaimed first; limits are None where there are none."""

    usage: int
    inactive_file: int
    rss: int
    page_faults: int
    major_page_faults: int
    swap: int
    limit: int | None = None
    swap_limit: int | None = None

    @property
    def working_set(self) -> int:
        """What a kubelet evicts by: usage without the cache that is reclaimed first."""
        return max(0, self.usage - self.inactive_file)

    @property
    def available(self) -> int | None:
        """The limit less the working set; None without a limit."""
        return None if self.limit is None else max(0, self.limit - self.working_set)

    @property
    def swap_available(self) -> int | None:
        """The limit on swap less what is used of it; None without a limit."""
        return None if self.swap_limit is None else max(0, self.swap_limit - self.swap)


@dataclass(frozen=True, slots=True)
class Transfer:
    """What one operation ("Read", "Write" …) has moved on one block device; `value` in bytes or requests."""

    major: int
    minor: int
    operation: str
    value: int


def flat(text: str) -> dict[str, int]:
    """A file of "key number" lines: memory.stat, cpu.stat, memory.events."""
    words = text.split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def limit(text: str) -> int | None:
    """A limit of either version; None for none."""
    word = text.strip()
    if word == "max":
        return None
    value = int(word)
    return None if value >= NO_LIMIT_V1 or value < 0 else value


def pressure(text: str) -> Pressure | None:
    """A pressure file: "some avg10=0.00 avg60=0.00 avg300=0.00 total=0", and the same of "full"; empty where nothing is accounted."""
    words = text.split()
    if len(words) < 5:
        return None
    return Pressure(stall(words[1:5]), stall(words[6:10]) if len(words) >= 10 else None)


def stall(words: list[str]) -> Stall:
    """The values of a line, which the kernel always has in this order."""
    avg10, avg60, avg300, total = (word.partition("=")[2] for word in words)
    return Stall(int(total), float(avg10), float(avg60), float(avg300))


def memory_v1(stat: Counts, usage: int, bound: int | None, both: int | None) -> Memory:
    """From memory.stat (its total_ keys count the groups below too) and the limits on memory and on memory with swap."""
    return Memory(
        usage=usage,
        inactive_file=stat.get("total_inactive_file", 0),
        rss=stat.get("total_rss", 0),
        page_faults=stat.get("total_pgfault", 0),
        major_page_faults=stat.get("total_pgmajfault", 0),
        swap=stat.get("total_swap", 0),
        limit=bound,
        swap_limit=None if both is None else max(0, both - bound) if bound is not None else both,
    )


def memory_v2(stat: Counts, usage: int, bound: int | None, swap: int, swap_limit: int | None) -> Memory:
    """From memory.stat, which counts the groups below too."""
    return Memory(
        usage=usage,
        inactive_file=stat.get("inactive_file", 0),
        rss=stat.get("anon", 0),
        page_faults=stat.get("pgfault", 0),
        major_page_faults=stat.get("pgmajfault", 0),
        swap=swap,
        limit=bound,
        swap_limit=swap_limit,
    )


def details_v1(stat: Counts, files: Counts) -> dict[str, int]:
    """Of memory.stat what metrics tell, under names of our own; `files` are the values of other files under the same names."""
    names = {
        "cache": "total_cache",
        "mapped_file": "total_mapped_file",
        "active_file": "total_active_file",
        "inactive_file": "total_inactive_file",
        "dirty": "total_dirty",
        "writeback": "total_writeback",
        "refault_file": "total_workingset_refault_file",
        "refault_anon": "total_workingset_refault_anon",
        "own_faults": "pgfault",
        "own_major_faults": "pgmajfault",
    }
    return {**{ours: stat[theirs] for ours, theirs in names.items() if theirs in stat}, **files}


def details_v2(stat: Counts, files: Counts) -> dict[str, int]:
    """As `details_v1`. v2 does not tell a group's own faults from those below it."""
    names = {
        "cache": "file",
        "mapped_file": "file_mapped",
        "active_file": "active_file",
        "inactive_file": "inactive_file",
        "dirty": "file_dirty",
        "writeback": "file_writeback",
        "refault_file": "workingset_refault_file",
        "refault_anon": "workingset_refault_anon",
        "scanned": "pgscan",
        "stolen": "pgsteal",
        "own_faults": "pgfault",
        "own_major_faults": "pgmajfault",
    }
    found = {ours: stat[theirs] for ours, theirs in names.items() if theirs in stat}
    # "kernel" came with Linux 5.18; before, these are what there is of it.
    found["kernel"] = stat.get("kernel", stat.get("kernel_stack", 0) + stat.get("slab", 0))
    return {**found, **files}


def throttling(stat: Counts) -> dict[str, int]:
    """Of cpu.stat what is about quotas; times are nanoseconds on v1 and microseconds on v2, ours are nanoseconds."""
    found = {
        "periods": stat.get("nr_periods"),
        "throttled_periods": stat.get("nr_throttled"),
        "throttled": stat.get("throttled_time", nanoseconds(stat, "throttled_usec")),
        "bursts": stat.get("nr_bursts"),
        "burst": stat.get("burst_time", nanoseconds(stat, "burst_usec")),
    }
    return {name: value for name, value in found.items() if value is not None}


def nanoseconds(stat: Counts, key: str) -> int | None:
    """A time that v2 tells in microseconds."""
    return stat[key] * MICROSECOND if key in stat else None


def transfers_v1(text: str) -> list[Transfer]:
    """blkio.throttle.io_service_bytes_recursive and io_serviced_recursive: "8:0 Read 4096"; the last line is the sum of all devices."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3:
            major, _, minor = words[0].partition(":")
            found.append(Transfer(int(major), int(minor), words[1], int(words[2])))
    return found


BYTES_V2 = {"rbytes": "Read", "wbytes": "Write", "dbytes": "Discard"}
REQUESTS_V2 = {"rios": "Read", "wios": "Write", "dios": "Discard"}


def transfers_v2(text: str, operations: Mapping[str, str]) -> list[Transfer]:
    """io.stat: "8:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0".

    Some kernels put devices that never moved anything before the next one's in the same line: the last is the one meant.
    """
    found = []
    for line in text.splitlines():
        words = line.split()
        devices = [word for word in words if "=" not in word]
        for key, _, value in (word.partition("=") for word in words if "=" in word):
            if key in operations and devices:
                major, _, minor = devices[-1].partition(":")
                found.append(Transfer(int(major), int(minor), operations[key], int(value)))
    return found
