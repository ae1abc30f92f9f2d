"""The maker's and the child's side of `birth`: everything that happens in a process that will be, or makes, the container's.

After CREATE the child comes to its hold, the last of its steps, and says READY. GO lets it through to its exec. HOLD makes it
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

from tare.launch import between, exec, packets, steps, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap

    from tare.launch.machine import Machine

ENOENT, EACCES, ENOTDIR, EINVAL = 2, 13, 20, 22


def main(status: _socket.socket, outcome: mmap.mmap, outcome_fd: int) -> None:
    """The maker: wait for what is to be made, and make it. Does not return."""
    try:
        kind, _, fields, fds = packets.receive(status)
    except packets.Closed:
        os._exit(1)
    steps.OPERATIONS["find_program"] = find_program
    if kind == wire.CREATE:
        plan_fd, *rest = fds
        cgroup = rest.pop() if wire.int_of(fields[1]) else -1
        steps.OPERATIONS["hold"] = Gate(rest[0], outcome_fd).hold if rest else refuse
        between.main(status, outcome, plan_fd, wire.int_of(fields[0]), cgroup)
    elif kind == wire.EXEC:
        plan_fd, target = fds
        exec.main(status, outcome, plan_fd, target, [])
    os._exit(1)


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

    def __init__(self, listener: int, outcome: int) -> None:
        self.listener = _socket.socket(fileno=listener)
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
