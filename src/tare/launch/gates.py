"""Where a child waits for somebody else: to be placed in a cgroup, for its helper outside, and at its gate.

The other ends of its sockets are in no child but its own helper, so the death of whoever it waits for ends the wait, and
this process.
"""

from __future__ import annotations

import os

from tare.launch import packets, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable, Sequence

    from tare.launch.machine import Machine

EPIPE = 32


def say(connection: _socket.socket, kind: int, fields: Sequence[wire.Field] = ()) -> None:
    """A message to somebody without whom this process is for nothing."""
    try:
        packets.send(connection, kind, 0, fields)
    except packets.Closed:
        os._exit(1)


def until(connection: _socket.socket, kind: int) -> None:
    """Until that message comes."""
    try:
        answer, *_ = packets.receive(connection)
    except packets.Closed:
        os._exit(1)
    if answer != kind:
        os._exit(1)


def until_go(status: _socket.socket, kind: int, fields: Sequence[wire.Field] = ()) -> None:
    """Say where this process is, and wait for GO."""
    say(status, kind, fields)
    until(status, wire.GO)


def barrier(machine: Machine) -> None:
    """Until somebody has put this process where it belongs (systemd, into a scope)."""
    until_go(machine.status, wire.BARRIER)


def outside(machine: Machine, number: int) -> None:
    """Have a list of the plan's steps run by the helper, in the node's namespaces. What fails there is this process's failure."""
    assert machine.outside is not None
    try:
        packets.send(machine.outside, wire.ASK, 0, (number,))
        kind, _, fields, _ = packets.receive(machine.outside)
    except packets.Closed as error:
        raise OSError(EPIPE, "the helper outside has ended") from error
    if kind != wire.OK:
        try:
            packets.send(machine.status, wire.FAILED, 0, fields)
        finally:
            os._exit(1)
    machine.outside_pid = wire.int_of(fields[0])
    machine.warnings += [wire.bytes_of(field) for field in fields[1:]]


OPERATIONS: dict[str, Callable[..., None]] = {"barrier": barrier, "outside": outside}
