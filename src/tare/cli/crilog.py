"""CRI log files: bytes in, entries and output out; files are opened in `follow`.

A line of such a file is

    2025-01-31T10:00:00.123456789+00:00 stdout F what the container wrote

that is a time (RFC 3339 with nanoseconds), a stream, tags parted by colons of which the first is P (the container's line
goes on in this stream's next entry) or F (it ends here), and content that may hold any byte but a newline.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

STREAMS = ("stdout", "stderr")


class LogFormatError(ValueError):
    """A line that is no entry of a CRI log."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a log file. `whole` says that the container's line ends with it."""

    time: bytes
    stream: str
    whole: bool
    content: bytes


def parse(line: bytes) -> Entry:
    """The entry of a line without its newline. Raises LogFormatError."""
    parts = line.split(b" ", 3)
    if len(parts) < 3:
        raise LogFormatError(f"not a CRI log line: {line[:80]!r}")
    stream = parts[1].decode(errors="replace")
    tag = parts[2].split(b":", 1)[0]
    if stream not in STREAMS or tag not in (b"P", b"F"):
        raise LogFormatError(f"not a CRI log line: {line[:80]!r}")
    return Entry(parts[0], stream, tag == b"F", parts[3] if len(parts) == 4 else b"")


class Splitter:
    """Cuts what is read from a file into lines; the last one waits until its newline has come."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The lines that are whole now, without their newlines."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return lines

    def reset(self) -> bytes:
        """Begin anew with another file; returns what had no newline."""
        rest, self._rest = self._rest, b""
        return rest


class Renderer:
    """Turns entries into what the container wrote, byte for byte; with `timestamps`, each of its lines after its time."""

    def __init__(self, *, timestamps: bool = False) -> None:
        self._timestamps = timestamps
        self._within: set[str] = set()

    def render(self, entry: Entry) -> bytes:
        """The bytes of one entry, for its stream."""
        prefix = entry.time + b" " if self._timestamps and entry.stream not in self._within else b""
        if entry.whole:
            self._within.discard(entry.stream)
            return prefix + entry.content + b"\n"
        self._within.add(entry.stream)
        return prefix + entry.content


def last(lines: list[bytes], count: int) -> list[bytes]:
    """The entries that make up the last `count` lines of a container, its unended ones included.

    Counted over both streams; the pieces of a line are never parted. Raises LogFormatError.
    """
    kept: deque[bytes] = deque()
    wanted: dict[str, bool] = {}  # by stream: whether the line that we are in, coming from its end, is one of them
    seen = 0
    for line in reversed(lines):
        entry = parse(line)
        if entry.whole or entry.stream not in wanted:
            seen += 1
            wanted[entry.stream] = seen <= count
        if wanted[entry.stream]:
            kept.appendleft(line)
        elif not any(wanted.values()):
            break
    return list(kept)
