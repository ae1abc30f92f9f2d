"""What goes over an NRI connection, as bytes and as frames (sans-I/O; the sockets are `rpc`'s).

    socket    id (4) · length (4) · payload                        two streams of bytes on one: calls to the plugin, and to the runtime
    stream    length (4) · call (4) · type (1) · flags (1) · payload      ttrpc: a request, and the response to the call of that number

Numbers are big-endian. A stream's frames say nothing of where its messages begin. What a peer has begun is held until it is whole, so a
message has a largest size: one that is larger is passed over, and told of, as ttrpc has it.

Source: containerd's ttrpc protocol (PROTOCOL.md), NRI's multiplexer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

from tare.errors import InvalidArgument, ResourceExhausted

TO_PLUGIN, TO_RUNTIME = 1, 2
"""The streams: what serves on each is in its name."""

LARGEST = 4 << 20  # bytes of a message's payload
HEADER = struct.Struct(">IIBB")
FRAME = struct.Struct(">II")
LARGEST_FRAME = HEADER.size + LARGEST
FIRST_FRAME = 4096
"""A peer in Go reads a frame into a buffer of this size, or right into the rest of a message: a frame that fits neither ends the connection."""

REQUEST, RESPONSE, DATA = 1, 2, 3


class BrokenFrame(InvalidArgument):
    """The peer does not keep to the protocol: nothing that follows can be told apart."""


class Message(NamedTuple):
    """One message of a stream. `oversized` is how many bytes one had that was passed over; its payload is empty then."""

    call: int
    type: int
    flags: int
    payload: bytes
    oversized: int = 0


def message(call: int, kind: int, payload: bytes, flags: int = 0) -> bytes:
    """A message as a stream has it. Raises ResourceExhausted for one that is too large."""
    if len(payload) > LARGEST:
        cause = f"it has {len(payload)} bytes, and may have {LARGEST}"
        raise ResourceExhausted("send a message over ttrpc", cause=cause)
    return HEADER.pack(len(payload), call, kind, flags) + payload


def frames(stream: int, data: bytes) -> Iterator[bytes]:
    """A message as the socket has it."""
    for part in (data[:FIRST_FRAME], data[FIRST_FRAME:]):
        if part:
            yield FRAME.pack(stream, len(part)) + part


class Socket:
    """Takes a socket's bytes apart."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._stream = 0
        self._left = 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(stream, bytes of it) each, as they come. Raises BrokenFrame."""
        view = memoryview(data)
        while view:
            if not self._left:
                view = self._begin(view)
                continue
            part, view = view[: self._left], view[self._left :]
            self._left -= len(part)
            yield self._stream, bytes(part)

    def _begin(self, view: memoryview) -> memoryview:
        missing = FRAME.size - len(self._head)
        self._head += view[:missing]
        if len(self._head) == FRAME.size:
            self._stream, self._left = FRAME.unpack(self._head)
            self._head.clear()
            if self._left > LARGEST_FRAME:
                cause = f"a frame of {self._left} bytes is announced, where {LARGEST_FRAME} are the most"
                raise BrokenFrame("read an NRI connection", cause=cause)
        return view[missing:]


class Stream:
    """Takes a stream's bytes apart."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._head: tuple[int, int, int, int] | None = None
        self._dropping = 0

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole by now."""
        view = memoryview(data)
        while view or (self._head is not None and not self._missing()):
            if self._dropping:
                dropped = min(self._dropping, len(view))
                self._dropping -= dropped
                view = view[dropped:]
                continue
            missing = self._missing()
            self._held += view[:missing]
            view = view[missing:]
            if not self._missing():
                found = self._take()
                if found is not None:
                    yield found

    def _missing(self) -> int:
        """Bytes until what is being read is whole."""
        whole = HEADER.size if self._head is None else self._head[0]
        return whole - len(self._held)

    def _take(self) -> Message | None:
        """What is whole: a header, of which nothing is told yet, or a message."""
        if self._head is None:
            length, call, kind, flags = HEADER.unpack(self._held)
            self._held.clear()
            if length > LARGEST:
                self._dropping = length
                return Message(call, kind, flags, b"", oversized=length)
            self._head = (length, call, kind, flags)
            return None
        _, call, kind, flags = self._head
        payload = bytes(self._held)
        self._held.clear()
        self._head = None
        return Message(call, kind, flags, payload)
