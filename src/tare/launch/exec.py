"""The child that becomes a process within a running container.

    launcher ──fork──► first child ──fork──► helper outside, where the plan has something for it
                           │ steps `before`: what is done in the node's namespaces
                           │ all namespaces of the container's main process, by its pidfd
                           │ steps `entered`: all that takes privileges; at last it is the container's user, with its capabilities
                           ├──clone (CLONE_PARENT) ──► child, in the PID namespace too: session, gate, limits, filter, execve
    launcher ◄── CHILD pid ┤
                           └ ends

Whoever may trace in the container gets hold of the child when it appears there: so it is then no more than the container's processes
are, and has nothing more. Where a filter lets this not be done (`handlers.early`), the plan has credentials among the child's steps.
Which process the pidfd is was checked by the daemon; it cannot become another.
"""

from __future__ import annotations

import os

from tare.launch import credentials, init, linux, outside, plan, steps, userns
from tare.launch.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    import mmap

    from tare.launch.plan import Plan


def main(status: _socket.socket, outcome: mmap.mmap, plan_fd: int, target: int, streams: list[int]) -> None:
    """The whole way to execve; does not return."""
    try:
        work = plan.read(plan_fd)
        os.close(plan_fd)
        machine = Machine(status)
        machine.page = outcome
        if work.get("outside"):
            _, machine.outside = outside.fork(status, work["outside"], outcome)
        entered, way = steps.resolve(work["entered"]), init.Way(work)
        steps.run(machine, steps.resolve(work["before"]))
        enter(machine, work, target, streams)
        keep_what_is_needed(machine, way.inherit)
        steps.run(machine, entered)
        init.appear(machine, outcome, way)
    except OSError as error:
        steps.fail(status, "join the container", error)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this child and is told to the launcher
        steps.fail_with(status, "setup")


def keep_what_is_needed(machine: Machine, inherit: int) -> None:
    """Nothing else goes to where it may be taken. All of it is closed on exec; a filter that is loaded later may not know the call for it."""
    needed = [machine.status.fileno(), *machine.slots.values()]
    if machine.outside is not None:
        needed.append(machine.outside.fileno())
    linux.keep_only(*needed, first=inherit)


def enter(machine: Machine, work: Plan, target: int, streams: list[int]) -> None:
    """All namespaces of the target; the PID namespace is that of the child that is made next. The streams are the program's from here on."""
    foreign = bool(work["namespaces"] & linux.CLONE_NEWUSER)
    owner = userns.owner_in(target, work["uid"]) if foreign else work["uid"]
    for number, fd in enumerate(streams):
        credentials.own(fd, owner)
        os.dup2(fd, number)
    linux.setns(target, work["namespaces"], "of the container")
    os.close(target)
    if foreign:
        userns.become_root(machine)
