"""The child that becomes a container: steps, gate, credentials, execve.

    launcher                              child (clone3 with the new namespaces)
       │                                    │ reads its plan, looks everything up
       │                                    │ steps: cgroup, namespaces, mounts, pivot, streams
       │◄──────────────── READY (warnings) ─┤
       │ (marker written)                   ┊ waits at the gate; end of file here ends it
       ├─ GO ──────────────────────────────►│ final steps: limits, identity, capabilities, seccomp
       │◄─────────────── end of file ───────┤ execve, or the errno left in the shared page, and exit

Where a process in between (`between`) makes the child, some steps are behind it by then.
"""

from __future__ import annotations

import os

from tare.launch import gates, linux, packets, plan, steps, wire
from tare.launch.machine import EXECUTING, LOADING, Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    import mmap

    from tare.launch.plan import Plan


def main(status: _socket.socket, outcome: mmap.mmap, plan_fd: int) -> None:
    """The whole way from a fresh child to execve; does not return."""
    try:
        work = plan.read(plan_fd)
        os.close(plan_fd)
        run(Machine(status), outcome, work)
    except OSError as error:
        steps.fail(status, "setup", error)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this child and is told to the launcher
        steps.fail_with(status, "setup")


def await_plan(status: _socket.socket, outcome: mmap.mmap) -> None:
    """The same for a child that was made before there was a plan: that comes with its first GO."""
    try:
        kind, _, _, fds = packets.receive(status)
    except packets.Closed:
        os._exit(1)
    if kind != wire.GO or len(fds) != 1:
        os._exit(1)
    main(status, outcome, fds[0])


def run(machine: Machine, outcome: mmap.mmap, work: Plan) -> None:
    """Walk the plan and become its program."""
    machine.page = outcome
    way = Way(work)
    steps.run(machine, way.first)
    gates.until_go(machine.status, wire.READY, machine.warnings[:8])
    # Now, since a filter that the final steps load may not know this call.
    linux.close_range(way.inherit, flags=linux.CLOSE_RANGE_CLOEXEC)
    become(machine, outcome, way)


class Way:
    """What a plan has for the last process, looked up: the steps before the gate and after it, the program, what that inherits."""

    def __init__(self, work: Plan) -> None:
        self.first = steps.resolve(work["steps"])
        self.final = steps.resolve(work["final"])
        self.program = linux.Exec(work["paths"], work["argv"], work["env"])
        self.inherit: int = work.get("inherit", 3)


def appear(machine: Machine, outcome: mmap.mmap, way: Way) -> None:
    """The same by a process that this one makes, in a PID namespace in which others live: it has been given no more than it is to have."""
    pid, pidfd = linux.clone_parent()
    if pid:
        if machine.heir and machine.outside is not None:
            packets.send(machine.outside, wire.CHILD, 0, (pid,))
        packets.send(machine.status, wire.CHILD, 0, (pid,), (pidfd,))
        os._exit(0)
    arrive(machine, outcome, way)


def arrive(machine: Machine, outcome: mmap.mmap, way: Way) -> None:
    """Walk the steps, wait at the gate, and become the program; all that is not inherited is marked by now."""
    steps.run(machine, way.first)
    gates.until_go(machine.status, wire.READY, machine.warnings[:8])
    become(machine, outcome, way)


def become(machine: Machine, outcome: mmap.mmap, way: Way) -> None:
    """The steps after the gate, and execve."""
    steps.run(machine, way.final)
    outcome[4] = LOADING
    number = machine.program.load() if isinstance(machine.program, linux.SeccompProgram) else 0
    if not number:
        outcome[4] = EXECUTING
        number = way.program()
    outcome[:4] = number.to_bytes(4, "little")
    os._exit(127)
