"""The child that becomes a process within a running container.

A first child joins the container's cgroup and, by the pidfd of its main process, all of its namespaces; the second one, made
in its place (CLONE_PARENT), is in the PID namespace too, and becomes the program. Which process the pidfd is was checked by
the daemon; it cannot become another. A helper in the node's namespaces, where the plan has something for it, is forked before that.
"""

from __future__ import annotations

import os

from tare.launch import credentials, init, linux, outside, packets, plan, steps, userns, wire
from tare.launch.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    import mmap


def main(status: _socket.socket, outcome: mmap.mmap, plan_fd: int, target: int, streams: list[int]) -> None:
    """The whole way to execve; does not return."""
    try:
        work = plan.read(plan_fd)
        os.close(plan_fd)
        machine = Machine(status)
        if work.get("outside"):
            _, machine.outside = outside.fork(status, work["outside"], outcome)
        steps.run(machine, steps.resolve(work["before"]))
        foreign = bool(work["namespaces"] & linux.CLONE_NEWUSER)
        owner = userns.owner_in(target, work["uid"]) if foreign else work["uid"]
        for fd in streams:
            credentials.own(fd, owner)
        linux.setns(target, work["namespaces"], "of the container")
        os.close(target)
        if foreign:
            userns.become_root(machine)
        pid, pidfd = linux.clone3(linux.CLONE_PARENT)
        if pid:
            packets.send(status, wire.CHILD, 0, (pid,), (pidfd,))
            os._exit(0)
        for number, fd in enumerate(streams):
            os.dup2(fd, number)
        init.run(machine, outcome, work)
    except OSError as error:
        steps.fail(status, "join the container", error)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this child and is told to the launcher
        steps.fail_with(status, "setup")
