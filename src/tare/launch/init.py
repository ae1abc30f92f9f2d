"""The child that becomes a container: steps, gate, credentials, execve.

    launcher                              child (clone3 with the new namespaces)
       │                                    │ reads its plan, looks everything up
       │                                    │ steps: cgroup, namespaces, mounts, pivot, streams
       │◄──────────────── READY (warnings) ─┤
       │ (marker written)                   ┊ waits at the gate; end of file here ends it
       ├─ GO ──────────────────────────────►│ final steps: limits, identity, capabilities, seccomp
       │◄─────────────── end of file ───────┤ execve, or the errno left in the shared page, and exit

A PID namespace that exists is entered by an intermediate process, which makes the child in its own place (CLONE_PARENT).
"""

from __future__ import annotations

import mmap
import os
import socket

from tare.launch import linux, packets, plan, steps, wire
from tare.launch.children import EXECUTING, LOADING
from tare.launch.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tare.launch.plan import Plan


def main(status: socket.socket, outcome: mmap.mmap, plan_fd: int) -> None:
    """The whole way from a fresh child to execve; does not return."""
    try:
        work = plan.read(plan_fd)
        os.close(plan_fd)
        run(status, outcome, work)
    except OSError as error:
        steps.fail(status, "setup", error)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this child and is told to the launcher
        steps.fail_with(status, "setup")


def enter(
    status: socket.socket, outcome: mmap.mmap, plan_fd: int, pid_namespace: bytes, flags: int, cgroup: int
) -> None:
    """As `main`, in a child that belongs to an existing PID namespace; this process only makes it."""
    try:
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        fd = os.open(pid_namespace, os.O_RDONLY | os.O_CLOEXEC)
        linux.setns(fd, linux.CLONE_NEWPID, "pid")
        os.close(fd)
        pid, pidfd = linux.clone3(flags | linux.CLONE_PARENT, cgroup)
        if pid:
            packets.send(status, wire.CHILD, 0, (pid,), (pidfd,))
            os._exit(0)
    except OSError as error:
        steps.fail(status, "join pid namespace", error)
    if cgroup >= 0:
        os.close(cgroup)
    main(status, outcome, plan_fd)


def run(status: socket.socket, outcome: mmap.mmap, work: Plan) -> None:
    """Walk the plan and become its program."""
    machine = Machine(status)
    first = steps.resolve(work["steps"])
    final = steps.resolve(work["final"])
    program = linux.Exec(work["paths"], work["argv"], work["env"])
    steps.run(machine, first)
    wait_at_gate(status, machine.warnings)
    # Now, since a filter that the final steps load may not know this call.
    linux.close_range(3, flags=linux.CLOSE_RANGE_CLOEXEC)
    steps.run(machine, final)
    outcome[4] = LOADING
    number = machine.program.load() if isinstance(machine.program, linux.SeccompProgram) else 0
    if not number:
        outcome[4] = EXECUTING
        number = program()
    outcome[:4] = number.to_bytes(4, "little")
    os._exit(127)


def wait_at_gate(status: socket.socket, warnings: list[bytes]) -> None:
    """Until GO. The launcher's end of the pair is in no other child, so its death ends the wait, and this process."""
    try:
        packets.send(status, wire.READY, 0, warnings[:8])
        kind, *_ = packets.receive(status)
    except packets.Closed:
        os._exit(1)
    if kind != wire.GO:
        os._exit(1)
