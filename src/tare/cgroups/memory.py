"""OCI `linux.resources.memory` as writes (pure).

Source: OCI runtime-spec, config-linux.md, "Memory"; kernel admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.
"""

from __future__ import annotations

from tare.cgroups.section import Section, present
from tare.cgroups.value import Value
from tare.cgroups.writes import Write, bounded
from tare.errors import FailedPrecondition

PAGE = 4096


class Room(Value):
    """What must not be in use already when an update limits it (v2, `checkBeforeUpdate`): bytes of memory, and of memory and swap."""

    __slots__ = ("limit", "swap")

    def __init__(self, limit: int, swap: int | None) -> None:
        self.limit = limit
        self.swap = swap


def memory_v1(whole: Section) -> list[Write]:
    """memory.limit_in_bytes before memory.memsw: the sum may never be under the part. No limit on memory is none on swap."""
    memory = present(whole, "memory")
    limit, swap = memory_limits(memory)
    writes = []
    if limit is not None:
        writes.append(Write("memory", "memory.limit_in_bytes", str(limit)))
    if swap is not None:
        writes.append(Write("memory", "memory.memsw.limit_in_bytes", str(swap), "ignore" if swap == limit else "skip"))
    elif limit == -1:
        writes.append(Write("memory", "memory.memsw.limit_in_bytes", "-1", "ignore"))
    reservation = memory.integer("reservation")
    if reservation:
        writes.append(Write("memory", "memory.soft_limit_in_bytes", str(reservation)))
    writes += socket_limit(memory)
    swappiness = memory.integer("swappiness", 0, 100)
    if swappiness is not None:
        writes.append(Write("memory", "memory.swappiness", str(swappiness)))
    killer = memory.flag("disableOOMKiller")
    if killer is not None:
        writes.append(Write("memory", "memory.oom_control", str(int(killer)), "skip" if killer else "ignore"))
    return writes


def memory_v2(whole: Section) -> list[Write]:
    """OCI's `swap` is memory and swap together, v2's memory.swap.max is swap alone. Raises FailedPrecondition for what v2 does not have."""
    memory = present(whole, "memory")
    limit, swap = memory_limits(memory)
    for key, asked in (
        ("swappiness", memory.integer("swappiness", 0, 100) is not None),
        ("disableOOMKiller", memory.flag("disableOOMKiller")),
    ):
        if asked:
            raise not_in_v2(memory, key)
    writes = []
    if limit is not None:
        writes.append(Write("memory", "memory.max", bounded(limit)))
    if swap == -1 or (swap is None and limit == -1):
        writes.append(Write("memory", "memory.swap.max", "max", "ignore"))
    elif swap is not None:
        if limit is None or limit < 0:
            raise memory.wrong("swap", "a swap limit needs a memory limit")
        writes.append(Write("memory", "memory.swap.max", str(swap - limit), "ignore" if swap == limit else "skip"))
    reservation = memory.integer("reservation")
    if reservation:
        writes.append(Write("memory", "memory.low", bounded(reservation)))
    return writes + socket_limit(memory)


def socket_limit(memory: Section) -> list[Write]:
    """`kernelTCP` has a file in v1 alone; in v2 it is named as skipped."""
    limit = memory.integer("kernelTCP")
    if not limit:
        return []
    return [Write("memory", "memory.kmem.tcp.limit_in_bytes", str(limit), "skip" if limit > 0 else "ignore")]


def not_applied(whole: Section) -> list[str]:
    """What no kernel does any more: since 5.16 v1's file for `kernel` takes any limit and limits nothing."""
    memory = whole.section("memory")
    limit = memory.integer("kernel") if memory is not None else None
    return ["memory.kmem.limit_in_bytes"] if limit and limit > 0 else []


def memory_limits(memory: Section) -> tuple[int | None, int | None]:
    """(limit, limit of memory and swap together) in bytes, −1 for none, None for not set.

    `useHierarchy` is looked at and otherwise ignored: no kernel since 5.11 has it off.
    """
    limit = memory.integer("limit") or None
    swap = memory.integer("swap") or None
    memory.flag("useHierarchy")
    memory.flag("checkBeforeUpdate")
    if limit is not None and 0 < limit < PAGE:
        raise memory.wrong("limit", f"{limit} bytes are less than a page ({PAGE})")
    if swap is not None and limit is not None and 0 < swap < limit:
        raise memory.wrong("swap", f"{swap} is less than the memory limit {limit}, which it includes")
    if swap is not None and swap > 0 and limit == -1:
        raise memory.wrong("swap", f"{swap} is less than no memory limit")
    return limit, swap


def room_wanted(whole: Section) -> Room | None:
    """What `checkBeforeUpdate` has looked at; None where it does not ask, or there is no limit. On v1 the kernel refuses by itself."""
    memory = whole.section("memory")
    if memory is None or not memory.flag("checkBeforeUpdate"):
        return None
    limit, swap = memory_limits(memory)
    if limit is None or limit < 0:
        return None
    return Room(limit, swap if swap is not None and swap > 0 else None)


def not_in_v2(section: Section, key: str) -> FailedPrecondition:
    """The error that the specification asks for where a setting of v1 has no counterpart."""
    return FailedPrecondition(
        f"apply {section.path}.{key}",
        cause="control groups of version 2, which this node uses, have no such setting",
        hint="leave it out, or say what v2 has in linux.resources.unified",
    )
