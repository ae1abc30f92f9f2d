"""SPDY/3.1 as Kubernetes clients speak it: bytes in, events out, and the other way; no socket is here.

    control frame   ┌─┬─────────────┬──────────┬─────────┬────────────┬─────────┐
                    │1│ version u15 │ type u16 │ flags u8│ length u24 │ payload │
                    └─┴─────────────┴──────────┴─────────┴────────────┴─────────┘
    data frame      ┌─┬─────────────────┬─────────┬────────────┬──────┐
                    │0│ stream ID u31   │ flags u8│ length u24 │ data │
                    └─┴─────────────────┴─────────┴────────────┴──────┘

A stream is opened by the client (SYN_STREAM, odd numbers), accepted or refused here, and half closed by each side with FIN. The clients in
use know no flow control and never widen a window, so none is asked of them: what holds a fast sender back is the connection itself, which
its owner stops reading. A client that does keep windows is told of what has been consumed (WINDOW_UPDATE).

Source: SPDY protocol draft 3.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tare.streaming.spdy_headers import HeaderError, Packer, Unpacker

VERSION = 3
SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE = 1, 2, 3, 4, 6, 7, 8, 9
FIN, UNIDIRECTIONAL = 1, 2
PROTOCOL_ERROR, INVALID_STREAM, REFUSED_STREAM, CANCEL, INTERNAL_ERROR, STREAM_IN_USE = 1, 2, 3, 5, 6, 8
GOAWAY_OK, GOAWAY_PROTOCOL_ERROR = 0, 1
HEAD = 8
MAX_CONTROL = 64 << 10  # bytes of a control frame
MAX_STREAMS = 2048  # open at once: hundreds of forwarded connections are two streams each
MAX_DATA = 1 << 16  # bytes in one data frame that is sent: others get their turn in between
WINDOW_STEP = 1 << 15  # bytes that are consumed before a window is widened


class SpdyError(Exception):
    """The peer does not speak SPDY/3: the connection is over, and GOAWAY says so to it."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A new stream. `fin`: nothing will come on it."""

    stream: int
    headers: dict[str, str]
    fin: bool


@dataclass(frozen=True, slots=True)
class Data:
    """Bytes of a stream, maybe none; `fin`: they are its last."""

    stream: int
    data: bytes
    fin: bool


@dataclass(frozen=True, slots=True)
class Reset:
    """The peer wants no more of a stream, either way."""

    stream: int
    status: int


@dataclass(frozen=True, slots=True)
class GoneAway:
    """The peer opens no further stream."""


Event = Opened | Data | Reset | GoneAway


@dataclass(slots=True)
class Stream:
    """Which halves are open, and the window's use by a peer that keeps one."""

    ours: bool = True
    theirs: bool = True
    consumed: int = 0


