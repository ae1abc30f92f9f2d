"""What the launcher knows of a process that it has made and not yet reaped."""

from __future__ import annotations

import mmap
import signal
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tare.launch import wire

LOADING, EXECUTING = (
    1,
    2,
)  # in byte 4 of the shared page: the filter is being loaded; what follows is execve and nothing else


class Child:
    """A process, from its fork to its reaping.

        making ──READY──► at its gate ──GO──► going ──end of file──► running ──► reaped
           └──────────────────┴───FAILED, or killed──┴─────────────────────────────┘

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
        self.marked = False
        self.going = False  # past its gate
        self.unwanted = False  # killed by us: what it still says is not heard
        self.answered = False
        self.failure: tuple[bytes, int, bytes] | None = None
        self.terminal = -1
        self.early: list[wire.Field] | None = None  # READY, where it overtook CHILD: two processes speak on one socket

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
        """SIGKILL for it and for what was to make it."""
        for pidfd in (self.pidfd, self.helper):
            if pidfd >= 0:
                send_signal(pidfd, signal.SIGKILL)


def send_signal(pidfd: int, number: int) -> None:
    """Signal a process that may be gone already."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return
