"""The daemon's side of the loggers: where containers' output goes, is reopened, drained and ended.

Each request has a connection of its own: a logger may be killed and another come at any moment, and each request can be asked
again without harm, so that it is, until it is answered or its time is over. FIFOs are made here; what they carry never comes here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import ClassVar

from tare.errors import DeadlineExceeded, Unavailable, describe
from tare.handlers.channel import Refused, text
from tare.launch import packets, wire

TIMEOUT = 10.0  # seconds for an answer: a logger whose disk blocks has none
PAUSES = (0.0, 0.01, 0.05, 0.25)  # seconds before another attempt; the last one for all that follow


class LogFailed(Refused):
    """The logger cannot do it: `errno` and the path are those of its failed call."""

    code: ClassVar[str] = "FAILED_PRECONDITION"


class Logs:
    """Loggers of the run directory `run`. `start_logger` has one forked for a group, and returns once its socket listens.

    A request has `timeout` seconds.
    """

    def __init__(self, run: Path, start_logger: Callable[[str], Awaitable[None]], *, timeout: float = TIMEOUT) -> None:
        self._run = run
        self._start_logger = start_logger
        self._timeout = timeout
        self._paths: dict[str, str] = {}  # of this daemon's own adds, for its errors' words

    async def add(
        self, group: str, container_id: str, log_path: str, *, tty: int | None, stdin: bool, max_line: int
    ) -> None:
        """Have a container's output written to `log_path` in CRI format; with an empty path it is read and forgotten.

        Output comes from containers/<id>/stdout and stderr (FIFOs, made here, as stdin is where it is asked for), or from the
        terminal whose master is `tty` (stays the caller's). `max_line` bytes are in one record at most. The log and its
        directory are made if absent. Idempotent. Raises LogFailed, DeadlineExceeded.
        """
        self._paths[container_id] = log_path
        flags = wire.ADD_TERMINAL if tty is not None else wire.ADD_STDIN if stdin else 0
        if tty is None:
            self._make_fifos(container_id, ["stdout", "stderr", *(["stdin"] if stdin else [])])
        fields = (container_id.encode(), os.fsencode(log_path), max_line, flags)
        await self._ask(group, wire.ADD, container_id, fields, [tty] if tty is not None else [], "write")

    async def reopen(self, group: str, container_id: str) -> None:
        """The next byte goes to a new file at the log path. Idempotent. Raises LogFailed, DeadlineExceeded."""
        await self._ask(group, wire.REOPEN, container_id, (container_id.encode(),), (), "reopen")

    async def attach(self, group: str, container_id: str) -> socket.socket:
        """A socket that gets a copy of all that a container says from now on, in packets (`launch.taps`). It is the caller's.

        Raises LogFailed, DeadlineExceeded.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with theirs:
            try:
                await self._ask(group, wire.ATTACH, container_id, (container_id.encode(),), [theirs.fileno()], "follow")
            except BaseException:
                ours.close()
                raise
        return ours

    async def end_input(self, group: str, container_id: str) -> None:
        """A container's stdin is over once nobody else writes to it. Idempotent. Raises LogFailed, DeadlineExceeded."""
        await self._ask(group, wire.CLOSE_INPUT, container_id, (container_id.encode(),), (), "end the stdin beside")

    async def drain(self, group: str, container_id: str, timeout: float) -> bool:
        """Wait until all that a dead container has written is in its log; False where something still writes after `timeout` seconds."""
        if not self._is_served(group):
            return True
        try:
            await self._ask(group, wire.DRAIN, container_id, (container_id.encode(),), (), "drain", timeout)
        except DeadlineExceeded:
            return False
        return True

    async def remove(self, group: str, container_id: str) -> None:
        """Forget a container and its FIFOs; the log stays. Idempotent. Raises DeadlineExceeded."""
        if self._is_served(group):
            await self._ask(group, wire.REMOVE, container_id, (container_id.encode(),), (), "end")
        directory = self._run / "containers" / container_id
        for name in ("stdin", "stdout", "stderr"):
            (directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not there, or with things of others in it
            directory.rmdir()
        self._paths.pop(container_id, None)

    def _is_served(self, group: str) -> bool:
        """Whether the group's logger has, or had, any container: its journal is there."""
        return (self._directory(group) / "journal").exists()

    def _directory(self, group: str) -> Path:
        return self._run / "loggers" / group

    def _make_fifos(self, container_id: str, names: Sequence[str]) -> None:
        directory = self._run / "containers" / container_id
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            with contextlib.suppress(FileExistsError):
                os.mkfifo(directory / name, 0o600)

    async def _ask(
        self,
        group: str,
        kind: int,
        container_id: str,
        fields: Sequence[wire.Field],
        fds: Sequence[int],
        verb: str,
        timeout: float | None = None,
    ) -> None:
        timeout = self._timeout if timeout is None else timeout
        path = self._paths.get(container_id)
        doing = f"{verb} the log of container {container_id}" + (f" at {path}" if path else "")
        stage = f"logger of group {group}"
        trouble = "it does not answer"
        try:
            async with asyncio.timeout(timeout):
                attempt = 0
                while True:
                    try:
                        failure = await exchange(self._directory(group) / "sock", kind, fields, fds)
                        break
                    except (OSError, packets.Closed, wire.WireError) as error:
                        trouble = describe(error) if isinstance(error, OSError) else "it has ended"
                    trouble = await self._start_again(group) or trouble
                    await asyncio.sleep(PAUSES[min(attempt, len(PAUSES) - 1)])
                    attempt += 1
        except TimeoutError as error:
            raise DeadlineExceeded(doing, step=stage, cause=f"{trouble} (waited {timeout:g} s)") from error
        if failure is not None:
            step, errno, words = failure
            raise LogFailed(doing, f"{stage}, {step}", errno, words)

    async def _start_again(self, group: str) -> str | None:
        """Have a logger; what stands in the way, if the launcher is away itself."""
        try:
            await self._start_logger(group)
        except (Unavailable, DeadlineExceeded) as error:
            return describe(error)
        return None


async def exchange(
    path: Path, kind: int, fields: Sequence[wire.Field], fds: Sequence[int]
) -> tuple[str, int, str] | None:
    """One request over a connection of its own: None for OK, (step, errno, words) for FAILED.

    Raises OSError or Closed where nobody listens or the answer does not come.
    """
    flags = socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_UNIX, flags) as connection:
        await connect(connection, str(path))
        packets.send(connection, kind, 1, fields, fds)
        await readable(connection)
        answer, _, reply, received = packets.receive(connection)
        packets.close_all(received)
    if answer == wire.OK:
        return None
    step, errno, words = reply
    return text(step), int(errno), text(words)


async def connect(connection: socket.socket, path: str) -> None:
    """A unix socket says EAGAIN while the listener's queue is full (a stopped logger's may be), and must be asked again."""
    while True:
        try:
            connection.connect(path)
            return
        except BlockingIOError:
            await asyncio.sleep(0.01)


async def readable(connection: socket.socket) -> None:
    """Until there is something to receive."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)
