"""The child that becomes a command of the node: a hook, or another runtime's command line. No shell, no container.

It has the node's namespaces, the launcher's credentials, a session of its own (so that all of it can be ended at once), the three
descriptors that came with the request, and nothing else. Where it is to, it joins cgroups first.

A command that leaves a process behind and ends (`runc exec --detach`) is stood in for: this child stays, as the parent of what is
left, and ends with its exit code, so that one that ends at once is not missed.

Before its exec it may have steps to walk, as a container's process has: CRIU restores in a mount namespace of its own, where all is laid ready.

    launcher                    this child (subreaper)             command
       │◄───────── READY ─────────┤                                   │
       ├─ GO ────────────────────►│ fork ────────────────────────────►│ makes a process, writes its PID file, ends
       │◄──── end of file ────────┤ the PID file is read ◄────────────┘     (or fails: FAILED)
       │◄──── exit ───────────────┤ ◄── the process that was left ends
"""

from __future__ import annotations

import fcntl
import mmap
import os
import socket

from tare.launch import credentials, gates, linux, plan, steps, wire
from tare.launch.machine import EXECUTING, Machine

UMASK = 0o022
MARK = b"command"  # what its marker holds
PATIENT = b"patient"  # the same for one that must be let finish, also where the daemon that asked has died; its name begins so
UNKNOWN = 255


def main(status: socket.socket, outcome: mmap.mmap, plan_fd: int, streams: list[int]) -> None:
    """The whole way to execve; does not return. The plan: `paths`, `argv`, `env`, `cwd`, `join` (cgroup.procs files), `steps` and, for a
    command that is stood in for, `pid_file`. The streams become its descriptors 0, 1, 2 and following."""
    try:
        work = plan.read(plan_fd)
        os.close(plan_fd)
        status = out_of_the_way(status, len(streams))
        program = linux.Exec(work["paths"], work["argv"], work["env"])
        machine = Machine(status)
        walk = steps.resolve(work["steps"])
        for path in work["join"]:
            credentials.join_cgroup(machine, path)
        steps.run(machine, walk)
        os.setsid()
        os.umask(UMASK)
        os.chdir(work["cwd"])
        connect(streams)
        gates.until_go(status, wire.READY, [])
        credentials.reset_signals()
        if work["pid_file"]:
            stand_in(status, outcome, program, work["pid_file"])
        linux.close_range(len(streams), flags=linux.CLOSE_RANGE_CLOEXEC)
        outcome[4] = EXECUTING
        outcome[:4] = program().to_bytes(4, "little")
        os._exit(127)
    except OSError as error:
        steps.fail(status, "run a command", error)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this child and is told to the launcher
        steps.fail_with(status, "run a command")


def mark_of(name: bytes) -> bytes:
    """What the marker of a command of this name holds."""
    return PATIENT if name.startswith(PATIENT) else MARK


def out_of_the_way(status: socket.socket, count: int) -> socket.socket:
    """The socket at a number that no stream is going to have."""
    if status.fileno() >= count:
        return status
    moved = socket.socket(fileno=fcntl.fcntl(status.fileno(), fcntl.F_DUPFD_CLOEXEC, count))
    status.close()
    return moved


def connect(streams: list[int]) -> None:
    """Descriptors in their places, which others of them may have: so above all of those first."""
    for place, fd in enumerate([fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, len(streams)) for fd in streams]):
        os.dup2(fd, place)
        os.close(fd)


def stand_in(status: socket.socket, outcome: mmap.mmap, program: linux.Exec, pid_file: bytes) -> None:
    """Run the command, and live for as long as what it leaves behind."""
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    linux.set_name(b"tare-exec")
    pid, _ = linux.clone3()
    if pid == 0:
        linux.close_range(3, flags=linux.CLOSE_RANGE_CLOEXEC)
        program()
        os._exit(127)
    linux.keep_only(status.fileno())
    ends: dict[int, int] = {}
    code = await_child(pid, ends)
    if code:
        steps.fail(status, "run a command", OSError(0, f"it ended with {code}"))
    with open(pid_file, "rb") as file:
        left = int(file.read())
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for number in range(3):
        os.dup2(null, number)
    outcome[4] = EXECUTING
    status.close()
    os._exit(await_child(left, ends))


def await_child(pid: int, ends: dict[int, int]) -> int:
    """The exit code of a child (128 + signal where one ended it); UNKNOWN where it is no child of ours.

    `ends` are those of others that were reaped meanwhile: what a command leaves behind may have ended before the command has.
    """
    while pid not in ends:
        try:
            ended, state = os.waitpid(-1, 0)
        except ChildProcessError:
            return UNKNOWN
        ends[ended] = 128 + os.WTERMSIG(state) if os.WIFSIGNALED(state) else os.WEXITSTATUS(state)
    return ends[pid]
