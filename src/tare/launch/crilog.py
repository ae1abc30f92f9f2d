"""The CRI log format: what a stream said, as lines of a log file. Pure: bytes in, bytes out; files are elsewhere.

    2026-01-01T00:00:00.000000000Z stdout F a whole line, or the last part of one
    2026-01-01T00:00:00.000000000Z stderr P a part of a line that goes on in this stream's next record

A reader joins the parts: each P without a newline, the F after them with one. Source: the CRI documentation of
`ContainerConfig.log_path` and the kubelet's log reader.
"""

from __future__ import annotations

import os
import time

STREAMS = (b"stdout", b"stderr")


def stamp(time_ns: int) -> bytes:
    """RFC 3339 in UTC with nine digits of a second."""
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    return b"%s.%09dZ" % (time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode(), nanoseconds)


def format_batch(data: bytes, time_ns: int, stream: bytes, is_open: bool, max_line: int) -> tuple[bytes, bool]:
    """Records for what one read gave, and whether the stream's last line is open after them (a P without its F).

    A line of more than `max_line` bytes is cut into parts of that size; an unfinished last line goes out at once as a
    part. `is_open` is the state before; it only matters when `data` is empty.
    """
    if not data:
        return b"", is_open
    head = b"%s %s " % (stamp(time_ns), stream)
    full, part = head + b"F ", head + b"P "
    pieces: list[bytes] = []
    start, size = 0, len(data)
    while size - start > max_line:
        # Whatever lies before the last newline within max_line bytes is whole lines that need no cutting.
        end = data.rfind(b"\n", start, start + max_line + 1)
        if end >= 0:
            pieces.append(whole_lines(data[start:end], full))
            start = end + 1
        else:
            pieces.append(b"%s%s\n" % (part, data[start : start + max_line]))
            start += max_line
    end = data.rfind(b"\n", start)
    if end >= 0:
        pieces.append(whole_lines(data[start:end], full))
        start = end + 1
    if start < size:
        pieces.append(b"%s%s\n" % (part, data[start:]))
    return b"".join(pieces), data[-1] != 0x0A


def whole_lines(lines: bytes, full: bytes) -> bytes:
    """Records for whole lines, given without the last one's newline."""
    return b"%s%s\n" % (full, lines.replace(b"\n", b"\n" + full))


def end_line(time_ns: int, stream: bytes) -> bytes:
    """The empty F that ends an open line when nothing more will come."""
    return b"%s %s F \n" % (stamp(time_ns), stream)


def loss_notice(time_ns: int, stream: bytes, lines: int, error: int) -> bytes:
    """The record that stands where lines were dropped: their number, and the errno of the write that failed.

    Without an errno it says that something may be missing: the pipe that held it is gone, and nobody can tell.
    """
    if error:
        text = f"[tare: {lines} line{'s' if lines != 1 else ''} of output dropped here: {os.strerror(error)}]"
    else:
        text = "[tare: output may be missing here: the logger was killed together with the keeper of its pipe]"
    return b"%s %s F %s\n" % (stamp(time_ns), stream, text.encode())


def count_lines(data: bytes) -> int:
    """Lines that begin or go on in a batch."""
    return data.count(b"\n") + (data[-1:] not in (b"", b"\n"))
