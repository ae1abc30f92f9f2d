"""Making a container's process: a child of this command's, which so goes to whoever called when the command ends (conmon, a containerd shim).

    tare oci                                                              child
       │ reads, checks, compiles, imports the launcher's steps
       ├─ clone3 ─────────────────────────────────────────────────────────►│ steps
       │◄─────────────────────────────────────── TERMINAL, FAILED, READY ──┤
       │ state.json, PID file                                              ┊
       ├─ GO ─────────────────────────────────────────────────────────────►│ execve     (run, exec)
       └─ HOLD ───────────────────────────────────────────────────────────►│ the gate   (create), see `child`

Where something has to be done before the child is made, in namespaces that this command must not enter, and for `exec`, a process in
between is forked that makes it (launch.between, launch.exec), as a child of this command's all the same:

    tare oci ──── fork ───► in between ──── clone3 (CLONE_PARENT) ────────►│ steps
       │◄────────── CHILD ──┤

The end of this process before GO or HOLD ends the others.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import mmap
import os

from tare.errors import InternalError, TareError
from tare.launch import linux, packets, wire
from tare.launch.machine import EXECUTING
from tare.oci import child, logs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tare.handlers.plans import Compiled
    from tare.launch.plan import Plan

HIGHEST_ERRNO = 4095


class NotStarted(TareError):
    """A process that could not be made: at which step, with which errno (0: none), in the kernel's words."""

    code = "FAILED_PRECONDITION"

    def __init__(self, doing: str, *, step: str, cause: str, errno: int) -> None:
        super().__init__(doing, step=step, cause=cause)
        self.errno = errno


class Birth:
    """One process being made. `pid` and `pidfd` are known once it is READY; `terminal` is its master, or −1."""

    def __init__(self) -> None:
        self.pid = 0
        self.pidfd = -1
        self.terminal = -1
        self.warnings: list[str] = []
        self.outcome_fd = os.memfd_create("tare-outcome", os.MFD_CLOEXEC)
        os.ftruncate(self.outcome_fd, mmap.PAGESIZE)
        self.outcome = mmap.mmap(self.outcome_fd, mmap.PAGESIZE)
        self.status, self.theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
        packets.name_senders(self.status)
        self.between = 0

    def create(self, doing: str, made: Compiled, gate: _socket.socket | None, cgroup: int) -> None:
        """Make a container's process by its plan; with a gate it may be held there. `cgroup` is a v2 group's directory, or −1.

        Raises NotStarted.
        """
        if made.helper:
            from tare.launch import between

            self.between = os.fork()
            if self.between == 0:
                child.in_between(self, gate, made, cgroup, between.main)
        else:
            try:
                self.pid, self.pidfd = linux.clone3(made.clone_flags, cgroup)
            except OSError as error:
                number = error.errno or 0
                raise NotStarted(doing, step=made.plan["making"], cause=os.strerror(number), errno=number) from error
            if self.pid == 0:
                child.main(self, gate, made.plan)
        self.theirs.close()

    def execute(self, work: Plan, target: int) -> None:
        """Make a further process in the container of the process that a pidfd is of."""
        from tare.launch import exec

        self.between = os.fork()
        if self.between == 0:
            child.execution(self, work, target, exec.main)
        self.theirs.close()

    def until_ready(self, doing: str, place: Callable[[int], None] | None = None) -> None:
        """Until it waits before its exec. At its barrier `place` puts it where it belongs. Raises NotStarted."""
        ready, barrier = False, 0
        while not ready or not self.pid:
            try:
                sender, kind, _, fields, fds = packets.receive_from(self.status)
            except packets.Closed:
                raise NotStarted(doing, step="setup", cause="the process was killed", errno=0) from None
            if kind == wire.CHILD and sender == self.between and not self.pid:  # nobody else's word is taken for it
                self.pid, self.pidfd = wire.int_of(fields[0]), fds.pop()
            elif kind == wire.TERMINAL and self.terminal < 0 and fds:
                self.terminal = fds.pop()
            elif kind == wire.FAILED:
                raise failure(doing, fields)
            elif kind == wire.BARRIER:
                barrier = sender
            elif kind == wire.READY:
                ready = True
                self.warnings += [os.fsdecode(wire.bytes_of(field)) for field in fields]
            packets.close_all(fds)
            at = self.between if barrier == self.between else self.pid  # who makes it has it where itself is
            if barrier and at and place is not None:
                barrier = 0
                place(at)
                packets.send(self.status, wire.GO)

    def go(self, doing: str, program: str) -> None:
        """Let it through, and see that it runs its program. Raises NotStarted."""
        let_through(self.status, self.outcome, doing, program)

    def hold(self) -> None:
        """Let it wait at its own gate from now on. Raises NotStarted where it is gone."""
        try:
            packets.send(self.status, wire.HOLD)
            kind, *_ = packets.receive(self.status)
        except packets.Closed:
            raise NotStarted("create the container", step="gate", cause="the process was killed", errno=0) from None
        if kind != wire.OK:
            raise InternalError("create the container", cause=f"its process said {kind} at its gate")

    def end(self, *, held: bool = False) -> None:
        """Close what is open here, which ends what waits for it, and reap who was in between. Idempotent.

        In between is one who may have a helper to wait for that is needed when a held container is started: it is left then.
        """
        self.status.close()
        self.theirs.close()
        if self.between:
            os.waitpid(self.between, os.WNOHANG if held else 0)
            self.between = 0

    def kill(self) -> None:
        """End the process itself, which must be past READY or gone, and reap it."""
        self.end()
        if self.pid:
            try:
                _signal.pidfd_send_signal(self.pidfd, _signal.SIGKILL)
            except ProcessLookupError:
                logs.debug(f"process {self.pid} has ended by itself")
            os.waitpid(self.pid, 0)
            self.pid = 0


def failure(doing: str, fields: Sequence[wire.Field]) -> NotStarted:
    """What a child says of its failure, as an error."""
    step, number, words = fields[:3]
    cause = os.fsdecode(wire.bytes_of(words))
    return NotStarted(doing, step=os.fsdecode(wire.bytes_of(step)), cause=cause, errno=wire.int_of(number))


def let_through(status: _socket.socket, outcome: mmap.mmap, doing: str, program: str) -> None:
    """GO to a process at its gate, and how its execve of the program went. Raises NotStarted."""
    failed: NotStarted | None = None
    try:
        packets.send(status, wire.GO)
        while True:
            kind, _, fields, fds = packets.receive(status)
            packets.close_all(fds)
            if kind == wire.READY:
                packets.send(status, wire.GO)
            elif kind == wire.FAILED:
                failed = failure(doing, fields)
    except packets.Closed:
        pass  # it has exec'd, or ended: the page and FAILED say which
    if failed is not None:
        raise failed
    number, stage = min(int.from_bytes(outcome[:4], "little"), HIGHEST_ERRNO), outcome[4]
    if stage == EXECUTING and not number:
        return
    if stage == EXECUTING:
        raise NotStarted(doing, step="exec", cause=f"{program}: {os.strerror(number)}", errno=number)
    if number:
        raise NotStarted(doing, step="load the seccomp filter", cause=os.strerror(number), errno=number)
    raise NotStarted(doing, step="start", cause="the process was killed", errno=0)
