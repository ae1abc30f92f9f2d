"""A container's limits as NRI's messages have them and as the records do (pure)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tare.errors import FailedPrecondition, InvalidArgument
from tare.nri.v1 import nri_pb2 as pb
from tare.runtime.records import HugepageLimit, Resources
from tare.runtime.updating import merged

NUMBERS = {"cpu": {"shares": "cpu_shares", "quota": "cpu_quota", "period": "cpu_period"},
           "memory": {"limit": "memory_limit", "swap": "memory_swap_limit"}}  # fmt: skip
"""NRI's fields that CRI has too: message → field → field of the record."""

MORE = {
    "memory": {
        "reservation": "reservation",
        "kernel": "kernel",
        "kernel_tcp": "kernelTCP",
        "swappiness": "swappiness",
        "disable_oom_killer": "disableOOMKiller",
        "use_hierarchy": "useHierarchy",
    },
    "cpu": {"realtime_runtime": "realtimeRuntime", "realtime_period": "realtimePeriod"},
}
"""Those that it has not: message → field → OCI's name."""


def message(limits: Resources) -> pb.LinuxResources:
    """What is set of the limits."""
    found = pb.LinuxResources(
        hugepage_limits=[
            pb.HugepageLimit(page_size=item.page_size, limit=item.limit) for item in limits.hugepage_limits
        ],
        unified=limits.unified,
    )
    for part, numbers in NUMBERS.items():
        for name, own in numbers.items():
            if value := getattr(limits, own):
                getattr(getattr(found, part), name).value = value
    found.cpu.cpus, found.cpu.mems = limits.cpuset_cpus, limits.cpuset_mems
    for part, names in MORE.items():
        for name, oci in names.items():
            if f"{part}.{oci}" in limits.more:
                getattr(getattr(found, part), name).value = limits.more[f"{part}.{oci}"]
    if "pids.limit" in limits.more:
        found.pids.limit = limits.more["pids.limit"]
    return found


def wanted(given: pb.LinuxResources) -> Resources:
    """The limits that a message sets; a number of 0 sets nothing, as in CRI. Raises InvalidArgument."""
    values: dict[str, Any] = {"cpuset_cpus": given.cpu.cpus, "cpuset_mems": given.cpu.mems}
    for part, numbers in NUMBERS.items():
        of = getattr(given, part)
        values |= {own: getattr(of, name).value for name, own in numbers.items() if of.HasField(name)}
    more: dict[str, int | bool] = {}
    for part, names in MORE.items():
        of = getattr(given, part)
        more |= {f"{part}.{oci}": getattr(of, name).value for name, oci in names.items() if of.HasField(name)}
    if given.HasField("pids"):
        more["pids.limit"] = given.pids.limit
    for name in ("cpu_quota", "memory_limit", "memory_swap_limit"):
        if values.get(name, 0) < -1:
            raise InvalidArgument(f"set {name}", cause=f"{values[name]} is neither a limit nor -1")
    pages = tuple(HugepageLimit(page_size=item.page_size, limit=item.limit) for item in given.hugepage_limits)
    return Resources(**values, hugepage_limits=pages, unified=dict(given.unified), more=more)


def of_update(given: pb.LinuxResources) -> Resources:
    """What an update of a container that there is sets. Raises InvalidArgument, FailedPrecondition for what only a new container can have."""
    for name in ("rdt_class", "devices"):
        if given.HasField(name) if name == "rdt_class" else len(given.devices):
            raise FailedPrecondition(f"update {name}", cause="it is settled when a container is made")
    check_classes(given)
    return wanted(given)


def check_classes(given: pb.LinuxResources) -> None:
    """Raise FailedPrecondition for a class of block I/O: Tare has no file that says what one is."""
    if given.HasField("blockio_class") and given.blockio_class.value:
        cause = f"there is no block I/O class {given.blockio_class.value!r}: this runtime has no such classes"
        raise FailedPrecondition("set blockio_class", cause=cause, hint="set limits of `unified` instead")


def after(before: Resources, given: pb.LinuxResources) -> Resources:
    """The limits with those of the message over them. Raises InvalidArgument."""
    return merged(before, wanted(given))


def with_score(limits: Resources, score: int | None) -> Resources:
    """The limits with another oom_score_adj, if there is one."""
    return limits if score is None else replace(limits, oom_score_adj=score)


def rules(entries: object) -> list[pb.LinuxDeviceCgroup]:
    """OCI's rules about devices."""
    found = []
    for entry in entries if isinstance(entries, list) else []:
        rule = pb.LinuxDeviceCgroup(
            allow=bool(entry.get("allow")), type=entry.get("type", ""), access=entry.get("access", "")
        )
        for name in ("major", "minor"):
            if entry.get(name) is not None:
                getattr(rule, name).value = entry[name]
        found.append(rule)
    return found


def rule(given: pb.LinuxDeviceCgroup) -> Mapping[str, object]:
    """One of them, as OCI has it."""
    numbers = {name: getattr(given, name).value for name in ("major", "minor") if given.HasField(name)}
    kind = {"type": given.type} if given.type else {}
    return {"allow": given.allow, **kind, **numbers, "access": given.access or "rwm"}
