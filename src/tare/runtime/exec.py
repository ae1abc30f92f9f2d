"""ExecSync: a command in a running container, its output taken from pipes, its whole tree ended at the timeout.

The call ends with the command's own process: what that wrote is in the pipes by then and is read, but a background child that
keeps them open is not waited for longer than DRAIN_SECONDS. Both streams together are cut at LIMIT; what comes after is read
and dropped, so that the command never blocks on it.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import signal
import struct
import termios
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tare.config import BUILTIN
from tare.errors import DeadlineExceeded, describe
from tare.handlers.builtin import Process
from tare.runtime import trees
from tare.runtime.exits import process_of
from tare.runtime.ports import Cgroups, Handler
from tare.runtime.records import ContainerRecord
from tare.runtime.spec import exec_process
from tare.runtime.store import ContainerFacts, Store
from tare.state.operations import Operation, Operations, Step

if TYPE_CHECKING:
    from tare.cgroups.manager import Cgroup

log = logging.getLogger(__name__)

LIMIT = (16 << 20) - (64 << 10)  # bytes of stdout and stderr together: a kubelet takes no message of more than 16 MiB
DRAIN_SECONDS = 0.1
CHUNK = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """What a command wrote, cut at LIMIT bytes together, and its exit code (128 + signal where one ended it)."""

    stdout: bytes
    stderr: bytes
    exit_code: int


class Capture:
    """Reads pipes to their ends as data comes, and keeps up to `limit` bytes of all of them together."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._left = limit
        self._kept: dict[int, list[bytes]] = {}
        self._open: set[int] = set()
        self.ended = asyncio.Event()

    def pipe(self) -> tuple[int, int]:
        """A new pipe: (the end that is read here, the end to write to, which is the caller's)."""
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(ours, False)
        self._kept[ours] = []
        self._open.add(ours)
        asyncio.get_running_loop().add_reader(ours, self.read, ours)
        return ours, theirs

    def read(self, fd: int) -> None:
        """Take what is there now, at most one chunk."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return
        if not data:
            self.close(fd)
            return
        if self._left:
            self._kept[fd].append(data[: self._left])
            self._left -= min(len(data), self._left)

    def close(self, fd: int) -> None:
        """Read no more from it."""
        if fd in self._open:
            asyncio.get_running_loop().remove_reader(fd)
            os.close(fd)
            self._open.remove(fd)
            if not self._open:
                self.ended.set()

    def close_all(self) -> None:
        """Read no more."""
        for fd in list(self._open):
            self.close(fd)

    async def drain(self, seconds: float) -> None:
        """Until every end is reached, or the time is over."""
        try:
            async with asyncio.timeout(seconds):
                await self.ended.wait()
        except TimeoutError:
            for fd in list(self._open):
                self._take_rest(fd)
            self.close_all()

    def _take_rest(self, fd: int) -> None:
        """Read as much as is in a pipe at this moment."""
        (there,) = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))
        for _ in range(0, there, CHUNK):
            self.read(fd)

    def taken(self, fd: int) -> bytes:
        """What was kept of one pipe."""
        return b"".join(self._kept[fd])


Start = Callable[[int, int, int], Awaitable[Process]]


class Exec:
    """One command on its way: `begin` makes its process from (stdin, stdout, stderr), `end` ends its whole tree.

    The process is in `live` while it is waited for.
    """

    def __init__(
        self,
        handler: Handler,
        live: set[Process],
        doing: str,
        operations: Operations,
        names: Mapping[str, str],
        begin: Start,
        end: Callable[[Process], Awaitable[None]],
    ) -> None:
        self._handler = handler
        self._live = live
        self._doing = doing
        self._operations = operations
        self._names = names
        self._begin = begin
        self._end = end
        self._process: Process | None = None
        self._code = 0
        self._capture = Capture()
        self._theirs: list[int] = []

    async def run(self, timeout: float) -> ExecResult:
        """To its end; `timeout` in seconds, 0 for none. Raises DeadlineExceeded, with everything that it started killed."""
        out, out_end = self._capture.pipe()
        err, err_end = self._capture.pipe()
        self._theirs = [os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), out_end, err_end]
        task = asyncio.ensure_future(self._operations.run(EXEC, self, self._names))
        try:
            async with asyncio.timeout(timeout or None) as bound:
                await asyncio.shield(task)
            return ExecResult(stdout=self._capture.taken(out), stderr=self._capture.taken(err), exit_code=self._code)
        except TimeoutError:
            if not bound.expired():
                raise
            cause = f"the command did not end within {timeout:g} s"
            raise DeadlineExceeded(self._doing, cause=cause) from None
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled() and (error := task.exception()) is not None:
                    log.warning("%s: %s", self._doing, describe(error))
            self._close_theirs()
            self._capture.close_all()

    def _close_theirs(self) -> None:
        """Let go of the command's ends of its streams."""
        while self._theirs:
            os.close(self._theirs.pop())

    async def start(self) -> None:
        """Its process is there."""
        self._process = await self._start()
        self._live.add(self._process)

    async def wait(self) -> None:
        """Its process has ended, and what it wrote is read."""
        assert self._process is not None
        end = await self._handler.wait(self._process)
        await self._capture.drain(DRAIN_SECONDS)
        self._code = end.code
        self._let_go(self._process)

    async def stop(self) -> None:
        """Everything that was started ends."""
        process = self._process
        if process is None:
            return
        try:
            await self._end(process)
            await self._handler.wait(process)
        finally:
            self._let_go(process)

    def _let_go(self, process: Process) -> None:
        self._process = None
        self._live.discard(process)
        self._handler.forget(process)

    async def _start(self) -> Process:
        """Its process. Cancelling waits for it to be there, since only then it can be ended."""
        stdin, out, err = self._theirs
        start = asyncio.ensure_future(self._begin(stdin, out, err))
        try:
            return await asyncio.shield(start)
        except asyncio.CancelledError:
            await asyncio.wait([start])
            if not start.cancelled() and start.exception() is None:
                await self._end(start.result())
                self._handler.forget(start.result())
            raise
        finally:
            self._close_theirs()


