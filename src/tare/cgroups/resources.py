"""OCI `linux.resources` as writes to control group files, for v1 and v2 trees (pure).

Which version a resource is written for depends on the tree that has its controller, so that on a hybrid machine memory
may be v1 and hugetlb v2. Opening the files, and the kernel's answer, are `manager`'s.

Source: OCI runtime-spec, config-linux.md, "Control groups"; kernel Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from tare.cgroups import devices
from tare.cgroups.section import LARGEST, Section

Absent = Literal["skip", "ignore", "refuse"]

PAGE = 4096
FORBIDDEN_UNIFIED = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control", "cgroup.type", "cgroup.kill")


@dataclass(frozen=True, slots=True)
class Write:
    """One value for one file of the group. `absent` is what a file that is not there means: a thing to name as skipped, nothing, or an error."""

    controller: str
    file: str
    value: str
    absent: Absent = "skip"


@dataclass(frozen=True, slots=True)
class Plan:
    """The writes in order, what was asked for of controllers that are not there, and device rules that take a program (v2)."""

    writes: tuple[Write, ...]
    skipped: tuple[str, ...]
    devices: tuple[devices.Rule, ...] = ()


def plan(resources: Mapping[str, object], versions: Mapping[str, int]) -> Plan:
    """The writes for `linux.resources`. `versions` says for each controller that is there whether its tree is v1 or v2.

    Raises InvalidArgument for values that no kernel accepts.
    """
    whole = Section("linux.resources", resources)
    writes: list[Write] = []
    skipped: list[str] = [key for key in ("blockIO", "rdma", "network") if resources.get(key)]
    rules = devices.parse(whole.sections("devices"))
    if versions.get("devices") == 1:
        writes += [Write("devices", *line) for line in devices.lines(rules)]
    for key, controller, first, second in DOMAINS:
        if resources.get(key) is None:
            continue
        version = versions.get(controller)
        wanted = first(whole) if version == 1 else second(whole)
        if version is not None:
            writes += wanted
        elif wanted:
            skipped.append(controller)
    for item in unified_writes(whole.section("unified")):
        if versions.get(item.controller) == 2:
            writes.append(item)
        else:
            skipped.append(item.file)
    programmed = rules if versions.get("devices") != 1 else ()
    if programmed and 2 not in versions.values():
        skipped.append("devices")
        programmed = ()
    return Plan(tuple(writes), tuple(dict.fromkeys(skipped)), programmed)


def memory_v1(whole: Section) -> list[Write]:
    """memory.limit_in_bytes before memory.memsw: the sum may never be under the part."""
    memory = present(whole, "memory")
    limit, swap = memory_limits(memory)
    writes = []
    if limit is not None:
        writes.append(Write("memory", "memory.limit_in_bytes", str(limit)))
    if swap is not None:
        writes.append(Write("memory", "memory.memsw.limit_in_bytes", str(swap), "ignore" if swap == limit else "skip"))
    reservation = memory.integer("reservation")
    if reservation:
        writes.append(Write("memory", "memory.soft_limit_in_bytes", str(reservation)))
    swappiness = memory.integer("swappiness", 0, 100)
    if swappiness is not None:
        writes.append(Write("memory", "memory.swappiness", str(swappiness)))
    if memory.flag("disableOOMKiller"):
        writes.append(Write("memory", "memory.oom_control", "1"))
    return writes


def memory_v2(whole: Section) -> list[Write]:
    """OCI's `swap` is memory and swap together, v2's memory.swap.max is swap alone."""
    memory = present(whole, "memory")
    limit, swap = memory_limits(memory)
    writes = []
    if limit is not None:
        writes.append(Write("memory", "memory.max", bounded(limit)))
    if swap == -1:
        writes.append(Write("memory", "memory.swap.max", "max"))
    elif swap is not None:
        if limit is None or limit < 0:
            raise memory.wrong("swap", "a swap limit needs a memory limit")
        writes.append(Write("memory", "memory.swap.max", str(swap - limit), "ignore" if swap == limit else "skip"))
    reservation = memory.integer("reservation")
    if reservation:
        writes.append(Write("memory", "memory.low", bounded(reservation)))
    return writes


def memory_limits(memory: Section) -> tuple[int | None, int | None]:
    """(limit, limit of memory and swap together) in bytes, −1 for none, None for not set."""
    limit = memory.integer("limit") or None
    swap = memory.integer("swap") or None
    if limit is not None and 0 < limit < PAGE:
        raise memory.wrong("limit", f"{limit} bytes are less than a page ({PAGE})")
    if swap is not None and limit is not None and 0 < swap < limit:
        raise memory.wrong("swap", f"{swap} is less than the memory limit {limit}, which it includes")
    if swap is not None and swap > 0 and limit == -1:
        raise memory.wrong("swap", f"{swap} is less than no memory limit")
    return limit, swap


def cpu_v1(whole: Section) -> list[Write]:
    """The period before the quota, which the kernel compares with it."""
    cpu = present(whole, "cpu")
    shares, quota, period = cpu.integer("shares", 0), cpu.integer("quota"), cpu.integer("period", 0)
    writes = []
    if shares:
        writes.append(Write("cpu", "cpu.shares", str(shares)))
    if period:
        writes.append(Write("cpu", "cpu.cfs_period_us", str(period)))
    if quota:
        writes.append(Write("cpu", "cpu.cfs_quota_us", str(quota)))
    return writes + cpu_extras(cpu, "cpu.cfs_burst_us")


def cpu_v2(whole: Section) -> list[Write]:
    """Shares become a weight; quota and period are one file."""
    cpu = present(whole, "cpu")
    shares, quota, period = cpu.integer("shares", 0), cpu.integer("quota"), cpu.integer("period", 0)
    writes = []
    if shares:
        writes.append(Write("cpu", "cpu.weight", str(weight(shares))))
    if quota or period:
        allowed = str(quota) if quota and quota > 0 else "max"
        writes.append(Write("cpu", "cpu.max", f"{allowed} {period}" if period else allowed))
    return writes + cpu_extras(cpu, "cpu.max.burst")


def cpu_extras(cpu: Section, burst_file: str) -> list[Write]:
    """Burst and idle, which are alike in both versions."""
    burst, idle = cpu.integer("burst", 0), cpu.integer("idle", 0, 1)
    writes = []
    if burst is not None:
        writes.append(Write("cpu", burst_file, str(burst)))
    if idle is not None:
        writes.append(Write("cpu", "cpu.idle", str(idle)))
    return writes


def weight(shares: int) -> int:
    """v2's cpu.weight (1–10000) for v1's shares (2–262144), so that 1024 shares are the default weight of 100.

    The curve goes through the least, the default and the greatest of both scales. runc (1.3.2), crun (1.23) and the
    kubelet use it; the straight line that was used before gave 39 for 1024.
    """
    if shares <= 2:
        return 1
    if shares >= 262144:
        return 10000
    logarithm = math.log2(shares)
    return math.ceil(math.pow(10, (logarithm * logarithm + 125 * logarithm) / 612 - 7 / 34))


def cpuset(whole: Section) -> list[Write]:
    """CPUs and memory nodes, as the kernel's lists ("0-2,7"); both versions name the files alike."""
    cpu = present(whole, "cpu")
    writes = []
    for key in ("cpus", "mems"):
        value = cpu.text(key)
        if value:
            writes.append(Write("cpuset", f"cpuset.{key}", value))
    return writes


