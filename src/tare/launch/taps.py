"""Attached clients: each gets a copy of what a container says, as it is written to the log, over a SOCK_SEQPACKET socket of its own.

A packet is the stream's number (1 stdout or terminal, 2 stderr) and bytes of it; OVER alone says that there will be no more, so that an end
without it is a logger's death. Nothing is dropped: while a client's socket is full its container is not read, and so waits as it would for a
slow disk. One that takes nothing for PATIENCE is cut off. Once the container has ended, what is left of its output is small, and is kept here.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections import deque

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 30.0  # seconds
PIECE = 32 << 10  # bytes of a packet
OVER = b"\0"


class Tap:
    """One client. `queue` is what its socket did not take."""

    __slots__ = ("ending", "identity", "queue", "since", "socket")

    def __init__(self, identity: bytes, connection: socket.socket) -> None:
        self.identity = identity
        self.socket = connection
        self.queue: deque[bytes] = deque()
        self.since = 0.0  # when it took something last, while it does not take all
        self.ending = False


class Taps:
    """All clients of a logger. `changed` is told of a container whose clients take everything again, or are gone."""

    def __init__(self, epoll: select.epoll, changed: Callable[[bytes], None]) -> None:
        self.epoll = epoll
        self.changed = changed
        self.by_fd: dict[int, Tap] = {}
        self.by_container: dict[bytes, list[Tap]] = {}

    def __len__(self) -> int:
        return len(self.by_fd)

    def add(self, identity: bytes, fd: int) -> None:
        """A client; the descriptor is the caller's. Raises OSError for what is no such socket."""
        connection = socket.socket(fileno=socket.dup(fd))
        if connection.family != socket.AF_UNIX or connection.type != socket.SOCK_SEQPACKET:
            connection.close()
            raise OSError(errno.EPROTOTYPE, "a client is joined by a SOCK_SEQPACKET socket")
        connection.setblocking(False)
        tap = Tap(identity, connection)
        self.by_fd[connection.fileno()] = tap
        self.by_container.setdefault(identity, []).append(tap)
        self.epoll.register(connection, 0)  # told of its hanging up

    def feed(self, identity: bytes, stream: int, data: bytes) -> None:
        """What a container has said."""
        for tap in list(self.by_container.get(identity, ())):
            for start in range(0, len(data), PIECE):
                tap.queue.append(bytes((stream + 1,)) + data[start : start + PIECE])
            self.send(tap)

    def blocked(self, identity: bytes) -> bool:
        """Whether a client of the container has not taken all."""
        return any(tap.queue for tap in self.by_container.get(identity, ()))

    def finish(self, identity: bytes) -> None:
        """The container is over: its clients are told when they have taken all."""
        for tap in list(self.by_container.get(identity, ())):
            if not tap.ending:
                tap.ending = True
                tap.queue.append(OVER)
                self.send(tap)

    def send(self, tap: Tap) -> None:
        """As much of the queue as the socket takes."""
        was_blocked = bool(tap.since)
        try:
            while tap.queue:
                tap.socket.send(tap.queue[0], socket.MSG_NOSIGNAL)
                tap.queue.popleft()
                tap.since = 0.0
        except BlockingIOError:
            if not tap.since:
                tap.since = time.monotonic()
            self.epoll.modify(tap.socket, select.EPOLLOUT)
            return
        except OSError:
            self.drop(tap)
            return
        if tap.ending:
            self.drop(tap)
        elif was_blocked:
            self.epoll.modify(tap.socket, 0)
            self.changed(tap.identity)

    def event(self, fd: int, events: int) -> None:
        """A client's socket has room, or the client has hung up."""
        tap = self.by_fd[fd]
        if events & (select.EPOLLHUP | select.EPOLLERR):
            self.drop(tap)
        else:
            self.send(tap)

    def drop(self, tap: Tap) -> None:
        """Let a client go."""
        self.epoll.unregister(tap.socket)
        del self.by_fd[tap.socket.fileno()]
        tap.socket.close()
        tap.queue.clear()
        others = self.by_container[tap.identity]
        others.remove(tap)
        if not others:
            del self.by_container[tap.identity]
        self.changed(tap.identity)

    def patience(self) -> float | None:
        """Seconds until a client's time is over; None where all take what they get."""
        waiting = [tap.since for tap in self.by_fd.values() if tap.since]
        return max(0.0, min(waiting) + PATIENCE - time.monotonic()) if waiting else None

    def expire(self) -> None:
        """Cut off who has taken nothing for too long."""
        now = time.monotonic()
        for tap in [tap for tap in self.by_fd.values() if tap.since and now >= tap.since + PATIENCE]:
            self.drop(tap)
