"""Exit records: how a process of ours ended, written by whoever reaps it.

    <run>/tasks/PID.START   a marker: made before the process may exec, gone when its exit is on record; a command's says so
    <run>/exits/PID.START   one line, `exited CODE TIME` or `killed SIGNAL TIME`; TIME in nanoseconds since the epoch

START is the process's start time in clock ticks since boot, so that a PID used again is not mistaken.
"""

from __future__ import annotations

import os
import time

from tare.launch import linux


def mark(run: str, pid: int, start: int, content: bytes = b"") -> None:
    """Make the marker."""
    fd = os.open(f"{run}/tasks/{pid}.{start}", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, content)
    finally:
        os.close(fd)


def unmark(run: str, pid: int, start: int) -> None:
    """Take the marker away: this process's end is nobody's business."""
    path = f"{run}/tasks/{pid}.{start}"
    if os.path.lexists(path):
        os.unlink(path)


def record_exit(run: str, info: os.waitid_result) -> tuple[int, int] | None:
    """Put a zombie's exit on record, if it has a marker, and take the marker away: its PID and start time, or None.

    To be called before the zombie is reaped: unreaped, it keeps its code safe should this process die.
    """
    start = linux.start_time(info.si_pid)
    name = f"{info.si_pid}.{start}"
    if not os.path.lexists(f"{run}/tasks/{name}"):
        return None
    word = b"exited" if info.si_code == os.CLD_EXITED else b"killed"
    linux.replace_file(f"{run}/exits/{name}", b"%b %d %d\n" % (word, info.si_status, time.time_ns()))
    os.unlink(f"{run}/tasks/{name}")
    return info.si_pid, start
