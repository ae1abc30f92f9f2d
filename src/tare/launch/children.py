"""What the launcher knows of a process that it has made and not yet reaped."""

from __future__ import annotations

import mmap
import os
import signal
import socket

from tare.launch import packets, wire
from tare.launch.machine import EXECUTING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PIDFD_SIGNAL_PROCESS_GROUP = 4  # Linux 6.9; before that a group is signalled by number
EINVAL = 22
HIGHEST_ERRNO = 4095
MOST_WARNED = wire.MAX_PACKET // 2  # bytes of warnings: they are to fit into an answer, which has more beside them


class Child:
    """A process, from its fork to its reaping.

        making (or at its barrier) ──READY──► at its gate ──GO──► going ──end of file──► running ──► reaped
           └──────────────────────────────────────┴───FAILED, or killed──┴─────────────────────────────┘

    `status` is the launcher's end of their socket pair, None from the end of file on; `theirs` is the child's, to be closed
    here once it is forked. Raises OSError where there is no room for them. `helper` is the intermediate process, if
    any, that is to name the real one (CHILD). `outcome` is a page shared with the child, in which it leaves how far it came
    and the errno of an execve that failed: no system call is certain to be allowed by then.
    """

    def __init__(self, kind: int, name: bytes, connection: socket.socket | None, request: int) -> None:
        self.kind = kind
        self.name = name
        self.connection = connection
        self.request = request
        ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        ours.setblocking(False)
        packets.name_senders(ours)
        self.status: socket.socket | None = ours
        self.outcome = mmap.mmap(-1, mmap.PAGESIZE)
        self.helper = -1
        self.helper_pid = 0
        self.pid = 0
        self.pidfd = -1
        self.start = 0
        self.at_barrier = False  # waits to be placed by somebody else
        self.placed = False  # has waited for that
        self.begun = False  # was made before there was a plan for it, and waits at no gate but for that
        self.ready = False
        self.marked = False
        self.going = False  # past its gate
        self.unwanted = False  # killed by us: what it still says is not heard
        self.answered = False
        self.failure: tuple[bytes, int, bytes] | None = None
        self.terminal = -1
        self.warnings: list[wire.Field] = []
        self.early: tuple[int, list[wire.Field]] | None = None  # what overtook CHILD: two processes speak on one socket
        self.kill_at = 0.0  # when a command's time is over (0: never)

    @classmethod
    def running(
        cls, kind: int, name: bytes, pid: int, pidfd: int, start: int, *, marked: bool, kill_at: float
    ) -> Child:
        """One of another version of the launcher, past its gate and its exec."""
        child = cls(kind, name, None, 0)
        child.theirs.close()
        if child.status is not None:
            child.status.close()
        child.status = None
        child.outcome.close()
        child.pid, child.pidfd, child.start = pid, pidfd, start
        child.marked, child.kill_at = marked, kill_at
        child.going = child.answered = True
        return child

    def settled(self) -> bool:
        """Whether nothing is to come of it but its end."""
        return self.status is None and self.helper < 0 and not self.unwanted

    def at_gate(self) -> bool:
        """Whether it waits to be let through."""
        return self.ready and self.marked and not self.going and self.status is not None

    def may_say(self, sender: int, kind: int, fields: Sequence[wire.Field], fds: Sequence[int]) -> bool:
        """Whether this is to be heard. A process that others share a PID namespace with may be in the hands of one who may trace: it can
        say anything. Who has been made is heard only of who has made it, whom nobody in there can see; and nothing twice but failures."""
        shape, count = wire.shape(fields), len(fds)
        if kind == wire.CHILD:
            return sender == self.helper_pid and not self.pid and (shape, count) == ("i", 1)
        if kind == wire.TERMINAL:
            return self.kind in (wire.CREATE, wire.EXEC) and self.terminal < 0 and (shape, count) == ("", 1)
        if kind == wire.FAILED:
            return (shape, count) == ("bib", 0) and 0 <= wire.int_of(fields[1]) <= HIGHEST_ERRNO
        if kind == wire.READY:
            made = self.kind in (wire.CREATE, wire.EXEC, wire.COMMAND) and not self.ready and self.early is None
            return made and not shape.strip("b") and not count and length(fields) <= MOST_WARNED
        if kind == wire.BARRIER:
            waits = (
                self.kind in (wire.CREATE, wire.COMMAND) and not self.placed and not self.ready and self.early is None
            )
            return waits and (shape, count) == ("", 0)
        if kind == wire.OK and not self.answered:
            return (self.kind == wire.CHECK and not shape.strip("b")) or (self.kind == wire.NAMESPACES and shape == "i")
        return False

    def read_outcome(self) -> tuple[bytes, int] | None:
        """(step, errno), errno 0 for an execve that nothing is known against; None where it did not come as far as that."""
        number, stage = min(int.from_bytes(self.outcome[:4], "little"), HIGHEST_ERRNO), self.outcome[4]
        if stage == EXECUTING:
            return b"exec", number
        return (b"load the seccomp filter", number) if number else None

    def close_terminal(self) -> None:
        """The master is who asked's, or nobody's."""
        if self.terminal >= 0:
            os.close(self.terminal)
            self.terminal = -1

    def kill(self) -> None:
        """SIGKILL for it and for what was to make it; for a command, with all that is in its process group."""
        for pidfd in (self.pidfd, self.helper):
            if pidfd >= 0:
                send_signal(pidfd, signal.SIGKILL)
        if self.kind == wire.COMMAND and self.pidfd >= 0:
            kill_group(self.pid, self.pidfd)


def length(fields: Sequence[wire.Field]) -> int:
    """Bytes that fields, all of them bytes, take up in a message."""
    return sum(wire.FIELD.size + len(wire.bytes_of(field)) for field in fields)


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
