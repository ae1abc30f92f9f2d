"""Hands the listener of a seccomp filter over to who is to answer for its calls (SCMP_ACT_NOTIFY).

The listener is a descriptor of the process that has loaded the filter, and from then on no call of that process is certain: each may be
refused, or wait for an answer by who has not got the listener yet. So it says what it has to say in memory, and waits there:

    child                                   helper, in the node's namespaces         listenerPath
      ├─ ASK ────────────────────────────────►├─ connect ─────────────────────────────────►│
      │◄───────────────────────────────── OK ─┤                                            │
      │ seccomp(2)                            ┊                                            ┊
      ├─ page: number of the listener ───────►│ pidfd_getfd                                ┊
      ┊ makes no call                         ├─ state, listener ─────────────────────────►│
      │◄────────────────────── page: handed ──┤                                            ┊
      │ goes on: credentials … execve

An exec's first process loads a filter for the process that it makes, which is whom the state is of. That filter is known to let them do
all that they still do (`handlers.early`), so what remains is said in the usual way:

      │ seccomp(2)                            ┊
      ├─ page: number of the listener ───────►│ pidfd_getfd
      │◄─────────────────────── page: taken ──┤
      │ closes it, credentials, clone ─► heir ┊
      ├─ CHILD pid ──────────────────────────►├─ state, listener ─────────────────────────►│
                                     heir ◄── page: handed

What fails before the filter is loaded is a step's failure like any other; after that the helper ends the child.
Source: OCI runtime specification 1.2, config-linux.md, "Seccomp" and "The Container Process State"; seccomp_unotify(2).
"""

from __future__ import annotations

import _socket
import os
import select
import struct
import sys
import time

from tare.launch import foreign as ctypes
from tare.launch import gates, hooks, linux, packets, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

    from tare.launch.machine import Machine
    from tare.launch.outside import Outside

NR_PIDFD_GETFD = 438
NUMBER, HANDED, TAKEN = (
    2,
    3,
    4,
)  # words of the page: the listener's number and one, whether it has been handed over, or taken
ROUNDS = 300_000_000  # of the child's wait, some seconds: the clock may be a system call
SECONDS = 10
PAUSE = 0.0002
ETIMEDOUT = 110


def seccomp_listener(machine: Machine, program: bytes, flags: int, number: int) -> None:
    """Load a filter with a listener, and wait until that is in other hands. `number` is the helper's list that has `listener` in it."""
    load(machine, program, flags, number, HANDED)


def seccomp_listener_for_heir(machine: Machine, program: bytes, flags: int, number: int) -> None:
    """The same for the process that this one is going to make, which must not have the listener. `number` is a list with `heirs_listener`."""
    os.close(load(machine, program, flags, number, TAKEN))
    machine.heir = True


def load(machine: Machine, program: bytes, flags: int, number: int, until: int) -> int:
    """Load it, and wait for a word of the page: the listener."""
    assert machine.page is not None
    words = memoryview(machine.page).cast("I")
    made = linux.SeccompProgram(program, flags)
    rounds = range(ROUNDS)
    gates.outside(machine, number)
    error = made.load()
    if error:
        raise OSError(error, os.strerror(error), "seccomp filter")
    words[NUMBER] = made.listener + 1
    look(machine.page, words, until, rounds)
    return made.listener


def look(page: mmap.mmap, words: memoryview, until: int, rounds: range) -> None:
    """Wait for a word of the page without a call; in vain, the end of this process."""
    for _ in rounds:
        if words[until]:
            return
    page[:4] = ETIMEDOUT.to_bytes(4, "little")
    os._exit(1)


def await_listener(machine: Machine) -> None:
    """The heir waits until its listener is handed over."""
    assert machine.page is not None
    look(machine.page, memoryview(machine.page).cast("I"), HANDED, range(ROUNDS))


def heirs_listener(outside: Outside, path: bytes, state: tuple[bytes, ...]) -> None:
    """`listener` for the process that the child is going to make."""
    listener(outside, path, state, True)


def listener(outside: Outside, path: bytes, state: tuple[bytes, ...], heir: bool = False) -> None:
    """Connect to the socket at the path; once the child has loaded its filter, send the state, with its PID put in, and the listener."""
    words = memoryview(outside.page).cast("I")
    pidfd = os.pidfd_open(outside.pid)
    agent = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        # Not settimeout: a connect that does not block fails at once where the agent is behind with accepting.
        agent.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, struct.pack("ll", SECONDS, 0))
        connect(agent, path)
        packets.send(outside.child, wire.OK, 0, (outside.pid,))
        outside.doomed = pidfd  # if this fails: nothing that it is told can be certain to reach it
        number = wait_for(words, pidfd)
        if number < 0:
            os._exit(1)  # it has ended, and said why if it could
        fd = take(pidfd, number)
        pid = outside.pid
        try:
            if heir:
                words[TAKEN] = 1
                pid = heir_of(outside)
                outside.doomed = os.pidfd_open(pid)
            send(agent, hooks.around(state, pid), fd)
        finally:
            os.close(fd)
    finally:
        agent.close()
    outside.doomed = -1
    words[HANDED] = 1
    os.close(pidfd)


def heir_of(outside: Outside) -> int:
    """The PID that the child says to have made. The heir has the same socket, and may be in the hands of one who may trace: it is not heard."""
    outside.child.settimeout(SECONDS)
    while True:
        try:
            sender, kind, _, fields, fds = packets.receive_from(outside.child)
        except packets.Closed:
            os._exit(1)  # it has ended, and said why if it could
        packets.close_all(fds)
        if sender == outside.pid and kind == wire.CHILD:
            outside.child.settimeout(None)
            return wire.int_of(fields[0])


def connect(agent: _socket.socket, path: bytes) -> None:
    """Reach a socket by a path of any length."""
    place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        agent.connect(b"/proc/self/fd/%d" % place)
    except OSError as error:
        error.filename = os.fsdecode(path)
        raise
    finally:
        os.close(place)


def wait_for(words: memoryview, pidfd: int) -> int:
    """The listener's number in the child; −1 where the child has ended."""
    deadline = time.monotonic() + SECONDS
    while not words[NUMBER]:
        if select.select([pidfd], [], [], PAUSE)[0]:
            return -1
        if time.monotonic() > deadline:
            raise OSError(ETIMEDOUT, "the filter was not loaded in time")
    return int(words[NUMBER]) - 1


def take(pidfd: int, number: int) -> int:
    """pidfd_getfd(2): a copy of another process's descriptor."""
    call = ctypes.c_long(NR_PIDFD_GETFD)
    return linux.check(
        linux.syscall(call, ctypes.c_long(pidfd), ctypes.c_long(number), ctypes.c_long(0)),
        "pidfd_getfd of the listener",
    )


def send(agent: _socket.socket, state: bytes, fd: int) -> None:
    """The state in as many pieces as it takes, the descriptor with the first."""
    rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))
    sent = agent.sendmsg([state], [rights], _socket.MSG_NOSIGNAL)
    agent.sendall(state[sent:], _socket.MSG_NOSIGNAL)


OPERATIONS: dict[str, Callable[..., None]] = {
    "seccomp_listener": seccomp_listener,
    "seccomp_listener_for_heir": seccomp_listener_for_heir,
    "await_listener": await_listener,
}
OUTSIDE: dict[str, Callable[..., None]] = {"listener": listener, "heirs_listener": heirs_listener}
