"""The families of metrics that containers have, under cAdvisor's names, labels and meanings: one table by subject, and how each number is found.

Pure: `stats` looks the numbers up, `metrics` makes samples of them. CRI's values are whole numbers, so what is named `_seconds` is cut
to whole seconds.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from tare.cgroups.counters import NO_LIMIT_V1, Transfer
from tare.cgroups.stats import Counters
from tare.runtime.records import Resources
from tare.runtime.stats import ContainerDetails, FileSystem

DEFAULT_PERIOD = 100_000  # µs
DEFAULT_SHARES = 1024


class Kind(enum.IntEnum):
    """CRI MetricType."""

    COUNTER = 0
    GAUGE = 1


@dataclass(frozen=True, slots=True)
class Subject:
    """What the values of a container's families are made from."""

    item: ContainerDetails
    disk: FileSystem
    device: Callable[[int, int], str]

    @property
    def counters(self) -> Counters:
        """Of its cgroup."""
        return self.item.stats.counters

    @property
    def resources(self) -> Resources:
        """Its limits as last accepted."""
        return self.item.stats.record.resources


# Further label values, and the number.
Values = Iterable[tuple[tuple[str, ...], int]]


@dataclass(frozen=True, slots=True)
class Family:
    """`labels` come after those that all have (`metrics.LABELS`); `v2` is of cgroup v2 alone."""

    name: str
    help: str
    kind: Kind
    labels: tuple[str, ...]
    values: Callable[[Subject], Values]
    v2: bool = False


def counter(name: str, help: str, value: Callable[[Subject], int | None], *, v2: bool = False) -> Family:
    """A family with one series a container, which only grows; without it where there is no value."""
    return Family(name, help, Kind.COUNTER, (), single(value), v2)


def gauge(name: str, help: str, value: Callable[[Subject], int | None]) -> Family:
    """A family with one series a container, which moves both ways."""
    return Family(name, help, Kind.GAUGE, (), single(value))


def single(value: Callable[[Subject], int | None]) -> Callable[[Subject], Values]:
    """The values of a family without labels of its own."""

    def values(subject: Subject) -> Iterator[tuple[tuple[str, ...], int]]:
        number = value(subject)
        if number is not None:
            yield (), number

    return values


def seconds(nanoseconds: int | None) -> int | None:
    """Whole ones."""
    return None if nanoseconds is None else nanoseconds // 1_000_000_000


# CPU


def throttling(name: str) -> Callable[[Subject], int | None]:
    """Counted for those that have a quota, as cAdvisor does."""
    return lambda s: s.item.details.throttling.get(name) if s.resources.cpu_quota > 0 else None


def throttled_seconds(name: str) -> Callable[[Subject], int | None]:
    """The same, of a time."""
    return lambda s: seconds(throttling(name)(s))


