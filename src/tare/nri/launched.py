"""Plugins that the daemon starts: the programs NN-NAME in a directory, each with its settings, on a connection that it finds open.

    NRI_PLUGIN_NAME, NRI_PLUGIN_IDX    who it is, whatever it says itself
    NRI_PLUGIN_SOCKET=0                the connection is its standard input: the launcher hands over three descriptors, and starts it
    stdout, stderr                     lines of the daemon's log

They end with the daemon: one that is killed leaves that to the next. A plugin that has ended is not started again before then.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tare.errors import FailedPrecondition, InvalidArgument, TareError, describe
from tare.handlers.commands import PATH
from tare.handlers.processes import Process
from tare.nri.front import Front
from tare.nri.names import INDEX_VARIABLE, NAME_VARIABLE, SOCKET_VARIABLE, parted

if TYPE_CHECKING:
    from tare.nri.peer import Peer

log = logging.getLogger(__name__)

WASM = b"\0asm"
CONFIG_LIMIT = 1 << 20
LINE_LIMIT = 4096
END_SECONDS = 1.0


class Commands(Protocol):
    """Runs programs (`handlers.commands`)."""

    async def spawn(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdin: int, stdout: int, stderr: int
    ) -> Process:
        """One past its exec. Raises TareError."""

    async def end(self, process: Process) -> None:
        """Kill it with all that descends from it, see it end, and forget it."""

    def forget(self, process: Process) -> None:
        """Its end is known."""


class Processes(Protocol):
    """Waits for programs (`handlers.builtin`)."""

    def wait(self, process: Process) -> Awaitable[object]:
        """How it ended, once it has."""


@dataclass(frozen=True, slots=True)
class Program:
    """A plugin that is to be started, with its settings."""

    index: str
    name: str
    path: str
    settings: str


class Launched:
    """Those that were started."""

    def __init__(self, commands: Commands, processes: Processes, front: Front) -> None:
        self._commands = commands
        self._processes = processes
        self._front = front
        self._watches: dict[Process, asyncio.Task[None]] = {}

    async def start(self, programs: Sequence[Program]) -> None:
        """Start them all, and wait until each takes part or has failed, which is logged."""
        if not programs:
            return
        await self._front.load()
        peers = await asyncio.gather(*(self._start(program) for program in programs))
        for peer, process in sorted(filter(None, peers), key=lambda item: item[0].title):
            try:
                await self._front.hub.join(peer)
            except TareError as error:
                log.warning("NRI plugin %s does not take part: %s", peer.title, describe(error))
                await self._end(process)

    async def _start(self, program: Program) -> tuple[Peer, Process] | None:
        title = f"{program.index}-{program.name}"
        peer = self._front.hub.peer()
        peer.known_as(program.index, program.name, program.settings)
        process: Process | None = None
        try:
            ours, theirs = socket.socketpair()
            with theirs, Lines(f"NRI plugin {title}") as lines:
                env = {
                    "PATH": PATH,
                    NAME_VARIABLE: program.name,
                    INDEX_VARIABLE: program.index,
                    SOCKET_VARIABLE: "0",
                }
                try:
                    process = await self._commands.spawn(
                        [program.path], env=env, stdin=theirs.fileno(), stdout=lines.end, stderr=lines.end
                    )
                except BaseException:
                    ours.close()
                    raise
            self._watches[process] = asyncio.ensure_future(self._watch(title, process))
            await peer.begin(ours)
        except (TareError, OSError) as error:
            log.warning("NRI plugin %s could not be started: %s", title, describe(error))
            if process is not None:
                await self._end(process)
            return None
        return peer, process

    async def _watch(self, title: str, process: Process) -> None:
        await self._processes.wait(process)
        log.warning("NRI plugin %s has ended", title)
        self._commands.forget(process)
        del self._watches[process]

    async def _end(self, process: Process) -> None:
        watch = self._watches.pop(process, None)
        if watch is not None:
            watch.cancel()
            await self._commands.end(process)

    async def close(self) -> None:
        """They have a moment to end, now that they are hung up on."""
        if self._watches:
            await asyncio.wait(self._watches.values(), timeout=END_SECONDS)
        for process in list(self._watches):
            await self._end(process)


class Lines:
    """What a program says, line by line, in the log. `end` is for the program; it is closed here when that has it."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._rest = b""
        self._ours, self.end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._ours, False)
        asyncio.get_running_loop().add_reader(self._ours, self._read)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.end)

    def _read(self) -> None:
        try:
            data = os.read(self._ours, 1 << 14)
        except BlockingIOError:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > LINE_LIMIT:
            lines, self._rest = [*lines, self._rest], b""
        for line in filter(None, lines):
            log.info("%s: %s", self._title, line[:LINE_LIMIT].decode(errors="replace"))
        if not data:
            asyncio.get_running_loop().remove_reader(self._ours)
            os.close(self._ours)


def find(directory: str, settings: str) -> list[Program]:
    """The plugins in a directory that may be absent, in their order. What is no plugin is logged and passed over. Touches the file system."""
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("NRI plugins are not started: %s", describe(error))
        return []
    found = []
    for name in names:
        try:
            program = look(directory, name, settings)
        except (TareError, OSError) as error:
            log.warning("%s is not started as an NRI plugin: %s", os.path.join(directory, name), describe(error))
            continue
        if program is not None:
            found.append(program)
    return found


def look(directory: str, name: str, settings: str) -> Program | None:
    """One of the directory; None for what is no program at all. Raises TareError, OSError."""
    path = os.path.join(directory, name)
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or not status.st_mode & 0o111:
        return None
    index, own = parted(name)
    with open(path, "rb") as file:
        if file.read(len(WASM)) == WASM:
            raise FailedPrecondition(
                "start an NRI plugin", cause="it is a WebAssembly module, and there is nothing here to run it"
            )
    return Program(index, own, path, settings_of(settings, name, own))


def settings_of(directory: str, title: str, name: str) -> str:
    """A plugin's own settings: those of NN-NAME.conf, else of NAME.conf, else none."""
    for file in (f"{title}.conf", f"{name}.conf"):
        path = Path(directory, file)
        try:
            if path.stat().st_size > CONFIG_LIMIT:
                raise InvalidArgument(f"read {path}", cause=f"it is larger than {CONFIG_LIMIT} bytes")
            return path.read_text()
        except FileNotFoundError:
            continue
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"read {path}", cause=error) from error
    return ""
