"""systemd's names and properties for control groups: which unit a container is, and what its limits are as unit properties (pure).

    "kubepods-pod1.slice:tare:abc"   →   tare-abc.scope in /kubepods.slice/kubepods-pod1.slice

systemd keeps the limits that it knows and writes them anew when it is reloaded, so they must be said to it as well as to the
kernel. What it has no property for (swap on v1, hugepages, throttles, most unified keys) is the kernel's alone.

Source: systemd.slice(5), systemd.resource-control(5), org.freedesktop.systemd1(5); systemd 244 and later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tare.cgroups import devices
from tare.cgroups.blockio import converted, weight_of
from tare.cgroups.cpu import bandwidth, weight
from tare.cgroups.memory import memory_limits
from tare.cgroups.names import slice_path
from tare.cgroups.section import Section
from tare.errors import InvalidArgument

INFINITY = (1 << 64) - 1
DEFAULT_SLICE, DEFAULT_PREFIX = "system.slice", "tare"
LONGEST_NAME = 255
# A share of a second is kept in hundredths of a CPU's percent.
STEP = 10000
UNIT_NAME = re.compile(r"[A-Za-z0-9:_.\\@-]+")
SIZES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50, "E": 1 << 60}

Value = str | bool | int | bytes | list[int] | list[str] | list[tuple[str, str]]
Property = tuple[str, tuple[str, Value]]
"""(name, (D-Bus signature, value))."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A unit, and the slice it is in. `unit` may itself be a slice, which a pod's group is."""

    slice: str
    unit: str

    @property
    def path(self) -> str:
        """The control group's path below the root of the hierarchy."""
        return unit_path(self.unit) if self.unit.endswith(".slice") else f"{unit_path(self.slice)}/{self.unit}"


def place(cgroups_path: str, container_id: str) -> Place:
    """Where "slice:prefix:name" says that a container is; each part may be empty, and "" is the default place.

    A name that ends in ".slice" is that slice. Raises InvalidArgument.
    """
    doing = f"use cgroup {cgroups_path!r} with systemd"
    parts = cgroups_path.split(":") if cgroups_path else ["", DEFAULT_PREFIX, container_id]
    if len(parts) != 3:
        raise InvalidArgument(
            doing, cause="it is not slice:prefix:name", hint="is the cgroup driver meant to be cgroupfs?"
        )
    slice_name, prefix, name = parts
    slice_name, name = slice_name or DEFAULT_SLICE, name or container_id
    check_slice(doing, slice_name)
    if name.endswith(".slice"):
        check_slice(doing, name)
        return Place(slice=parent_slice(name), unit=name)
    unit = f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    if not UNIT_NAME.fullmatch(unit) or len(unit) > LONGEST_NAME:
        raise InvalidArgument(doing, cause=f"{unit!r} is no name of a unit")
    return Place(slice=slice_name, unit=unit)


def scope_of(parent: str, container_id: str) -> Place:
    """The scope of a container below a pod's parent, which is the name of a slice or its path. Raises InvalidArgument."""
    return place(f"{parent.rstrip('/').rpartition('/')[2]}:{DEFAULT_PREFIX}:{container_id}", container_id)


def place_of(path: str) -> Place | None:
    """The unit that the control group at a path is; None where it is not called like a scope in a slice, or a slice."""
    above, _, name = path.strip("/").rpartition("/")
    if name.endswith(".slice") and "/" + path.strip("/") == unit_path(name):
        return Place(slice=parent_slice(name), unit=name)
    parent = above.rpartition("/")[2] or "-.slice"
    if name.endswith(".scope") and UNIT_NAME.fullmatch(name) and parent.endswith(".slice"):
        return Place(slice=parent, unit=name)
    return None


def check_slice(doing: str, name: str) -> None:
    """Raise InvalidArgument for what is no name of a slice."""
    if not name.endswith(".slice") or not UNIT_NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise InvalidArgument(doing, cause=f"{name!r} is no name of a slice")
    unit_path(name)


