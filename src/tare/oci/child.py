"""The child's side of `birth`: what happens in a process that will be, or makes, the container's.

A container's process comes to its hold, the last of its steps, and says READY. GO lets it through to its exec. HOLD makes it
listen at the container's gate, a unix socket in its state directory, for whoever runs `start`:

    tare oci start                                  child
       ├─ connect ────────────────────────────────────►│
       │◄─────────── OK, the page for the outcome ─────┤
       ├─ GO ─────────────────────────────────────────►│ leaves its steps
       │◄──────────────────────────────────── READY ───┤
       ├─ GO ─────────────────────────────────────────►│ execve; end of file, with no errno in the page, is success

A connection that says nothing is let go, and the next one is waited for.
"""

from __future__ import annotations

import _socket
import os
import stat

from tare.launch import init, linux, packets, plan, steps, wire
from tare.launch.machine import Machine
from tare.oci import interrupts, stock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tare.handlers.plans import Compiled
    from tare.launch.plan import Plan
    from tare.oci.birth import Birth

ENOENT, EACCES, ENOTDIR, EINVAL = 2, 13, 20, 22


def main(birth: Birth, gate: _socket.socket | None, work: Plan) -> None:
    """The whole way from a fresh child to execve; does not return."""
    live(birth, work, gate, -1, lambda: init.run(Machine(birth.theirs), birth.outcome, work))


def in_between(
    birth: Birth, gate: _socket.socket | None, made: Compiled, cgroup: int, maker: Callable[..., None]
) -> None:
    """The process in between that makes such a child (`between.main`); does not return."""
    flags = made.clone_flags
    live(
        birth, made.plan, gate, cgroup, lambda: maker(birth.theirs, birth.outcome, plan.seal(made.plan), flags, cgroup)
    )


def execution(birth: Birth, work: Plan, target: int, maker: Callable[..., None]) -> None:
    """The process in between that makes a further process in a container (`exec.main`); does not return."""
    live(birth, work, None, target, lambda: maker(birth.theirs, birth.outcome, plan.seal(work), target, []))


def live(birth: Birth, work: Plan, gate: _socket.socket | None, fd: int, function: Callable[[], None]) -> None:
    """Be such a process, whatever happens never one that goes on as the command."""
    try:
        birth.status.close()
        prepare(birth, work, gate, fd)
        function()
    except OSError as error:
        steps.fail(birth.theirs, "setup", error)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this process and is told to the command
        steps.fail_with(birth.theirs, "setup")
    finally:
        os._exit(1)


def prepare(birth: Birth, work: Plan, gate: _socket.socket | None, fd: int) -> None:
    """Of the command's, only what the process needs: its descriptors, with one more, and the steps that only this command knows."""
    stock.leave()
    interrupts.leave()
    needed = [birth.theirs.fileno(), birth.outcome_fd, fd, gate.fileno() if gate else -1]
    close_others(work["inherit"], [kept for kept in needed if kept >= 0])
    steps.OPERATIONS["find_program"] = find_program
    steps.OPERATIONS["hold"] = Gate(gate, birth.outcome_fd).hold if gate else refuse


def close_others(inherited: int, kept: Iterable[int]) -> None:
    """All descriptors of the command's but those that the program inherits, and these."""
    first = inherited
    for fd in sorted(kept):
        if fd > first:
            linux.close_range(first, fd - 1)
        first = max(first, fd + 1)
    linux.close_range(first)


def find_program(machine: Machine, candidates: list[bytes], name: bytes) -> None:
    """See that there is a program to execute, as runc does: who creates a container learns of it then, not when it is started."""
    number = ENOENT
    for path in candidates:
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno not in (ENOENT, ENOTDIR):
                number = error.errno or number
            continue
        if not stat.S_ISDIR(mode) and mode & 0o111:
            return
        number = EACCES
    if number == ENOENT and b"/" not in name:
        raise OSError(ENOENT, "executable file not found in $PATH", os.fsdecode(name))
    raise OSError(number, os.strerror(number), os.fsdecode(name))


class Gate:
    """Where a created container waits: the socket that listens, and the page that is to say how execve went."""

    def __init__(self, listener: _socket.socket, outcome: int) -> None:
        self.listener = listener
        self.outcome = outcome

    def hold(self, machine: Machine) -> None:
        """The last of the steps. From here on `machine.status` leads to whoever starts the container."""
        try:
            packets.send(machine.status, wire.READY, 0, machine.warnings[:8])
            kind, *_ = packets.receive(machine.status)
            if kind != wire.HOLD:
                os._exit(1)
            packets.send(machine.status, wire.OK)
        except packets.Closed:
            os._exit(1)
        machine.status.close()
        machine.warnings.clear()
        machine.status = self.wait()
        self.listener.close()

    def wait(self) -> _socket.socket:
        """The connection of whoever starts the container."""
        while True:
            connection = _socket.socket(fileno=self.listener._accept()[0])  # type: ignore[attr-defined]
            try:
                packets.send(connection, wire.OK, 0, (), (self.outcome,))
                kind, *_ = packets.receive(connection)
            except (packets.Closed, wire.WireError):
                connection.close()
                continue
            if kind == wire.GO:
                return connection
            connection.close()


def refuse(machine: Machine) -> None:
    """A plan with a hold, and no socket to wait at."""
    raise OSError(EINVAL, "there is no gate to wait at")
