"""Processes of this boot: signalled only through pidfds checked against their start time, awaited by them, and their exits read."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import signal
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from tare.handlers.interpreter import MEMORY, interpreter
from tare.launch import linux

PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, 64 bytes); Linux 6.13, exit codes from 6.15
PIDFD_INFO_EXIT = 1 << 3
RECORD_WAIT = 3.0  # seconds for whoever is to reap a zombie, before its exit code is read where it lies
RECORD_POLL = 0.05
EXEC_POLL = 0.002
LOST = 255
# What /proc/PID/exe says of a sealed copy of the interpreter, and of a view of it through an overlay that is mounted nowhere.
IMAGES = (f"/memfd:{MEMORY} (deleted)", f"/{interpreter().name}")


@dataclass(frozen=True, slots=True)
class Process:
    """`start_time` is field 22 of /proc/PID/stat."""

    pid: int
    start_time: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecord:
    """How a process ended: `code` 0–255 (128 + `signal`), `finished_at` in ns. `known` is False where nobody can tell: then `code` is 255."""

    process: Process
    code: int
    signal: int
    finished_at: int
    known: bool = True


class Processes:
    """Pidfds by process, and the directory of exit records."""

    def __init__(self, run: Path) -> None:
        self._run = str(run)
        self._pidfds: dict[Process, int] = {}
        self._told: dict[Process, asyncio.Event] = {}

    def adopt(self, process: Process, pidfd: int) -> None:
        """Take over a pidfd that is certain to be this process's."""
        known = self._pidfds.pop(process, None)
        if known is not None:
            os.close(known)
        self._pidfds[process] = pidfd

    def open(self, process: Process) -> int | None:
        """A pidfd, kept here; None where the process is gone. The PID is checked after opening, so that it cannot have changed hands."""
        if process in self._pidfds:
            return self._pidfds[process]
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            return None
        if not linux.same_process(process.pid, process.start_time):
            os.close(pidfd)
            return None
        self._pidfds[process] = pidfd
        return pidfd

    def forget(self, process: Process) -> None:
        """Close the pidfd and drop the exit record."""
        pidfd = self._pidfds.pop(process, None)
        if pidfd is not None:
            os.close(pidfd)
        self._told.pop(process, None)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._record(process))

    def signal(self, process: Process, number: int) -> bool:
        """Send a signal; False where the process is gone."""
        pidfd = self.open(process)
        if pidfd is None:
            return False
        try:
            signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def alive(self, process: Process) -> bool:
        """Whether it has not ended (a zombie has)."""
        pidfd = self.open(process)
        return pidfd is not None and not ended(pidfd)

    def recorded(self, process: Process) -> bool:
        """Whether its exit is on record."""
        return os.path.exists(self._record(process))

    def tell(self, process: Process) -> None:
        """Its exit has been written down."""
        event = self._told.get(process)
        if event is not None:
            event.set()

    async def came_to_run(self, process: Process) -> bool:
        """Whether a process that had to wait for a launcher that is gone came past its exec, and runs. Waits until it did, or has ended:
        one that was still to be let go ends with its launcher."""
        while self.alive(process):
            if past_exec(process.pid):
                return self.alive(process)
            await asyncio.sleep(EXEC_POLL)
        return False

    async def wait(self, process: Process) -> ExitRecord:
        """Until the process has ended and its exit is on record, or is known never to be.

        Whoever of ours reaps writes the record first. So once a process is reaped, or has no marker, a record that is not there
        will never be: then the kernel is asked, and what it cannot tell either is unknown.
        """
        kept = self.open(process)
        pidfd = None if kept is None else os.dup(kept)  # others may wait for it too, and forget it
        try:
            if pidfd is not None and not self.recorded(process):
                await readable(pidfd)
            return await self._settle(process, pidfd)
        finally:
            if pidfd is not None:
                os.close(pidfd)

    async def _settle(self, process: Process, pidfd: int | None) -> ExitRecord:
        event = self._told.setdefault(process, asyncio.Event())
        deadline = time.monotonic() + RECORD_WAIT
        while True:
            settled = pidfd is None or not os.path.exists(self._marker(process)) or reaped(pidfd)
            record = self._read(process)
            if record is not None:
                return record
            left = deadline - time.monotonic()
            if settled or left <= 0:
                return self._ask_kernel(process, pidfd)
            try:
                async with asyncio.timeout(min(RECORD_POLL, left)):
                    await event.wait()
            except TimeoutError:
                continue
            event.clear()

    def _record(self, process: Process) -> str:
        return f"{self._run}/exits/{process.pid}.{process.start_time}"

    def _marker(self, process: Process) -> str:
        return f"{self._run}/tasks/{process.pid}.{process.start_time}"

    def _read(self, process: Process) -> ExitRecord | None:
        try:
            with open(self._record(process), "rb", buffering=0) as file:
                return parse_record(process, file.readall().decode(errors="replace"))
        except FileNotFoundError:
            return None

    def _ask_kernel(self, process: Process, pidfd: int | None) -> ExitRecord:
        """Nobody of ours has written its exit down: the kernel remembers by the pidfd, from 6.15 on, or in the zombie."""
        status = exit_status(pidfd) if pidfd is not None else None
        if status is None:
            status = zombie_status(process)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._marker(process))
        if status is None:
            return ExitRecord(process=process, code=LOST, signal=0, finished_at=time.time_ns(), known=False)
        return from_status(process, status, time.time_ns())


