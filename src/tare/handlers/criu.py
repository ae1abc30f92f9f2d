"""CRIU as a command of the node: one `criu swrk` for each call, told by messages what to do (`v1/criu.proto`).

    daemon                              criu (a child of the launcher)
      ├─ Request: DUMP, RESTORE ─────────►│
      │◄──────── Response: NOTIFY "…" ────┤   a restore says how far it is, and waits
      ├─ Request: NOTIFY, success ───────►│
      │◄──────────────────── Response ────┤ ends; what it has restored becomes the keeper's child

What is dumped and how a container is restored is in `criu_dump` and `criu_restore`. A dump is let finish, also where the daemon dies: killed
in the middle it would leave connections of the container held still.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from google.protobuf.message import DecodeError

from tare.errors import FailedPrecondition
from tare.handlers.channel import Refused
from tare.handlers.commands import TAIL, Commands, Said, opened
from tare.handlers.processes import Process
from tare.handlers.v1 import criu_pb2 as pb

if TYPE_CHECKING:
    from tare.launch.plan import Step

VERSION_SECONDS = 20.0
LEAST = 4
HINT = "install CRIU 4 or newer (Debian 13: apt install criu), or name its program in [runtime] criu"
NO_SOCKETS = "Can't get 1:16 opt"
SOCKETS = "sockets of IP take CRIU 4.2 or newer on this kernel"
SAID = re.compile(r"^\([\d.]+\)\s+(?:\d+: )?Error \(([^)]*)\): (.*)$", re.MULTILINE)
HARMLESS = re.compile(r"RLIMIT_NOFILE|exited, status=")  # what it calls errors and gets over
MOST_SAID = 1 << 20
MESSAGE = 1 << 16
LOG_LEVEL = 4
SOCKET = 3
FIRST_MORE = 4
PATIENCE = 10.0  # seconds for a dump that nobody waits for any more to come to an end by itself
END_SECONDS = 10.0
Notify = Callable[[Process, str, int], "Awaitable[None]"]
"""Told of CRIU itself, of how far it is, and of the PID of the first process that it restores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """Where CRIU runs: `more` are the descriptors that it has from FIRST_MORE on, the rest is as for `Commands.spawn`."""

    more: Sequence[int] = ()
    join: Sequence[str] = ()
    steps: Sequence[Step] = ()
    place: Callable[[Process], Awaitable[None]] | None = None
    patient: bool = False


class CriuFailed(FailedPrecondition):
    """CRIU could not do it, in its own words."""


class Identity(NamedTuple):
    """Which program it was that has said its version."""

    path: str
    inode: int
    changed: int


class Criu:
    """CRIU by the name or path in the settings; `commands` has the launcher run it."""

    def __init__(self, program: str, commands: Commands) -> None:
        self._program = program
        self._commands = commands
        self._known: tuple[Identity, str] | None = None

    async def require(self, doing: str) -> tuple[str, str]:
        """The program's path and its version. Raises FailedPrecondition where there is none, or too old a one."""
        path = shutil.which(self._program)
        if path is None:
            raise FailedPrecondition(doing, cause=f"there is no program {self._program}", hint=HINT)
        path = os.path.abspath(path)
        status = os.stat(path)
        identity = Identity(path, status.st_ino, status.st_mtime_ns)
        if self._known is None or self._known[0] != identity:
            self._known = identity, await self._version(path, doing)
        version = self._known[1]
        if int(version.partition(".")[0]) < LEAST:
            raise FailedPrecondition(doing, cause=f"{path} is CRIU {version}, which is too old", hint=HINT)
        return path, version

    async def _version(self, path: str, doing: str) -> str:
        try:
            result, text = await self._commands.capture([path, "--version"], timeout=VERSION_SECONDS)
        except Refused as error:
            raise FailedPrecondition(doing, cause=f"{path}: {error.cause}", hint=HINT) from error
        found = re.search(r"^Version: (\d+(?:\.\d+)*)", text, re.MULTILINE)
        if result.code or found is None:
            raise FailedPrecondition(
                doing, cause=f"{path} does not tell its version: {result.words or text}", hint=HINT
            )
        return found[1]

    async def call(
        self,
        kind: pb.Kind,
        options: pb.Options,
        doing: str,
        *,
        images: Path,
        work: Path,
        log: str,
        where: Surroundings,
        notify: Notify | None = None,
    ) -> pb.Response:
        """One call, until CRIU has ended. `images` are theirs, `work` is where it writes its log, by that name, and statistics.

        Raises CriuFailed, Refused, FailedPrecondition; who is cancelled has it ended.
        """
        path, _ = await self.require(doing)
        with opened_directory(images) as source, opened_directory(work) as directory, Said(TAIL) as said:
            # Numbers in this process: CRIU goes by whose socket it is.
            options.images_dir_fd, options.work_dir_fd = source, directory
            options.log_file, options.log_level = log, LOG_LEVEL
            async with self._running([path, "swrk", str(SOCKET)], said, where) as (process, connection):
                try:
                    response = await converse(connection, pb.Request(type=kind, opts=options), process, notify)
                except (EOFError, OSError, DecodeError) as error:
                    words = errors(work / log) or said.text() or "it ended without an answer"
                    raise CriuFailed(doing, cause=f"CRIU: {words}") from error
            if not response.success:
                words = errors(work / log) or response.cr_errmsg or said.text() or f"error {response.cr_errno}"
                raise CriuFailed(doing, cause=f"CRIU: {words}", hint=SOCKETS if NO_SOCKETS in words else None)
            return response

    @contextlib.asynccontextmanager
    async def _running(
        self, command: Sequence[str], said: Said, where: Surroundings
    ) -> AsyncIterator[tuple[Process, socket.socket]]:
        """CRIU and the socket that it listens on; it has ended when this is left."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        with ours, opened(os.devnull) as null:
            ours.setblocking(False)
            with theirs:
                process = await self._commands.spawn(
                    command,
                    stdin=null,
                    stdout=null,
                    stderr=said.end,
                    more=(theirs.fileno(), *where.more),
                    join=where.join,
                    steps=where.steps,
                    place=where.place,
                    patient=where.patient,
                )
            try:
                yield process, ours
            except BaseException:
                ours.close()
                await asyncio.shield(self._commands.finish(process, PATIENCE if where.patient else 0.0))
                raise
            await self._commands.finish(process, END_SECONDS)


async def converse(
    connection: socket.socket, request: pb.Request, process: Process, notify: Notify | None
) -> pb.Response:
    """Ask, and answer each notification, until the call's own answer. Raises EOFError, OSError, DecodeError."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, request.SerializeToString())
    while True:
        data = await loop.sock_recv(connection, MESSAGE)
        if not data:
            raise EOFError
        response = pb.Response.FromString(data)
        if response.type != pb.NOTIFY or not response.success:
            return response
        if notify is not None:
            await notify(process, response.notify.script, response.notify.pid)
        answer = pb.Request(type=pb.NOTIFY, notify_success=True)
        await loop.sock_sendall(connection, answer.SerializeToString())


@contextlib.contextmanager
def opened_directory(path: Path) -> Iterator[int]:
    """A directory's descriptor."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def errors(log: Path) -> str:
    """The errors in one of CRIU's logs that matter, the first few; "" where there is no log or no error."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - MOST_SAID))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    found = [words for _, words in SAID.findall(text) if not HARMLESS.search(words)]
    return "; ".join(dict.fromkeys(found[:4]))
