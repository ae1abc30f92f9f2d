"""The process in between: where the launcher itself cannot make the child, it forks this one, which makes it in its own place.

    launcher ──fork──► in between ──fork──► helper outside, where the plan has something for it
                           │ steps `before`: what takes the node's privileges, then the namespaces that must be
                           │                 entered before the child is made (PID, user, time)
                           ├──clone3 (CLONE_PARENT) ──► child: the launcher's, not ours; steps, gate, execve
    launcher ◄── CHILD pid ┤
                           └ waits for the helper's end, and ends

What `before` has opened is the child's too: it goes on with the same slots.

A child that appears where others may get hold of it is made as an exec's is (`exec`): all that takes privileges is among `before`, its
credentials are in `entered`, and nothing that is open here goes along.
"""

from __future__ import annotations

import os

from tare.launch import init, linux, outside, packets, plan, steps, wire
from tare.launch.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    import mmap

    from tare.launch.plan import Plan


def main(status: _socket.socket, outcome: mmap.mmap, plan_fd: int, flags: int, cgroup: int) -> None:
    """Make the child; in it, the whole way to execve. Does not return. `cgroup` is the v2 directory that the child is to be in, or −1."""
    label = "setup"
    try:
        work = plan.read(plan_fd)
        os.close(plan_fd)
        machine = Machine(status)
        machine.page = outcome
        if "entered" in work:
            label = work["making"]
            apart(machine, outcome, work, cgroup)
        first = steps.resolve(work["before"])
        helper = 0
        if work.get("outside"):
            label = "make the helper outside"
            helper, machine.outside = outside.fork(status, work["outside"], outcome)
        steps.run(machine, first)
        label = work["making"]
        pid, pidfd = linux.clone3(flags | linux.CLONE_PARENT, cgroup)
        if pid:
            leave(machine, pid, pidfd, 0 if work.get("lingers") else helper)
        if cgroup >= 0:
            os.close(cgroup)
        init.run(machine, outcome, work)
    except OSError as error:
        steps.fail(status, label, error)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this child and is told to the launcher
        steps.fail_with(status, label)


def apart(machine: Machine, outcome: mmap.mmap, work: Plan, cgroup: int) -> None:
    """All of it but for the last steps, and then the child."""
    if cgroup >= 0:
        join(cgroup)
    if work.get("outside"):
        _, machine.outside = outside.fork(machine.status, work["outside"], outcome)
    first, own, way = steps.resolve(work["before"]), steps.resolve(work["entered"]), init.Way(work)
    steps.run(machine, first)
    needed = [machine.status.fileno()] + ([machine.outside.fileno()] if machine.outside is not None else [])
    linux.keep_only(*needed, first=way.inherit)
    steps.run(machine, own)
    init.appear(machine, outcome, way)


def join(directory: int) -> None:
    """Move this process, and with it what it makes, into the v2 cgroup of a directory; the descriptor is closed."""
    fd = os.open(b"cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory)
    os.write(fd, b"0")
    os.close(fd)
    os.close(directory)


def leave(machine: Machine, pid: int, pidfd: int, helper: int) -> None:
    """Name the child, let go of what is its own, wait for the helper unless it has work after the gate, end."""
    packets.send(machine.status, wire.CHILD, 0, (pid,), (pidfd,))
    linux.close_range(3)
    if helper:
        os.waitpid(helper, 0)
    os._exit(0)