def unit_path(slice_name: str) -> str:
    """The path of a slice: "" for the root's, "-.slice"."""
    return "" if slice_name == "-.slice" else slice_path(slice_name)


def parent_slice(name: str) -> str:
    """The slice that a slice is in, by its name."""
    stem, dash, _ = name.removesuffix(".slice").rpartition("-")
    return f"{stem}.slice" if dash and stem else "-.slice"


def scope_properties(where: Place, description: str, pids: Sequence[int]) -> list[Property]:
    """What makes a scope of processes that wait at their barrier: the container's own, to make groups in, gone when it is empty.

    What limits systemd gives to every unit unless told (15% of the node's tasks) are lifted; the container's own come after these.
    """
    return [
        ("Description", ("s", description)),
        ("Slice", ("s", where.slice)),
        ("PIDs", ("au", list(pids))),
        ("Delegate", ("b", True)),
        ("TasksMax", ("t", INFINITY)),
        *common(),
    ]


def slice_properties(where: Place, description: str) -> list[Property]:
    """What makes the slice of a pod."""
    return [("Description", ("s", description)), ("Wants", ("as", [where.slice])), *common()]


def common() -> list[Property]:
    """Accounting, nothing that depends on the boot, and no unit that stays behind as failed."""
    accounts: list[Property] = [(f"{name}Accounting", ("b", True)) for name in ("CPU", "Memory", "Tasks", "IO")]
    return [*accounts, ("DefaultDependencies", ("b", False)), ("CollectMode", ("s", "inactive-or-failed"))]


def resource_properties(resources: Mapping[str, object], version: int) -> list[Property]:
    """OCI `linux.resources` as properties; `version` is that of the control groups. A property named twice has its last value.

    Raises InvalidArgument for values that no kernel accepts.
    """
    whole = Section("linux.resources", resources)
    found = memory_properties(whole.section("memory"), version)
    found += cpu_properties(whole.section("cpu"), version)
    tasks = whole.section("pids")
    limit = tasks.integer("limit") if tasks is not None else None
    if limit:
        found.append(("TasksMax", ("t", bounded(limit))))
    block = whole.section("blockIO")
    share = weight_of(block, "weight") if block is not None else 0
    if share:
        found.append(("BlockIOWeight", ("t", share)) if version == 1 else ("IOWeight", ("t", converted(share))))
    if resources.get("devices"):
        found += device_properties(devices.parse(whole.sections("devices")))
    unified = whole.section("unified")
    if unified is not None and version == 2:
        found += unified_properties(unified)
    return found


def memory_properties(memory: Section | None, version: int) -> list[Property]:
    """Limits in bytes. v1 has no property for swap."""
    if memory is None:
        return []
    limit, swap = memory_limits(memory)
    found: list[Property] = []
    if limit is not None:
        found.append(("MemoryLimit" if version == 1 else "MemoryMax", ("t", bounded(limit))))
    if version == 1:
        return found
    if swap == -1 or (swap is None and limit == -1):
        found.append(("MemorySwapMax", ("t", INFINITY)))
    elif swap is not None and limit is not None:
        found.append(("MemorySwapMax", ("t", swap - limit)))
    reservation = memory.integer("reservation")
    if reservation:
        found.append(("MemoryLow", ("t", bounded(reservation))))
    return found


def cpu_properties(cpu: Section | None, version: int) -> list[Property]:
    """Shares or weight, the quota as microseconds of CPU in a second, and sets of CPUs and nodes (v2)."""
    if cpu is None:
        return []
    shares, quota, period = bandwidth(cpu)
    found: list[Property] = []
    if shares:
        found.append(("CPUShares", ("t", shares)) if version == 1 else ("CPUWeight", ("t", weight(shares))))
    found += quota_properties(quota or 0, period or 0)
    if version == 1:
        return found
    if cpu.integer("idle", 0, 1) == 1:
        found.append(("CPUWeight", ("t", 0)))
    for key, name in (("cpus", "AllowedCPUs"), ("mems", "AllowedMemoryNodes")):
        text = cpu.text(key)
        if text:
            found.append((name, ("ay", bits(text, cpu, key))))
    return found


