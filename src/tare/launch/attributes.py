"""Steps that say how the kernel is to treat a process: scheduling, I/O priority, CPUs, execution domain. Only for who asks for them.

Values come as the kernel takes them; what they mean is `handlers.attributes`'.
"""

from __future__ import annotations

import os

from tare.launch import foreign as ctypes
from tare.launch import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tare.launch.machine import Machine
    from tare.launch.outside import Outside

_X86 = os.uname().machine == "x86_64"
NR_SCHED_SETATTR = 314 if _X86 else 274
NR_IOPRIO_SET = 251 if _X86 else 30
IOPRIO_WHO_PROCESS = 1
EINVAL = 22
CONFIGURED = os.sysconf("SC_NPROCESSORS_CONF")


def scheduler(machine: Machine, attributes: bytes) -> None:
    """sched_setattr(2) of this process: the bytes of a struct sched_attr."""
    set_scheduler(0, attributes)


def scheduler_outside(outside: Outside, attributes: bytes) -> None:
    """The same by the helper, of a process that has not got the privileges for it."""
    set_scheduler(outside.pid, attributes)


def set_scheduler(pid: int, attributes: bytes) -> None:
    """sched_setattr(2)."""
    number, zero = ctypes.c_long(NR_SCHED_SETATTR), ctypes.c_long(0)
    linux.check(linux.syscall(number, ctypes.c_long(pid), ctypes.c_char_p(attributes), zero), "sched_setattr")


def io_priority(machine: Machine, priority: int) -> None:
    """ioprio_set(2) of this process, which is its group's only one yet: class and level in one number."""
    who = ctypes.c_long(IOPRIO_WHO_PROCESS)
    result = linux.syscall(ctypes.c_long(NR_IOPRIO_SET), who, ctypes.c_long(0), ctypes.c_long(priority))
    linux.check(result, "ioprio_set")


def personality(machine: Machine, value: int) -> None:
    """personality(2)."""
    linux.check(linux.libc.personality(ctypes.c_ulong(value)), "personality")


def affinity(machine: Machine, cpus: tuple[int, ...]) -> None:
    """sched_setaffinity(2) of this process."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        if error.errno != EINVAL:
            raise
        raise OSError(EINVAL, "none of these CPUs is online and in the control group's set") from error


def any_cpu(machine: Machine) -> None:
    """No CPU is excluded but by the control group: what the launcher, or a command line's caller, is confined to is not the container's."""
    os.sched_setaffinity(0, range(CONFIGURED))


OPERATIONS: dict[str, Callable[..., None]] = {
    "any_cpu": any_cpu,
    "scheduler": scheduler,
    "io_priority": io_priority,
    "personality": personality,
    "affinity": affinity,
}
OUTSIDE: dict[str, Callable[..., None]] = {"scheduler": scheduler_outside}
