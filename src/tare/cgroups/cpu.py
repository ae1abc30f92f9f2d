"""OCI `linux.resources.cpu` as writes: the controllers cpu and cpuset (pure).

Source: OCI runtime-spec, config-linux.md, "CPU"; kernel scheduler/sched-bwc.rst, scheduler/sched-rt-group.rst, cgroup-v2.rst.
"""

from __future__ import annotations

import math

from tare.cgroups.memory import not_in_v2
from tare.cgroups.section import Section, present
from tare.cgroups.writes import Write

REALTIME = {"realtimePeriod": "cpu.rt_period_us", "realtimeRuntime": "cpu.rt_runtime_us"}


def cpu_v1(whole: Section) -> list[Write]:
    """The period before the quota, which the kernel compares with it."""
    cpu = present(whole, "cpu")
    shares, quota, period = bandwidth(cpu)
    writes = []
    if shares:
        writes.append(Write("cpu", "cpu.shares", str(shares)))
    if period:
        writes.append(Write("cpu", "cpu.cfs_period_us", str(period)))
    if quota:
        writes.append(Write("cpu", "cpu.cfs_quota_us", str(quota)))
    for key, file in REALTIME.items():
        value = cpu.integer(key, -1 if key == "realtimeRuntime" else 0)
        if value:
            writes.append(Write("cpu", file, str(value)))
    return writes + extras(cpu, "cpu.cfs_burst_us")


def cpu_v2(whole: Section) -> list[Write]:
    """Shares become a weight; quota and period are one file. Raises FailedPrecondition for realtime limits, which v2 does not have."""
    cpu = present(whole, "cpu")
    shares, quota, period = bandwidth(cpu)
    for key in REALTIME:
        if cpu.integer(key):
            raise not_in_v2(cpu, key)
    writes = []
    if shares:
        writes.append(Write("cpu", "cpu.weight", str(weight(shares))))
    if quota or period:
        allowed = str(quota) if quota and quota > 0 else "max"
        writes.append(Write("cpu", "cpu.max", f"{allowed} {period}" if period else allowed))
    return writes + extras(cpu, "cpu.max.burst")


def bandwidth(cpu: Section) -> tuple[int | None, int | None, int | None]:
    """(shares, quota, period); the times are microseconds. Raises InvalidArgument where a burst is more than the quota."""
    shares, quota, period, burst = (
        cpu.integer("shares", 0),
        cpu.integer("quota"),
        cpu.integer("period", 0),
        cpu.integer("burst", 0),
    )
    if burst and quota and 0 < quota < burst:
        raise cpu.wrong("burst", f"{burst} is more than the quota {quota}")
    return shares, quota, period


def extras(cpu: Section, burst_file: str) -> list[Write]:
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
