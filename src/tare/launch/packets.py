"""The socket side of `wire`: packets with descriptors, sent and received whole.

`socket` itself is imported by who listens or connects: it brings `enum` and `selectors`, more than `tare oci` takes for the rest.
"""

from __future__ import annotations

import _socket
import os
import struct

from tare.launch import wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence


CREDENTIALS = struct.Struct("iii")  # struct ucred


class Closed(Exception):
    """The other side is gone."""


def listen(path: str) -> socket.socket:
    """A packet socket listening at `path`, in the place of a stale one."""
    import socket

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    temporary = f"{path}.{os.getpid()}"
    if os.path.lexists(temporary):
        os.unlink(temporary)
    listener.bind(temporary)
    os.chmod(temporary, 0o600)
    listener.listen(64)
    os.rename(temporary, path)
    return listener


def accept(listener: socket.socket) -> socket.socket | None:
    """A new connection, not blocking; None where it is gone already. Raises OSError where there is no room for it."""
    try:
        connection, _ = listener.accept()
    except (BlockingIOError, ConnectionError):
        return None
    connection.setblocking(False)
    return connection


def connect(path: str) -> socket.socket:
    """A packet socket connected to `path`. Raises OSError."""
    import socket

    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        connection.connect(path)
    except OSError:
        connection.close()
        raise
    return connection


def send(
    connection: _socket.socket,
    kind: int,
    request: int = 0,
    fields: Sequence[wire.Field] = (),
    fds: Sequence[int] = (),
) -> None:
    """One message. Raises Closed where the other side is gone, BlockingIOError where it does not read."""
    packet = wire.encode(kind, request, fields)
    rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
    try:
        connection.sendmsg([packet], rights, _socket.MSG_NOSIGNAL)
    except (BrokenPipeError, ConnectionError) as error:
        raise Closed from error


def receive(connection: _socket.socket) -> tuple[int, int, list[wire.Field], list[int]]:
    """(kind, request ID, fields, descriptors). Raises Closed at the end, BlockingIOError where nothing is there.

    The descriptors are the caller's to close; those of a malformed packet (WireError: also one that lost some, or its end) are closed here.
    """
    return receive_from(connection)[1:]


def name_senders(connection: _socket.socket) -> None:
    """From now on the kernel tells of each message who has sent it (`receive_from`)."""
    connection.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)


def receive_from(connection: _socket.socket) -> tuple[int, int, int, list[wire.Field], list[int]]:
    """The same after the PID of the sender, 0 where that is not told.

    A process with CAP_SYS_ADMIN over its PID namespace may give another's PID for its own, but only one that is in there.
    """
    space = _socket.CMSG_SPACE(wire.MAX_FDS * 4) + _socket.CMSG_SPACE(CREDENTIALS.size)
    try:
        packet, ancillary, flags, _ = connection.recvmsg(wire.MAX_PACKET, space, _socket.MSG_CMSG_CLOEXEC)
    except ConnectionError as error:
        raise Closed from error
    fds: list[int] = []
    sender = 0
    for level, kind, data in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            fds.extend(struct.unpack_from(f"={len(data) // 4}i", data))
        elif level == _socket.SOL_SOCKET and kind == _socket.SCM_CREDENTIALS:
            sender = CREDENTIALS.unpack(data)[0]
    if not packet and not flags & _socket.MSG_CTRUNC:
        close_all(fds)
        raise Closed
    try:
        if flags & (_socket.MSG_CTRUNC | _socket.MSG_TRUNC) or len(fds) > wire.MAX_FDS:
            raise wire.WireError("a packet that is too long, or has more descriptors than there is room for")
        message, request, fields = wire.decode(packet)
    except wire.WireError:
        close_all(fds)
        raise
    return sender, message, request, fields, fds


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors."""
    for fd in fds:
        os.close(fd)