def quota_properties(quota: int, period: int) -> list[Property]:
    """`quota` microseconds in `period`, −1 for no limit and 0 for not set. systemd keeps hundredths of a second: what is over is rounded up."""
    found: list[Property] = []
    if period:
        found.append(("CPUQuotaPeriodUSec", ("t", period)))
    if quota or period:
        allowed = INFINITY
        if quota > 0:
            allowed = -(-quota * 1000000 // (period or 100000))
            allowed = -(-allowed // STEP) * STEP
        found.append(("CPUQuotaPerSecUSec", ("t", allowed)))
    return found


def bits(text: str, section: Section, key: str) -> bytes:
    """The kernel's list "0-2,7" as systemd's mask: CPU 0 is the lowest bit of the first byte. Raises InvalidArgument."""
    mask = 0
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        if match is None:
            raise section.wrong(key, f"{text!r} is not a list of numbers and ranges")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last > 8191:
            raise section.wrong(key, f"{part.strip()!r} is no range of numbers up to 8191")
        mask |= (1 << last + 1) - (1 << first)
    return mask.to_bytes((mask.bit_length() + 7) // 8, "little")


def device_properties(rules: Sequence[devices.Rule]) -> list[Property]:
    """The least that systemd can say and that allows all that the rules do: the group's own program or list is the exact one."""
    everything, allowed = devices.evaluated(rules)
    if everything:
        return [("DevicePolicy", ("s", "auto")), ("DeviceAllow", ("a(ss)", []))]
    found: dict[str, int] = {}
    for device, access in allowed.items():
        kind, numbers = device.split()
        major, _, minor = numbers.partition(":")
        word = {"c": "char", "b": "block"}[kind]
        if major == "*":
            name = f"{word}-*"
        elif minor == "*":
            name = f"{word}-{major}"
        else:
            name = f"/dev/{word}/{numbers}"
        found[name] = found.get(name, 0) | access
    entries = [(name, devices.letters(access)) for name, access in found.items() if access]
    return [("DevicePolicy", ("s", "strict")), ("DeviceAllow", ("a(ss)", entries))]


def unified_properties(unified: Section) -> list[Property]:
    """The keys that systemd has properties for; the others are the kernel's alone."""
    found: list[Property] = []
    for key, value in unified.paragraphs().items():
        text = value.strip()
        if key in UNIFIED:
            found.append((UNIFIED[key], ("t", amount(unified, key, text))))
        elif key == "cpu.max":
            quota, _, period = text.partition(" ")
            most = -1 if quota == "max" else amount(unified, key, quota)
            found += quota_properties(most, amount(unified, key, period or "100000"))
        elif key == "cpu.idle" and text == "1":
            found.append(("CPUWeight", ("t", 0)))
        elif key in ("cpuset.cpus", "cpuset.mems") and text:
            name = "AllowedCPUs" if key == "cpuset.cpus" else "AllowedMemoryNodes"
            found.append((name, ("ay", bits(text, unified, key))))
    return found


UNIFIED = {
    "cpu.weight": "CPUWeight",
    "memory.high": "MemoryHigh",
    "memory.low": "MemoryLow",
    "memory.max": "MemoryMax",
    "memory.min": "MemoryMin",
    "memory.swap.max": "MemorySwapMax",
    "pids.max": "TasksMax",
}


def amount(unified: Section, key: str, text: str) -> int:
    """A number as the kernel reads it: "max", or with one of the letters for powers of 1024."""
    if text == "max":
        return INFINITY
    match = re.fullmatch(r"(\d{1,20})([KMGTPE]?)", text.upper())
    if match is None:
        raise unified.wrong(key, f"{text!r} is not a number")
    return min(int(match[1]) * SIZES[match[2]], INFINITY)


def bounded(value: int) -> int:
    """A limit as systemd has it."""
    return INFINITY if value < 0 else value