class Connection:
    """The server's end. `receive` takes what came, `output` has what is to be sent; methods may be called in between."""

    def __init__(self, max_streams: int = MAX_STREAMS) -> None:
        self._max_streams = max_streams
        self._packer, self._unpacker = Packer(), Unpacker()
        self._input, self._at = b"", 0  # what has come, and how much of it is done with
        self._output = bytearray()
        self._streams: dict[int, Stream] = {}
        self._last = 0  # the highest stream that the client has opened
        self._rest = 0  # bytes of a data frame that are still to come
        self._data_of = 0
        self._data_fin = False
        self._over = False

    def output(self) -> bytes:
        """What is to be sent now; it is the caller's."""
        data = bytes(self._output)
        self._output.clear()
        return data

    def has(self, stream: int) -> bool:
        """Whether a stream is open, one way at least."""
        return stream in self._streams

    def open_streams(self) -> int:
        """How many there are."""
        return len(self._streams)

    # What comes

    def receive(self, data: bytes) -> list[Event]:
        """The events in what has come so far. Raises SpdyError, once, after which there is nothing more to be received."""
        if self._over:
            return []
        self._input, self._at = self._input[self._at :] + data, 0
        events: list[Event] = []
        try:
            while self._step(events):
                continue
        except (SpdyError, HeaderError) as error:
            self.go_away(GOAWAY_PROTOCOL_ERROR)
            self._over = True
            self._input, self._at = b"", 0
            raise SpdyError(str(error)) from error
        return events

    def _step(self, events: list[Event]) -> bool:
        """Take one frame, or a part of a data frame; False where more must come first."""
        if self._rest:
            return self._take_data(events)
        at, there = self._at, len(self._input) - self._at
        if there < HEAD:
            return False
        first, flags = int.from_bytes(self._input[at : at + 4], "big"), self._input[at + 4]
        length = int.from_bytes(self._input[at + 5 : at + HEAD], "big")
        if not first >> 31:
            self._at += HEAD
            self._begin_data(first, flags, length, events)
            return True
        if length > MAX_CONTROL:
            raise SpdyError(f"a control frame of {length} bytes, at most {MAX_CONTROL} are possible")
        if there < HEAD + length:
            return False
        payload = self._input[at + HEAD : at + HEAD + length]
        self._at += HEAD + length
        if first >> 16 & 0x7FFF != VERSION:
            raise SpdyError(f"version {first >> 16 & 0x7FFF} of SPDY")
        self._control(first & 0xFFFF, flags, payload, events)
        return True

    def _begin_data(self, stream: int, flags: int, length: int, events: list[Event]) -> None:
        self._data_of, self._data_fin, self._rest = stream, bool(flags & FIN), length
        known = self._streams.get(stream)
        if known is None and stream > self._last:
            raise SpdyError(f"data on stream {stream}, which was never opened")
        if not length:
            self._deliver(b"", self._data_fin, events)

    def _take_data(self, events: list[Event]) -> bool:
        """As much of a data frame as is there: a frame of 16 MB is never held whole."""
        part = self._input[self._at : self._at + self._rest]
        if not part:
            return False
        self._at += len(part)
        self._rest -= len(part)
        self._deliver(part, self._data_fin and not self._rest, events)
        return True

    def _deliver(self, part: bytes, fin: bool, events: list[Event]) -> None:
        """Data of a stream that is over is dropped: it was under way when we ended it."""
        stream = self._streams.get(self._data_of)
        if stream is None or not stream.theirs:
            return
        if part or fin:
            events.append(Data(self._data_of, part, fin))
        if fin:
            stream.theirs = False
            self._forget(self._data_of)

    def _control(self, kind: int, flags: int, payload: bytes, events: list[Event]) -> None:
        if kind == SYN_STREAM:
            self._open(flags, payload, events)
        elif kind in (SYN_REPLY, HEADERS):
            self._unpacker.unpack(take(payload, 4))  # the state of compression goes on with each block
        elif kind == RST_STREAM:
            stream, status = word(payload, 0), word(payload, 4)
            if self._streams.pop(stream, None) is not None:
                events.append(Reset(stream, status))
        elif kind == PING:
            number = word(payload, 0)
            if number & 1:  # the client's; an even number answers one of ours, and there is none
                self._send_control(PING, 0, number.to_bytes(4, "big"))
        elif kind == GOAWAY:
            events.append(GoneAway())
        elif kind not in (SETTINGS, WINDOW_UPDATE):
            raise SpdyError(f"a control frame of type {kind}")

    def _open(self, flags: int, payload: bytes, events: list[Event]) -> None:
        stream = word(payload, 0) & 0x7FFFFFFF
        headers = self._unpacker.unpack(take(payload, 10))
        if not stream & 1 or stream <= self._last:
            raise SpdyError(f"stream {stream} after {self._last}: a client's are odd, and rise")
        self._last = stream
        if len(self._streams) >= self._max_streams:
            self._send_control(RST_STREAM, 0, stream.to_bytes(4, "big") + REFUSED_STREAM.to_bytes(4, "big"))
            return
        fin = bool(flags & FIN)
        self._streams[stream] = Stream(ours=not flags & UNIDIRECTIONAL, theirs=not fin)
        events.append(Opened(stream, headers, fin))

    # What goes

    def accept(self, stream: int, headers: Mapping[str, str] | None = None) -> None:
        """Say yes to a stream that was opened."""
        if stream in self._streams:
            self._send_control(SYN_REPLY, 0, stream.to_bytes(4, "big") + self._packer.pack(headers or {}))

    def send(self, stream: int, data: bytes, *, fin: bool = False) -> None:
        """Bytes on a stream, the last ones with `fin`; on one that is over they go nowhere."""
        known = self._streams.get(stream)
        if known is None or not known.ours:
            return
        parts = [data[at : at + MAX_DATA] for at in range(0, len(data), MAX_DATA)] or [b""]
        for index, part in enumerate(parts):
            last = fin and index == len(parts) - 1
            if part or last:
                self._output += stream.to_bytes(4, "big") + bytes([FIN * last]) + len(part).to_bytes(3, "big") + part
        if fin:
            known.ours = False
            self._forget(stream)

    def consumed(self, stream: int, size: int) -> None:
        """So many bytes of a stream have been used: its window is that much wider again."""
        known = self._streams.get(stream)
        if known is None or not known.theirs:
            return
        known.consumed += size
        if known.consumed >= WINDOW_STEP:
            self._send_control(WINDOW_UPDATE, 0, stream.to_bytes(4, "big") + known.consumed.to_bytes(4, "big"))
            known.consumed = 0

    def reset(self, stream: int, status: int = CANCEL) -> None:
        """No more of a stream, either way."""
        if self._streams.pop(stream, None) is not None:
            self._send_control(RST_STREAM, 0, stream.to_bytes(4, "big") + status.to_bytes(4, "big"))

    def go_away(self, status: int = GOAWAY_OK) -> None:
        """Take no further stream."""
        self._send_control(GOAWAY, 0, self._last.to_bytes(4, "big") + status.to_bytes(4, "big"))

    def _send_control(self, kind: int, flags: int, payload: bytes) -> None:
        first = 1 << 31 | VERSION << 16 | kind
        self._output += first.to_bytes(4, "big") + bytes([flags]) + len(payload).to_bytes(3, "big") + payload

    def _forget(self, stream: int) -> None:
        """A stream that is closed both ways is over."""
        known = self._streams[stream]
        if not known.ours and not known.theirs:
            del self._streams[stream]


def word(payload: bytes, place: int) -> int:
    """Four bytes of a control frame."""
    if place + 4 > len(payload):
        raise SpdyError("a control frame that ends too early")
    return int.from_bytes(payload[place : place + 4], "big")


def take(payload: bytes, start: int) -> bytes:
    """The header block of a control frame."""
    if start > len(payload):
        raise SpdyError("a control frame that ends too early")
    return payload[start:]