def cpu_usage(s: Subject) -> Values:
    """One series for all CPUs."""
    return [] if s.counters.cpu is None else [(("total",), s.counters.cpu // 1_000_000_000)]


CPU = (
    counter(
        "container_cpu_user_seconds_total",
        "CPU time spent in user mode, in seconds.",
        lambda s: seconds(s.item.details.user),
    ),
    counter(
        "container_cpu_system_seconds_total",
        "CPU time spent in the kernel, in seconds.",
        lambda s: seconds(s.item.details.system),
    ),
    Family("container_cpu_usage_seconds_total", "CPU time spent, in seconds.", Kind.COUNTER, ("cpu",), cpu_usage),
    counter("container_cpu_cfs_periods_total", "Periods of the CPU quota that have passed.", throttling("periods")),
    counter(
        "container_cpu_cfs_throttled_periods_total",
        "Periods in which the CPU quota was used up.",
        throttling("throttled_periods"),
    ),
    counter(
        "container_cpu_cfs_throttled_seconds_total",
        "Time for which the CPU quota held the container up, in seconds.",
        throttled_seconds("throttled"),
    ),
    counter("container_cpu_cfs_burst_periods_total", "Periods with a burst over the CPU quota.", throttling("bursts")),
    counter(
        "container_cpu_cfs_burst_seconds_total",
        "CPU time spent in bursts over the CPU quota, in seconds.",
        throttled_seconds("burst"),
    ),
)

# Memory


def memory(name: str) -> Callable[[Subject], int | None]:
    """One of the cgroup's details."""
    return lambda s: s.item.details.memory.get(name)


def faults(s: Subject) -> Values:
    """Page faults of the container's own group, and with those of groups that it made inside of it."""
    own, whole = s.item.details.memory, s.counters.memory
    if whole is not None and "own_faults" in own:
        yield ("pgfault", "container"), own["own_faults"]
        yield ("pgmajfault", "container"), own["own_major_faults"]
        yield ("pgfault", "hierarchy"), whole.page_faults
        yield ("pgmajfault", "hierarchy"), whole.major_page_faults


MEMORY = (
    gauge("container_memory_cache", "Page cache, in bytes.", memory("cache")),
    gauge(
        "container_memory_rss",
        "Anonymous memory, in bytes.",
        lambda s: s.counters.memory.rss if s.counters.memory else None,
    ),
    gauge("container_memory_kernel_usage", "Memory of the kernel for the container, in bytes.", memory("kernel")),
    gauge("container_memory_mapped_file", "Files mapped into memory, in bytes.", memory("mapped_file")),
    gauge(
        "container_memory_swap", "Swap used, in bytes.", lambda s: s.counters.memory.swap if s.counters.memory else None
    ),
    counter("container_memory_failcnt", "How often memory use came up against its limit.", memory("failures")),
    gauge(
        "container_memory_usage_bytes",
        "Memory used, page cache and kernel memory included, in bytes.",
        lambda s: s.counters.memory.usage if s.counters.memory else None,
    ),
    gauge("container_memory_max_usage_bytes", "The most memory that was ever used, in bytes.", memory("peak")),
    gauge(
        "container_memory_working_set_bytes",
        "Memory used without inactive page cache, in bytes.",
        lambda s: s.counters.memory.working_set if s.counters.memory else None,
    ),
    gauge("container_memory_total_active_file_bytes", "Active page cache, in bytes.", memory("active_file")),
    gauge("container_memory_total_inactive_file_bytes", "Inactive page cache, in bytes.", memory("inactive_file")),
    Family(
        "container_memory_failures_total",
        "Page faults.",
        Kind.COUNTER,
        ("failure_type", "scope"),
        faults,
    ),
    counter(
        "container_memory_events_high_total",
        "How often memory.high slowed the container down.",
        memory("events_high"),
        v2=True,
    ),
    counter(
        "container_memory_events_max_total",
        "How often memory use was about to pass memory.max.",
        memory("events_max"),
        v2=True,
    ),
    gauge("container_memory_file_dirty_bytes", "Page cache not yet written back, in bytes.", memory("dirty")),
    gauge("container_memory_file_writeback_bytes", "Page cache being written back, in bytes.", memory("writeback")),
    counter("container_memory_pgscan_total", "Pages looked at by reclaim.", memory("scanned"), v2=True),
    counter("container_memory_pgsteal_total", "Pages reclaimed.", memory("stolen"), v2=True),
    counter(
        "container_memory_workingset_refault_file_total",
        "Pages of files read again after they were reclaimed.",
        memory("refault_file"),
    ),
    counter(
        "container_memory_workingset_refault_anon_total",
        "Anonymous pages read again after they were reclaimed.",
        memory("refault_anon"),
    ),
    counter("container_oom_events_total", "Processes killed for want of memory.", lambda s: s.item.oom_kills),
)


def huge(which: int) -> Callable[[Subject], Values]:
    """A number of each size of huge pages."""

    def values(s: Subject) -> Iterator[tuple[tuple[str, ...], int]]:
        for size, used, most in s.item.details.hugepages:
            number = (used, most)[which]
            if number is not None:
                yield (size,), number

    return values


HUGEPAGES = (
    Family(
        "container_hugetlb_usage_bytes",
        "Huge pages used, in bytes.",
        Kind.GAUGE,
        ("pagesize",),
        huge(0),
    ),
    Family(
        "container_hugetlb_max_usage_bytes",
        "The most huge pages that were ever used, in bytes.",
        Kind.GAUGE,
        ("pagesize",),
        huge(1),
    ),
)

# Files and disks


def on_disk(value: Callable[[Subject], int | None]) -> Callable[[Subject], Values]:
    """A number about the file system of the writable layer."""

    def values(s: Subject) -> Iterator[tuple[tuple[str, ...], int]]:
        number = value(s)
        if number is not None:
            yield (s.device(s.disk.major, s.disk.minor),), number

    return values


def transfers(of: Callable[[Subject], Sequence[Transfer]], operation: str) -> Callable[[Subject], Values]:
    """What one operation has moved, by device."""
    return lambda s: (
        ((s.device(item.major, item.minor),), item.value) for item in of(s) if item.operation == operation
    )


def block_devices(s: Subject) -> Values:
    """Each operation on each device."""
    for item in s.item.details.moved:
        labels = (s.device(item.major, item.minor), str(item.major), str(item.minor), item.operation)
        yield labels, item.value


DISKS = (
    Family(
        "container_fs_inodes_free",
        "Free inodes of the file system that the writable layer is on.",
        Kind.GAUGE,
        ("device",),
        on_disk(lambda s: s.disk.inodes_free),
    ),
    Family(
        "container_fs_inodes_total",
        "Inodes of the file system that the writable layer is on.",
        Kind.GAUGE,
        ("device",),
        on_disk(lambda s: s.disk.inodes),
    ),
    Family(
        "container_fs_limit_bytes",
        "Size of the file system that the writable layer is on, in bytes.",
        Kind.GAUGE,
        ("device",),
        on_disk(lambda s: s.disk.bytes),
    ),
    Family(
        "container_fs_usage_bytes",
        "What the writable layer takes, in bytes.",
        Kind.GAUGE,
        ("device",),
        on_disk(lambda s: s.item.stats.size.bytes if s.item.stats.size else None),
    ),
    Family(
        "container_fs_reads_bytes_total",
        "Bytes read.",
        Kind.COUNTER,
        ("device",),
        transfers(lambda s: s.item.details.moved, "Read"),
    ),
    Family(
        "container_fs_reads_total",
        "Reads completed.",
        Kind.COUNTER,
        ("device",),
        transfers(lambda s: s.item.details.requests, "Read"),
    ),
    Family(
        "container_fs_writes_bytes_total",
        "Bytes written.",
        Kind.COUNTER,
        ("device",),
        transfers(lambda s: s.item.details.moved, "Write"),
    ),
    Family(
        "container_fs_writes_total",
        "Writes completed.",
        Kind.COUNTER,
        ("device",),
        transfers(lambda s: s.item.details.requests, "Write"),
    ),
    Family(
        "container_blkio_device_usage_total",
        "Bytes moved, by kind of operation.",
        Kind.COUNTER,
        ("device", "major", "minor", "operation"),
        block_devices,
    ),
)

# Processes, limits, times


def open_files(s: Subject) -> Values:
    """Under cAdvisor's name for it."""
    return [] if s.item.census.open_files is None else [(("max_open_files",), s.item.census.open_files)]


def reservation(s: Subject) -> int:
    """What memory.low, or else memory.min, was asked to be; 0 for none."""
    word = s.resources.unified.get("memory.low") or s.resources.unified.get("memory.min") or ""
    return min(int(word), NO_LIMIT_V1) if word.isdecimal() else 0


PROCESSES = (
    gauge("container_processes", "Processes.", lambda s: s.item.census.processes),
    gauge("container_threads", "Threads.", lambda s: s.item.details.threads),
    gauge("container_threads_max", "The most threads allowed, 0 for no limit.", lambda s: s.item.details.threads_max),
    gauge("container_file_descriptors", "Open descriptors.", lambda s: s.item.census.descriptors),
    gauge("container_sockets", "Open sockets.", lambda s: s.item.census.sockets),
    Family(
        "container_ulimits_soft",
        "Soft limits of the container's main process.",
        Kind.GAUGE,
        ("ulimit",),
        open_files,
    ),
)

SPECIFICATION = (
    gauge(
        "container_last_seen",
        "When this was measured, in seconds since the epoch.",
        lambda s: seconds(s.item.stats.at),
    ),
    gauge(
        "container_start_time_seconds",
        "When the container was started, in seconds since the epoch.",
        lambda s: seconds(s.item.stats.record.started_at),
    ),
    gauge(
        "container_spec_cpu_period",
        "Period of the CPU quota, in microseconds.",
        lambda s: s.resources.cpu_period or DEFAULT_PERIOD,
    ),
    gauge(
        "container_spec_cpu_quota",
        "CPU quota, in microseconds a period.",
        lambda s: s.resources.cpu_quota if s.resources.cpu_quota > 0 else None,
    ),
    gauge("container_spec_cpu_shares", "CPU shares.", lambda s: s.resources.cpu_shares or DEFAULT_SHARES),
    gauge(
        "container_spec_memory_limit_bytes",
        "Limit on memory, in bytes, 0 for none.",
        lambda s: max(0, s.resources.memory_limit),
    ),
    gauge(
        "container_spec_memory_swap_limit_bytes",
        "Limit on memory and swap together, in bytes, 0 for none.",
        lambda s: max(0, s.resources.memory_swap_limit),
    ),
    gauge(
        "container_spec_memory_reservation_limit_bytes",
        "Memory that is not reclaimed, in bytes, 0 for none.",
        reservation,
    ),
)


def pressure(resource: str, which: str) -> Callable[[Subject], int | None]:
    """The time in all that tasks waited for a resource, in whole seconds."""

    def value(s: Subject) -> int | None:
        found = getattr(s.counters, f"{resource}_pressure")
        stall = None if found is None else getattr(found, which)
        return None if stall is None else int(stall.total) // 1_000_000

    return value


PRESSURE = tuple(
    counter(
        f"container_pressure_{resource}_{word}_seconds_total",
        f"Time in which {who} waited for {what}, in seconds.",
        pressure(resource, which),
    )
    for resource, what in (("cpu", "CPU"), ("memory", "memory"), ("io", "input or output"))
    for word, which, who in (("stalled", "full", "all tasks"), ("waiting", "some", "at least one task"))
)

FAMILIES = (*SPECIFICATION, *CPU, *MEMORY, *HUGEPAGES, *DISKS, *PROCESSES, *PRESSURE)
