"""Exec and attach with a client at the other end: bytes both ways, window sizes, and what becomes of a command whose client vanishes.

                 stdin ─► pipe ─► command ─► pipes ─► stdout, stderr        without a terminal
    client  ◄─►                terminal's master                            with one
                 stdin ─► FIFO or master ─► container ─► logger ─► copy     attach

A slow client holds its command back, by full pipes; nothing is kept but what is under way. A command that ends leaves its background
children alone: what they still write is read until it is silent for a moment. A client that vanishes leaves a command without a terminal at
its end of input, and what that says is dropped; one with a terminal hangs up, and what has not ended after a grace is killed. A container is
never harmed by who attaches.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from tare.handlers.builtin import Process
from tare.runtime.descriptors import Descriptor, pipe

STDOUT, STDERR = "stdout", "stderr"
QUIET_SECONDS = 0.25
SIZE_SECONDS = 0.1
HANGUP_SECONDS = 10.0
UNHEARD_SECONDS = (
    0.01  # between two reads of what nobody hears any more: a command that never stops is not worth a processor
)


class Window(Protocol):
    """A terminal's size, in characters."""

    @property
    def width(self) -> int:
        """Columns."""

    @property
    def height(self) -> int:
        """Rows."""


class Client(Protocol):
    """Who is at the other end. `gone` is set when it is not there any more; what is written after that goes nowhere."""

    gone: asyncio.Event

    async def stdin(self) -> bytes:
        """What it says next; b"" at the end."""

    async def write(self, name: str, data: bytes) -> None:
        """Output of STDOUT or STDERR; waits while the client is slow."""

    async def next_size(self) -> Window | None:
        """Its window's next size; None when there will be none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """Which of them the client has."""

    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A command's process, and the master of its terminal (-1 without one)."""

    process: Process
    terminal: int = -1


Begin = Callable[[int, int, int, Window | None], Awaitable[Started]]
"""Makes the process from (stdin, stdout, stderr); with a terminal they are of no use to it, and that has this size from the start."""