async def take_back(run: Exec | None) -> None:
    """Everything that was started ends; of an earlier daemon's (None) nobody knows here what that is."""
    if run is not None:
        await run.stop()


EXEC: Operation[Exec] = Operation("Exec", (Step("process", Exec.start, take_back), Step("wait", Exec.wait)))
"""What a killed daemon leaves of one is ended by `Runtime.sweep` and at the next start: nobody waits for its output any more."""


def process_in(store: Store, record: ContainerRecord, command: Sequence[str], *, tty: bool) -> dict[str, Any]:
    """The OCI process of a further process in a container, with what the handler has to know of the container. Raises InvalidArgument."""
    return exec_process(store.plan(record.id).spec, command, tty=tty) | {"container": record.id}


def group_of(cgroups: Cgroups, facts: ContainerFacts, handler: str) -> tuple[Cgroup, str]:
    """The control group that an exec in a container joins, and its path if it is the exec's own ("" where it is the container's).

    Another runtime (`handler`) puts its execs into the container's by itself.
    """
    if handler not in ("", BUILTIN):
        return cgroups.open(facts.cgroup), ""
    group = cgroups.leaf(facts.cgroup, facts.process.pid)
    return group, group.path if group.path != facts.cgroup else ""


async def exec_sync(
    handler: Handler,
    cgroups: Cgroups,
    operations: Operations,
    facts: ContainerFacts,
    live: set[Process],
    exec_id: str,
    process: dict[str, Any],
    timeout: float,
    runtime_handler: str,
) -> ExecResult:
    """Run an OCI process in a container of that runtime handler to its end. Raises DeadlineExceeded, StartFailed, Unavailable."""
    doing = f"exec {process['args'][0]!r}"
    cgroup, leaf = group_of(cgroups, facts, runtime_handler)

    async def begin(stdin: int, stdout: int, stderr: int) -> Process:
        target = process_of(facts.process)
        return await handler.exec(exec_id, target, process, cgroup=cgroup, stdin=stdin, stdout=stdout, stderr=stderr)

    async def end(started: Process) -> None:
        if leaf:
            await cgroups.kill(leaf)
        await trees.kill(handler.root_of(started), lambda: cgroups.processes(facts.cgroup), doing)
        handler.signal(started, signal.SIGKILL)  # what stands in for it, where that does not end with it

    try:
        return await Exec(handler, live, doing, operations, {"exec": exec_id}, begin, end).run(timeout)
    finally:
        if leaf:
            await cgroups.clear_leaf(leaf)
