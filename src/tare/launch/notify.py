"""Words to the service manager that started us, as sd_notify(3) has them: datagrams of lines, with descriptors beside them."""

from __future__ import annotations

import socket
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def send(address: bytes, text: bytes, fds: Sequence[int] = ()) -> bool:
    """One message to the socket at `address` (NOTIFY_SOCKET's value). False where the manager does not take it now, or is not there."""
    where = b"\0" + address[1:] if address.startswith(b"@") else address
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as ours:
        try:
            ours.sendmsg([text], rights, socket.MSG_NOSIGNAL, where)
        except OSError:  # a full queue, or a manager that is being replaced itself: it is tried again
            return False
    return True
