"""A descriptor handed to whoever listens at a unix socket that the command line names: a terminal's master, a pidfd."""

from __future__ import annotations

import _socket
import sys

from tare.errors import FailedPrecondition

# The message that a descriptor travels with, as runc sends it.
TERMINAL, CONTAINER, EXECUTION = b"/dev/ptmx", b"standard", b"setns"


def send(path: str, name: bytes, fd: int) -> None:
    """Send it; it stays the caller's. Raises FailedPrecondition."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        connection.connect(path)
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))]
        connection.sendmsg([name], rights)
    except OSError as error:
        what = "terminal" if name == TERMINAL else "pidfd"
        raise FailedPrecondition(f"send the {what} to {path}", cause=error) from error
    finally:
        connection.close()