def parse_record(process: Process, text: str) -> ExitRecord:
    """`exited CODE TIME` or `killed SIGNAL TIME`; anything else is an end that nobody knows."""
    words = text.split()
    if len(words) != 3 or words[0] not in ("exited", "killed") or not all(word.isdecimal() for word in words[1:]):
        return ExitRecord(process=process, code=LOST, signal=0, finished_at=time.time_ns(), known=False)
    number, finished_at = int(words[1]), int(words[2])
    if words[0] == "exited":
        return ExitRecord(process=process, code=number, signal=0, finished_at=finished_at)
    return ExitRecord(process=process, code=128 + number, signal=number, finished_at=finished_at)


def from_status(process: Process, status: int, finished_at: int) -> ExitRecord:
    """From a wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return ExitRecord(process=process, code=128 + number, signal=number, finished_at=finished_at)
    return ExitRecord(process=process, code=os.WEXITSTATUS(status), signal=0, finished_at=finished_at)


def exit_status(pidfd: int) -> int | None:
    """The wait status of a reaped process, by PIDFD_GET_INFO; None on kernels that do not tell."""
    buffer = bytearray(64)
    struct.pack_into("<Q", buffer, 0, PIDFD_INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, buffer, True)
    except OSError:
        return None
    (mask,) = struct.unpack_from("<Q", buffer, 0)
    (status,) = struct.unpack_from("<i", buffer, 60)
    return int(status) if mask & PIDFD_INFO_EXIT else None


def zombie_status(process: Process) -> int | None:
    """The wait status of a process that has ended and is not reaped: field 52 of its stat, proc(5). None where it is no such."""
    try:
        with open(f"/proc/{process.pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    if fields[0] != b"Z" or int(fields[19]) != process.start_time:
        return None
    return int(fields[49])


def ended(pidfd: int) -> bool:
    """Whether a process has ended: it is a zombie, or reaped."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def reaped(pidfd: int) -> bool:
    """Whether a process is gone altogether."""
    try:
        signal.pidfd_send_signal(pidfd, 0)
    except ProcessLookupError:
        return True
    return False


async def readable(fd: int) -> None:
    """Until a descriptor, which has no other reader, can be read from (a pidfd: until its process has ended)."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    loop.add_reader(fd, resolve, future)
    try:
        await future
    finally:
        loop.remove_reader(fd)


def resolve(future: asyncio.Future[None]) -> None:
    """A result for a future that may have one, or may have been cancelled."""
    if not future.done():
        future.set_result(None)


def past_exec(pid: int) -> bool:
    """Whether a process executes something else than keeper and launcher do (`interpreter`). False for one that is ending: it executes nothing."""
    try:
        return os.readlink(f"/proc/{pid}/exe") not in IMAGES
    except OSError:
        return False