def pids(whole: Section) -> list[Write]:
    """0 is not set, below 0 no limit; both versions name the file alike."""
    limit = present(whole, "pids").integer("limit")
    return [Write("pids", "pids.max", bounded(limit))] if limit else []


def hugetlb(version: int) -> Callable[[Section], list[Write]]:
    """Limits by page size ("2MB"), and the same on reservations where the kernel counts them."""
    ending = "limit_in_bytes" if version == 1 else "max"

    def writes(whole: Section) -> list[Write]:
        found = []
        for item in whole.sections("hugepageLimits"):
            size, limit = item.text("pageSize"), item.integer("limit", 0, (1 << 64) - 1)
            if not size or "/" in size or limit is None:
                raise item.wrong("pageSize", "a hugepage limit needs pageSize and limit")
            value = bounded(limit if limit <= LARGEST else -1) if version == 2 else str(min(limit, LARGEST))
            found.append(Write("hugetlb", f"hugetlb.{size}.{ending}", value))
            found.append(Write("hugetlb", f"hugetlb.{size}.rsvd.{ending}", value, "ignore"))
        return found

    return writes


def unified_writes(unified: Section | None) -> list[Write]:
    """v2 files by name. Those that move processes or change what the tree is are refused."""
    writes: list[Write] = []
    if unified is None:
        return writes
    for key, value in unified.texts().items():
        controller, dot, _ = key.partition(".")
        if not dot or "/" in key or key in FORBIDDEN_UNIFIED:
            raise unified.wrong(key, "is not the name of a limit in a v2 control group")
        writes.append(Write(controller, key, value, "refuse"))
    return writes


def present(whole: Section, key: str) -> Section:
    """A member that is known to be there."""
    section = whole.section(key)
    if section is None:
        raise whole.wrong(key, "is absent")
    return section


def bounded(value: int) -> str:
    """A limit as v2 writes it."""
    return "max" if value < 0 else str(value)


Domain = tuple[str, str, Callable[[Section], list[Write]], Callable[[Section], list[Write]]]

DOMAINS: tuple[Domain, ...] = (
    ("memory", "memory", memory_v1, memory_v2),
    ("cpu", "cpu", cpu_v1, cpu_v2),
    ("cpu", "cpuset", cpuset, cpuset),
    ("pids", "pids", pids, pids),
    ("hugepageLimits", "hugetlb", hugetlb(1), hugetlb(2)),
)
"""(member of linux.resources, its controller, writes for v1, writes for v2)."""
