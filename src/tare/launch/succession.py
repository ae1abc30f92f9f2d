"""How keeper and launcher make way for another version of their code: the same process, with its children and its descriptors.

What there is goes into a sealed memfd. A child tries whether the other code can take it up; only where that works, the process
itself becomes it. So a version that does not work leaves the one that runs as it was, and the answer says what was wrong.

    daemon            keeper or launcher                    a child of it                    the same process
      │ RENEW ───────────►│ the state, in a memfd               │                                │
      │ (command, image)  ├─ fork, execve (mode "try") ────────►│ takes up all of it, ends: 0    │
      │                   │◄────────────────────────────────────┤                                │
      │◄────── FAILED ────┤ where it did not: what it said                                       │
      │                   ├─ execve (mode "take") ──────────────────────────────────────────────►│ takes up all of it
      │◄──────────────────────────────────────────────────────────────────────────────── OK ─────┤

The state is a dictionary of marshal's plain types, and no more than the next version and the last one both understand: `form` is raised
only for what an older reader would get wrong, one version after its reader was taught the new form. Keys that a reader does not know it leaves alone.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from tare.launch import image, linux, packets, plan, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    State = dict[str, Any]

FORM = 1
TRY, TAKE = b"try", b"take"
BEGIN = "begin"  # a state with nothing but what the service manager has kept
EINVAL = 22
PATIENCE = 30.0  # seconds for the trial, on a node that has much else to do
SAID = 2000  # bytes of what the trial has said that go into the answer


class Unknown(Exception):
    """A state that this code does not understand."""


class Successor:
    """A version that is to come, asked for over `connection`. RENEW's fields: its identity, and its command line as far as it is the same for both.

    Raises OSError for a request that is none. The image (an interpreter) is kept until `close`.
    """

    def __init__(
        self, connection: socket.socket, request: int, fields: Sequence[wire.Field], fds: Sequence[int]
    ) -> None:
        if len(fields) < 2 or wire.shape(fields).strip("b") or len(fds) != 1:
            raise OSError(EINVAL, "no request of a successor")
        self.connection = connection
        self.request = request
        self.identity, *self.command = (wire.bytes_of(field) for field in fields)
        self.image = os.dup(fds[0])
        self.pid, self.pidfd, self.said = 0, -1, -1
        self.until = time.monotonic() + PATIENCE

    def close(self) -> None:
        """Let go of what belongs to it."""
        for fd in (self.image, self.pidfd, self.said):
            if fd >= 0:
                os.close(fd)
        self.image = self.pidfd = self.said = -1

    def attempt(self, run: str, state: State) -> None:
        """Have a child try it; its end is the caller's to see. Raises OSError."""
        self.said = os.memfd_create("tare-said", os.MFD_CLOEXEC)
        self.pid, self.pidfd = linux.clone3()
        if self.pid == 0:
            os.dup2(self.said, 2)
            image.end_after(self.become, run, state, TRY)

    def expired(self) -> bool:
        """Whether its time is over; then the child is killed."""
        if time.monotonic() < self.until:
            return False
        signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        return True

    def words(self) -> bytes:
        """The end of what the child has said, a complaint for launch.log: the last line is what went wrong."""
        told = os.pread(self.said, 1 << 16, 0)
        os.write(2, told)
        return told.strip().rpartition(b"\n")[2][-SAID:] or b"it ended, and did not say why"

    def become(self, run: str, state: State, mode: bytes = TAKE) -> None:
        """Be that version, with the descriptors of the state (`fds`) and no others. Returns only by raising OSError: then nothing has changed."""
        fds = [self.image, *state["fds"]]
        sealed = plan.seal(state)
        try:
            for fd in (sealed, *fds):
                os.set_inheritable(fd, True)
            arguments = [*self.command, os.fsencode(run), self.identity, mode, b"%d" % sealed]
            os.execve(b"/proc/self/fd/%d" % self.image, arguments, os.environ)
        finally:
            for fd in fds:
                os.set_inheritable(fd, False)
            os.close(sealed)


def state_of(role: str, connection: socket.socket | None, request: int, fds: Sequence[int], **rest: Any) -> State:
    """A state: what every role has, and the rest. `fds` are all descriptors in it."""
    asked = (connection.fileno(), request) if connection is not None else (-1, 0)
    return {"form": FORM, "role": role, "fds": list(fds), "limits": image.OPEN_FILES, "asked": asked, **rest}


def take_up(fd: int) -> State:
    """Read the state, and keep the descriptors in it and no others. Raises Unknown."""
    state = plan.read(fd)
    if state["form"] > FORM:
        raise Unknown(f"what keeper or launcher handed over has form {state['form']}; this version knows {FORM}")
    linux.keep_only(*state["fds"])
    for kept in state["fds"]:
        os.set_inheritable(kept, False)
    image.OPEN_FILES = tuple(state["limits"])
    return state


def answer(state: State, identity: bytes) -> None:
    """Say to who has asked that it is done. Nobody may be there any more."""
    fd, request = state["asked"]
    if fd < 0:
        return
    with socket.socket(fileno=os.dup(fd)) as connection:
        try:
            packets.send(connection, wire.OK, request, (identity,))
        except (packets.Closed, OSError) as error:
            image.complain(f"tare-{state['role']}", f"say that it was renewed: {error!r}")


def main() -> None:
    """`… -c BOOT PACKAGE RUN IDENTITY [MODE STATE]`: begin as a keeper, or be what the state says."""
    run, identity, *rest = sys.argv[1:]
    from tare.launch import keeper, renewing

    if not rest:
        linux.keep_only()
        keeper.main(run, os.fsencode(identity), None)
    state = take_up(int(rest[1]))
    if rest[0] == BEGIN:
        keeper.main(run, os.fsencode(identity), state)
    code = os.fsencode(identity)
    is_keeper = state["role"] == "keeper"
    life = keeper.resume(run, code, state) if is_keeper else renewing.resume(run, code, state)
    if rest[0] == os.fsdecode(TRY):
        os._exit(0)
    answer(state, code)
    image.end_after(life.serve)
