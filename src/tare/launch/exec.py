"""The child that becomes a process within a running container.

A first child joins the container's cgroup and, by the pidfd of its main process, all of its namespaces; the second one, made
in its place (CLONE_PARENT), is in the PID namespace too, and becomes the program. Which process the pidfd is was checked by
the daemon; it cannot become another.
"""

from __future__ import annotations

import mmap
import os
import socket

from tare.launch import credentials, init, linux, packets, plan, steps, wire
from tare.launch.machine import Machine


def main(status: socket.socket, outcome: mmap.mmap, plan_fd: int, target: int, streams: list[int]) -> None:
    """The whole way to execve; does not return."""
    try:
        work = plan.read(plan_fd)
        os.close(plan_fd)
        steps.run(Machine(status), steps.resolve(work["before"]))
        linux.setns(target, work["namespaces"], "of the container")
        os.close(target)
        pid, pidfd = linux.clone3(linux.CLONE_PARENT)
        if pid:
            packets.send(status, wire.CHILD, 0, (pid,), (pidfd,))
            os._exit(0)
        for number, fd in enumerate(streams):
            credentials.own(fd, work["uid"])
            os.dup2(fd, number)
        init.run(status, outcome, work)
    except OSError as error:
        steps.fail(status, "join the container", error)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this child and is told to the launcher
        steps.fail_with(status, "setup")
