"""Scheduling, I/O priority, CPU affinity and personality of an OCI configuration, as the kernel takes them. Pure.

Sources: OCI runtime specification 1.2, config.md, "Linux Process", and config-linux.md, "Personality"; sched_setattr(2), ioprio_set(2),
sched_setaffinity(2), personality(2).
"""

from __future__ import annotations

import struct

from tare.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tare.launch.plan import Step

    Spec = Mapping[str, Any]

POLICIES = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_ISO": 4,  # reserved: no kernel has it, and it says EINVAL
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
RESET_ON_FORK = "SCHED_FLAG_RESET_ON_FORK"
SCHEDULER_FLAGS = {
    RESET_ON_FORK: 0x01,
    "SCHED_FLAG_RECLAIM": 0x02,
    "SCHED_FLAG_DL_OVERRUN": 0x04,
    "SCHED_FLAG_KEEP_POLICY": 0x08,
    "SCHED_FLAG_KEEP_PARAMS": 0x10,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 0x20,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 0x40,
}
SCHED_ATTR = struct.Struct("=IIQiIQQQII")  # size, policy, flags, nice, priority, runtime, deadline, period, clamps
REAL_TIME = ("SCHED_FIFO", "SCHED_RR")
WITHOUT_CLAMPS = 48  # bytes of the structure of kernels that know no utilization clamps
CLAMPS = 0x60

IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
IO_CLASS_SHIFT = 13
DOMAINS = {"LINUX": 0x0000, "LINUX32": 0x0008}
HIGHEST_CPU = (1 << 16) - 1
LARGEST = (1 << 64) - 1


def of(process: Spec, personality: Spec | None) -> list[Step]:
    """The steps of what is asked for; none where nothing is. They take privileges, and so come before these are gone."""
    return [*scheduling(process), *inherited(process, personality)]


def scheduling(process: Spec) -> list[Step]:
    """Those of what a process may not pass on when it forks: for itself, or for the helper outside to do to it."""
    if process.get("scheduler") is None:
        return []
    return [("scheduler", "set the scheduler", scheduler(process["scheduler"]))]


def inherited(process: Spec, personality: Spec | None) -> list[Step]:
    """Those of what it does pass on."""
    steps: list[Step] = []
    if process.get("ioPriority") is not None:
        steps.append(("io_priority", "set the I/O priority", io_priority(process["ioPriority"])))
    if personality is not None:
        steps.append(("personality", "set the personality", execution_domain(personality)))
    return steps


def scheduler(wanted: Spec) -> bytes:
    """`process.scheduler` as a struct sched_attr. Raises InvalidArgument, naming the member."""
    path = "process.scheduler"
    policy = one_of(wanted, path, "policy", POLICIES)
    flags = 0
    for index, name in enumerate(wanted.get("flags") or ()):
        if name not in SCHEDULER_FLAGS:
            raise wrong(f"{path}.flags[{index}]", f"{name!r} is none of {', '.join(SCHEDULER_FLAGS)}")
        flags |= SCHEDULER_FLAGS[name]
    nice = number(wanted, path, "nice", -20, 19)
    priority = number(wanted, path, "priority", 0, 99)
    if bool(priority) != (wanted["policy"] in REAL_TIME):
        raise wrong(f"{path}.priority", f"is {priority}: {' and '.join(REAL_TIME)} have one from 1 to 99, others none")
    times = [number(wanted, path, key, 0, LARGEST) for key in ("runtime", "deadline", "period")]
    if any(times) and wanted["policy"] != "SCHED_DEADLINE":
        raise wrong(path, "has times, which SCHED_DEADLINE alone has")
    size = SCHED_ATTR.size if flags & CLAMPS else WITHOUT_CLAMPS
    return SCHED_ATTR.pack(size, policy, flags, nice, priority, *times, 0, 0)


def io_priority(wanted: Spec) -> int:
    """`process.ioPriority` as ioprio_set(2) takes it. Raises InvalidArgument."""
    path = "process.ioPriority"
    return one_of(wanted, path, "class", IO_CLASSES) << IO_CLASS_SHIFT | number(wanted, path, "priority", 0, 7)


def execution_domain(wanted: Spec) -> int:
    """`linux.personality` as personality(2) takes it. Raises InvalidArgument; the specification has no flags yet."""
    path = "linux.personality"
    if wanted.get("flags"):
        raise wrong(f"{path}.flags", "has flags, and none is defined")
    return one_of(wanted, path, "domain", DOMAINS)


def any_cpu() -> list[Step]:
    """The step that takes back what CPUs a process was confined to by its maker, in whose control group it is by then."""
    return [("any_cpu", "run on any CPU")]


def affinity(process: Spec) -> tuple[list[Step], list[Step]]:
    """`process.execCPUAffinity` as steps before the control group is joined, and after; where it says nothing, those that the group allows."""
    wanted = process.get("execCPUAffinity") or {}
    parts: list[list[Step]] = []
    for key in ("initial", "final"):
        text = wanted.get(key) or ""
        label = f"run on CPUs {text}"
        parts.append([("affinity", label, cpus(f"process.execCPUAffinity.{key}", text))] if text else [])
    return parts[0], parts[1] if any(parts) else any_cpu()


def cpus(path: str, text: object) -> tuple[int, ...]:
    """The numbers of a list such as "0-3,7". Raises InvalidArgument with the JSON path."""
    if not isinstance(text, str):
        raise wrong(path, f"{text!r} is not a string")
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        numbers = (first, last if dash else first)
        if not all(number.isascii() and number.isdigit() for number in numbers):
            raise wrong(path, f"{part!r} is neither a CPU nor a range of them")
        low, high = int(numbers[0]), int(numbers[1])
        if not low <= high <= HIGHEST_CPU:
            raise wrong(path, f"{part!r} is no range of CPUs up to {HIGHEST_CPU}")
        found.update(range(low, high + 1))
    return tuple(sorted(found))


def forks(process: Spec) -> bool:
    """Whether the kernel lets the process fork: one with a deadline may not, unless its children are to have none (sched(7))."""
    wanted = process.get("scheduler") or {}
    return wanted.get("policy") != "SCHED_DEADLINE" or RESET_ON_FORK in (wanted.get("flags") or ())


def one_of(wanted: Spec, path: str, key: str, names: Mapping[str, int]) -> int:
    """The number of a member that must be one of these words."""
    value = wanted.get(key)
    if not isinstance(value, str) or value not in names:
        raise wrong(f"{path}.{key}", f"{value!r} is none of {', '.join(names)}")
    return names[value]


def number(wanted: Spec, path: str, key: str, lowest: int, highest: int) -> int:
    """A whole number in range; 0 where it is absent."""
    value = wanted.get(key)
    if value is None:
        value = 0
    if not isinstance(value, int) or isinstance(value, bool) or not lowest <= value <= highest:
        raise wrong(f"{path}.{key}", f"{value!r} is not a whole number from {lowest} to {highest}")
    return value


def wrong(path: str, cause: str) -> InvalidArgument:
    """An error about one member."""
    return InvalidArgument(f"read {path}", cause=cause)
