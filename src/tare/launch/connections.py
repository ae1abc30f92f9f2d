"""The launcher's side of its connections: whoever connects asks, one packet for each request, and is answered or refused."""

from __future__ import annotations

import os
import socket

from tare.launch import image, packets, wire
from tare.launch.loop import Loop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Fields = list[wire.Field]
    Serve = Callable[[socket.socket, int, Fields, list[int]], None]

RETRY = 1.0  # seconds before what failed for want of room is tried again
EINVAL, ENOSYS, EPIPE = 22, 38, 32


class Connections:
    """Those of one listening socket. `requests` says what each is made of: its fields (b bytes, i number; None: any), the least number of
    descriptors, and who serves it."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.connections: dict[int, socket.socket] = {}
        self.loop = Loop()
        self.requests: dict[int, tuple[str | None, int, Serve]] = {}
        self.loop.watch(listener.fileno(), self.accept)

    def accept(self) -> None:
        try:
            connection = packets.accept(self.listener)
        except OSError as error:
            image.complain("tare-launcher", f"accept a connection: {error!r}")
            self.loop.unwatch(self.listener.fileno())
            self.loop.later(RETRY, lambda: self.loop.watch(self.listener.fileno(), self.accept))
            return
        if connection is not None:
            self.welcome(connection)

    def welcome(self, connection: socket.socket) -> None:
        self.connections[connection.fileno()] = connection
        self.loop.watch(connection.fileno(), lambda: self.message(connection))

    def hang_up(self, connection: socket.socket) -> None:
        """The other side is gone, or does not read."""
        if connection.fileno() < 0:
            return
        self.loop.unwatch(connection.fileno())
        del self.connections[connection.fileno()]
        connection.close()
        self.lost(connection)

    def lost(self, connection: socket.socket) -> None:
        """For who has something to do with that."""

    def send(
        self, connection: socket.socket, kind: int, request: int, fields: Sequence[wire.Field], fds: Sequence[int] = ()
    ) -> None:
        try:
            packets.send(connection, kind, request, fields, fds)
        except (packets.Closed, wire.WireError, OSError):
            self.hang_up(connection)

    def refuse(self, connection: socket.socket, request: int, step: bytes, number: int, words: bytes) -> None:
        self.send(connection, wire.FAILED, request, (step, number, words))

    def message(self, connection: socket.socket) -> None:
        try:
            kind, request, fields, fds = packets.receive(connection)
        except BlockingIOError:
            return
        except (packets.Closed, wire.WireError):
            self.hang_up(connection)
            return
        shape, least, serve = self.requests.get(kind, ("", 0, None))
        try:
            if serve is None:
                self.refuse(connection, request, b"launcher", ENOSYS, b"unknown message")
            elif shape not in (None, wire.shape(fields)) or len(fds) < least:
                self.refuse(connection, request, b"launcher", EINVAL, b"a request that is not made as it should be")
            else:
                serve(connection, request, fields, fds)
        except (packets.Closed, wire.WireError):
            self.refuse(connection, request, b"reach the keeper", EPIPE, b"the keeper does not answer")
        except OSError as error:
            self.refuse(connection, request, b"make a process", error.errno or 0, os.fsencode(str(error)))
        finally:
            packets.close_all(fds)
