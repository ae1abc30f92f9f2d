"""What the launcher knows of a process that it has made and not yet reaped."""

from __future__ import annotations

import mmap
import os
import signal
import socket

from tare.launch import wire
from tare.launch.machine import EXECUTING

PIDFD_SIGNAL_PROCESS_GROUP = 4  # Linux 6.9; before that a group is signalled by number
EINVAL = 22


class Child:
    """A process, from its fork to its reaping.

        making (or at its barrier) ──READY──► at its gate ──GO──► going ──end of file──► running ──► reaped
           └──────────────────────────────────────┴───FAILED, or killed──┴─────────────────────────────┘

    `status` is the launcher's end of their socket pair, None from the end of file on; `theirs` is the child's, to be closed
    here once it is forked. Raises OSError where there is no room for them. `helper` is the intermediate process, if
    any, that is to name the real one (CHILD). `outcome` is a page shared with the child, in which it leaves how far it came
    and the errno of an execve that failed: no system call is certain to be allowed by then.
    """

    def __init__(self, kind: int, name: bytes, connection: socket.socket, request: int) -> None:
        self.kind = kind
        self.name = name
        self.connection: socket.socket | None = connection
        self.request = request
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        ours.setblocking(False)
        self.status: socket.socket | None = ours
        self.outcome = mmap.mmap(-1, mmap.PAGESIZE)
        self.helper = -1
        self.helper_pid = 0
        self.pid = 0
        self.pidfd = -1
        self.start = 0
        self.at_barrier = False  # waits to be placed by somebody else
        self.marked = False
        self.going = False  # past its gate
        self.unwanted = False  # killed by us: what it still says is not heard
        self.answered = False
        self.failure: tuple[bytes, int, bytes] | None = None
        self.terminal = -1
        self.early: tuple[int, list[wire.Field]] | None = None  # what overtook CHILD: two processes speak on one socket

    def at_gate(self) -> bool:
        """Whether it waits to be let through."""
        return self.marked and not self.going and self.status is not None

    def read_outcome(self) -> tuple[bytes, int] | None:
        """(step, errno), errno 0 for an execve that nothing is known against; None where it did not come as far as that."""
        number, stage = int.from_bytes(self.outcome[:4], "little"), self.outcome[4]
        if stage == EXECUTING:
            return b"exec", number
        return (b"load the seccomp filter", number) if number else None

    def kill(self) -> None:
        """SIGKILL for it and for what was to make it; for a command, with all that is in its process group."""
        for pidfd in (self.pidfd, self.helper):
            if pidfd >= 0:
                send_signal(pidfd, signal.SIGKILL)
        if self.kind == wire.COMMAND and self.pidfd >= 0:
            kill_group(self.pid, self.pidfd)


def kill_group(pid: int, pidfd: int) -> None:
    """SIGKILL for all that is in a process's group, also where the process itself has ended."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL, None, PIDFD_SIGNAL_PROCESS_GROUP)
    except ProcessLookupError:
        return
    except OSError as error:
        if error.errno != EINVAL:
            raise
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            return


def send_signal(pidfd: int, number: int) -> None:
    """Signal a process that may be gone already."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return