class Command:
    """A command in a container for a client. `end` ends its whole tree; `wait` returns its exit code once it has ended.

    Once the client has vanished, it is ended after `hangup_seconds` if it has a terminal, else after `orphan_seconds` (0: never).
    """

    def __init__(
        self,
        client: Client,
        streams: Streams,
        begin: Begin,
        wait: Callable[[Process], Awaitable[int]],
        end: Callable[[Process], Awaitable[None]],
        *,
        hangup_seconds: float = HANGUP_SECONDS,
        orphan_seconds: float = 0.0,
    ) -> None:
        self._client, self._streams = client, streams
        self._begin, self._wait, self._end = begin, wait, end
        self._hangup_seconds, self._orphan_seconds = hangup_seconds, orphan_seconds
        self._ours: list[Descriptor] = []
        self._heard = asyncio.Event()
        self._held: set[str] = set()  # streams whose client is being waited for
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> int:
        """From start to end: the exit code. Raises what `begin` raises."""
        try:
            if self._streams.tty:
                return await self._run_with_terminal()
            return await self._run_with_pipes()
        finally:
            for task in self._tasks:
                task.cancel()
            if self._tasks:
                await asyncio.wait(self._tasks)
            for descriptor in self._ours:
                descriptor.close()

    def _own(self, fd: int) -> Descriptor:
        descriptor = Descriptor(fd)
        self._ours.append(descriptor)
        return descriptor

    def _go(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        return task

    async def _run_with_pipes(self) -> int:
        theirs: list[int] = []
        feeds: list[Descriptor] = []
        outputs: list[tuple[str, Descriptor]] = []
        try:
            if self._streams.stdin:
                theirs_end, ours_end = pipe()
                theirs.append(theirs_end)
                feeds.append(self._own(ours_end))
            else:
                theirs.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            for name, asked in ((STDOUT, self._streams.stdout), (STDERR, self._streams.stderr)):
                if asked:
                    ours_end, theirs_end = pipe()
                    theirs.append(theirs_end)
                    outputs.append((name, self._own(ours_end)))
                else:
                    theirs.append(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC))
            started = await self._begin(theirs[0], theirs[1], theirs[2], None)
        finally:
            for fd in theirs:
                os.close(fd)
        for feed in feeds:
            self._go(self._feed(feed, close=True))
        copies = [self._go(self._copy(name, source)) for name, source in outputs]
        if self._orphan_seconds:
            self._go(self._end_orphan(started.process))
        code = await self._wait(started.process)
        await self._drain(copies)
        return code

    async def _run_with_terminal(self) -> int:
        size = await self._first_size()
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            started = await self._begin(null, null, null, size)
        finally:
            os.close(null)
        master = self._own(started.terminal)
        if self._streams.stdin:
            self._go(self._feed(master, close=False))
        self._go(self._follow_window(master))
        copies = [self._go(self._copy(STDOUT, master))]
        self._go(self._hang_up(master, started.process))
        code = await self._wait(started.process)
        await self._drain(copies)
        return code

    async def _first_size(self) -> Window | None:
        """The client's window, which it tells as it begins, if it does."""
        try:
            async with asyncio.timeout(SIZE_SECONDS):
                return await self._client.next_size()
        except TimeoutError:
            return None

    async def _feed(self, sink: Descriptor, *, close: bool) -> None:
        """From the client to the command. A pipe is closed at the end; a terminal has no end but its hangup."""
        await pass_on(self._client, sink)
        if close:
            sink.close()

    async def _copy(self, name: str, source: Descriptor) -> None:
        """From the command to the client."""
        while data := await source.read():
            self._heard.set()
            self._held.add(name)
            await self._client.write(name, data)
            self._held.discard(name)
            if self._client.gone.is_set():
                await asyncio.sleep(UNHEARD_SECONDS)

    async def _follow_window(self, master: Descriptor) -> None:
        while (size := await self._client.next_size()) is not None:
            master.resize(size.width, size.height)

    async def _hang_up(self, master: Descriptor, process: Process) -> None:
        """A client that vanishes from a terminal: its session is told, and ended if it does not end."""
        await self._client.gone.wait()
        master.close()
        await asyncio.sleep(self._hangup_seconds)
        await self._end(process)

    async def _end_orphan(self, process: Process) -> None:
        """One without a terminal, whose input has ended with its client, where it is to end too."""
        await self._client.gone.wait()
        await asyncio.sleep(self._orphan_seconds)
        await self._end(process)

    async def _drain(self, copies: list[asyncio.Task[None]]) -> None:
        """Deliver what the command has written, however slow the client is, but do not wait for children that it has left running."""
        while copies:
            self._heard.clear()
            done, _ = await asyncio.wait(copies, timeout=QUIET_SECONDS)
            copies = [task for task in copies if task not in done]
            for task in done:
                task.result()
            if self._client.gone.is_set() or (not done and not self._heard.is_set() and not self._held):
                return


class Attachment:
    """A client of a container's main process.

    `source` gets packets of its output (`launch.taps`); `sink` is its stdin or terminal, None where the client has none. `ended` is told that the
    client says no more, or has left.
    """

    def __init__(
        self,
        client: Client,
        source: Descriptor,
        sink: Descriptor | None,
        ended: Callable[[], Awaitable[None]],
        *,
        tty: bool,
    ) -> None:
        self._client, self._source, self._sink, self._ended, self._tty = client, source, sink, ended, tty

    async def run(self) -> bool:
        """Until the container or the client ends; whether the container's output came to its end."""
        copy = asyncio.create_task(self._copy())
        gone = asyncio.create_task(self._client.gone.wait())
        tasks = (copy, gone, asyncio.create_task(self._feed()), asyncio.create_task(self._follow_window()))
        try:
            await asyncio.wait((copy, gone), return_when=asyncio.FIRST_COMPLETED)
            return copy.done() and copy.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self._source.close()
            if self._sink is not None:
                self._sink.close()
                await self._ended()

    async def _copy(self) -> bool:
        while packet := await self._source.read():
            if packet[0] == 0:
                return True
            await self._client.write(STDERR if packet[0] == 2 else STDOUT, packet[1:])
        return False

    async def _feed(self) -> None:
        if self._sink is None:
            return
        await pass_on(self._client, self._sink)
        if not self._tty:
            self._sink.close()
            await self._ended()

    async def _follow_window(self) -> None:
        while (size := await self._client.next_size()) is not None:
            if self._tty and self._sink is not None:
                self._sink.resize(size.width, size.height)


async def pass_on(client: Client, sink: Descriptor) -> None:
    """What a client says, to its end. Where nobody reads any more it is dropped: a connection that is not read hides its own end."""
    heard = True
    while data := await client.stdin():
        heard = heard and await sink.write(data)
