"""The logger's side of the keeper: copies of descriptors that must outlive it. Goes on without a keeper, and comes back to one.

What is in a FIFO vanishes when the last descriptor of it is closed, and a terminal hangs up when its last master is: so the
keeper has a copy of each. While it cannot be reached, what it is to forget is remembered here; what it is to keep, the
logger knows, and tells again after `connect`.
"""

from __future__ import annotations

import select

from tare.launch import packets, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

FIFO = b"fifo/"
PRIVATE_PIPE = b"logger/"  # the key of a group's private pipe, before the group's name
PATIENCE = 1000  # milliseconds for an answer, of which the logger needs none but when it begins


class Spares:
    """A connection to the keeper that listens at `path`, or none (`fileno` is -1)."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.connection: socket.socket | None = None
        self.dropped: list[bytes] = []

    def fileno(self) -> int:
        """For epoll."""
        return self.connection.fileno() if self.connection is not None else -1

    def connect(self) -> bool:
        """Try to reach the keeper, and tell it what to forget. True when this made a new connection."""
        if self.connection is not None:
            return False
        try:
            self.connection = packets.connect(self.path)
        except OSError:
            return False
        self.connection.setblocking(False)
        dropped, self.dropped = self.dropped, []
        for prefix in dropped:
            self.drop(prefix)
        return self.connection is not None

    def close(self) -> None:
        """Give the connection up."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def store(self, key: bytes, *fds: int) -> None:
        """Have copies kept, in the place of those kept before."""
        self._send(wire.STORE, 0, key, fds)

    def drop(self, prefix: bytes) -> None:
        """Have every copy let go whose key begins so."""
        if not self._send(wire.DROP, 0, prefix, ()):
            self.dropped.append(prefix)

    def fetch(self, key: bytes) -> int | None:
        """The descriptor kept under a key, -1 where there is none, None where the keeper does not answer."""
        if not self._send(wire.FETCH, 1, key, ()):
            return None
        answer = self._receive(PATIENCE)
        while answer is not None and answer[0] != 1:
            answer = self._receive(PATIENCE)
        if answer is None:
            self.close()
            return None
        first, *others = answer[1] or [-1]
        packets.close_all(others)
        return first

    def hear(self) -> None:
        """Take what the keeper says unasked (it tells of exits, which do not matter here), or notice that it is gone."""
        answer = self._receive(0)
        if answer is not None:
            packets.close_all(answer[1])

    def _send(self, kind: int, request: int, key: bytes, fds: tuple[int, ...]) -> bool:
        if self.connection is None:
            return False
        try:
            packets.send(self.connection, kind, request, (key,), fds)
        except (packets.Closed, OSError):
            self.close()
            return False
        return True

    def _receive(self, patience: int) -> tuple[int, list[int]] | None:
        """(request ID, descriptors) of the next message, or None; at the end the connection is closed."""
        if self.connection is None:
            return None
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if not poll.poll(patience):
            return None
        try:
            _, request, _, fds = packets.receive(self.connection)
        except (packets.Closed, wire.WireError):
            self.close()
            return None
        return request, fds
