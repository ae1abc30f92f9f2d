"""Commands of the node (hooks, other runtimes' command lines), run by the launcher: the daemon itself never forks.

Each is a child of the launcher in a session of its own, and its exit goes on record like a container's. Its time is kept by the
launcher, so that it ends also where the daemon dies; one whose launcher died is ended by the daemon that waits for it, or by the
next one (`end_strays`), before that does anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import signal
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tare.errors import DeadlineExceeded, Unavailable
from tare.handlers.processes import Process, Processes, readable, reaped
from tare.launch import linux, packets, wire
from tare.launch.children import kill_group
from tare.launch.commands import MARK, PATIENT

if TYPE_CHECKING:
    from tare.launch.plan import Step

log = logging.getLogger(__name__)

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ENVIRONMENT = {"PATH": PATH}
TAIL = 4096  # bytes of standard error that are kept
CAPTURE = 1 << 20  # bytes of standard output that are kept
SLACK = 2.0  # seconds that the launcher has to keep a command's time, before the daemon ends it
END_SECONDS = 10.0
LOST_SECONDS = 1.0  # for a launcher whose connection was lost to be gone
SWEEP_PAUSE = 0.005

SendPlan = Callable[
    [int, "Sequence[bytes | int]", "dict[str, Any]", Sequence[int], str, float],
    "Awaitable[tuple[list[bytes | int], list[int]]]",
]
Proceed = Callable[[bytes, str], "Awaitable[tuple[list[bytes | int], list[int]]]"]


class Ended(NamedTuple):
    """How a command ended: its exit code (128 + signal where one ended it), and the end of what it said on standard error."""

    code: int
    words: str


class Commands:
    """Runs commands. `send` puts a plan to the launcher: (kind, fields, plan, descriptors, what is being done, seconds) → (fields, descriptors);
    `proceed` has go on what waits to be placed: (name, what is being done) → the rest of the answer."""

    def __init__(self, send: SendPlan, proceed: Proceed, processes: Processes, run: Path) -> None:
        self._send = send
        self._proceed = proceed
        self._processes = processes
        self._run = run
        self._errands: set[asyncio.Task[None]] = set()
        self.live: set[Process] = set()  # those of this daemon that are waited for
        self.on_lost: Callable[[], None] | None = (
            None  # told where a launcher died over a request: its end may be on record already
        )
        self._names = (f"command-{secrets.token_hex(4)}-{number}".encode() for number in itertools.count())

    async def spawn(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] = ENVIRONMENT,
        cwd: str = "/",
        stdin: int,
        stdout: int,
        stderr: int,
        timeout: float = 0.0,
        join: Sequence[str] = (),
        pid_file: str = "",
        program: str = "",
        more: Sequence[int] = (),
        steps: Sequence[Step] = (),
        place: Callable[[Process], Awaitable[None]] | None = None,
        patient: bool = False,
    ) -> Process:
        """A command past its exec, with these descriptors as its own (copies: they stay the caller's), those of `more` from 3 on. All of its
        process group is killed after `timeout` seconds, if that is not 0.

        argv[0] is an absolute path, unless `program` is; `join` are the cgroup.procs files of groups that it belongs to. With `pid_file` the command
        is one that leaves a process behind, whose PID it writes there: what is returned stands in for that process and ends with
        its code. `steps` are walked before the exec; where the first of them is a barrier, `place` is what it waits for. A `patient` command is
        not ended as a stray (`outlive`). Who calls waits for the end and then calls `forget`. Raises Refused, Unavailable.
        """
        doing = f"run {program or argv[0]}"
        work = {
            "paths": [os.fsencode(program or argv[0])],
            "argv": [os.fsencode(word) for word in argv],
            "env": [os.fsencode(f"{name}={value}") for name, value in env.items()],
            "cwd": os.fsencode(cwd),
            "join": [os.fsencode(path) for path in join],
            "pid_file": os.fsencode(pid_file),
            "steps": list(steps),
        }
        name = PATIENT * patient + next(self._names)
        fields = (name, round(timeout * 1000))
        launcher = linux.recorded(str(self._run / "launcher.pid"))
        try:
            answer, fds = await self._send(wire.COMMAND, fields, work, (stdin, stdout, stderr, *more), doing, 0.0)
            if place is not None:
                packets.close_all(fds)
                await place(Process(int(answer[0]), int(answer[1])))
                answer, fds = await self._proceed(name, doing)
        except Unavailable:
            if launcher is not None:
                await self._end_orphans(launcher[1])
            raise
        finally:
            if launcher is not None:
                os.close(launcher[1])
        process = Process(int(answer[0]), int(answer[1]))
        self._processes.adopt(process, fds[0])
        packets.close_all(fds[1:])
        self.live.add(process)
        return process

    def forget(self, process: Process) -> None:
        """Its end is known."""
        self.live.discard(process)
        self._processes.forget(process)

    async def _end_orphans(self, launcher: int) -> None:
        """A launcher (its pidfd) died over a request, and what it was to run may run: end that, before somebody asks for it again.

        Of commands that nobody waits for, those of a new launcher may be waited for in a moment: they are told by their parent.
        """
        try:
            async with asyncio.timeout(LOST_SECONDS):
                await readable(launcher)
        except TimeoutError:
            return  # it lives: it was the connection that was lost, and it has not heard of the request
        if self.on_lost is not None:
            self.on_lost()
        for process in [process for process in self._marked() if process not in self.live]:
            present = linux.recorded(str(self._run / "launcher.pid"))
            if present is not None:
                os.close(present[1])
            if present is None or parent_of(process.pid) != present[0]:
                await self.end(process)

    async def settle(self) -> None:
        """Until what was given up has ended."""
        if self._errands:
            await asyncio.wait(self._errands)

    async def run(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] = ENVIRONMENT,
        cwd: str = "/",
        stdin: bytes | int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        timeout: float,
        join: Sequence[str] = (),
        program: str = "",
    ) -> Ended:
        """A command to its end, its output going to `stdout` (nowhere, unless told) and to `stderr` (kept, unless told). `stdin` is
        what it reads, or a descriptor; `join` and `program` as for `spawn`.

        Raises Refused where it cannot be started, DeadlineExceeded (all that it started is killed), Unavailable.
        """
        doing = f"run {program or argv[0]}"
        with contextlib.ExitStack() as stack:
            null = stack.enter_context(opened(os.devnull))
            source = stack.enter_context(memory(stdin)) if isinstance(stdin, bytes) else stdin
            said = stack.enter_context(Said(TAIL))
            began = asyncio.get_running_loop().time()
            process = await self.spawn(
                argv,
                env=env,
                cwd=cwd,
                stdin=null if source is None else source,
                stdout=null if stdout is None else stdout,
                stderr=said.end if stderr is None else stderr,
                timeout=timeout,
                join=join,
                program=program,
            )
            code = await self._finish(process, began, timeout, doing, said)
            return Ended(code, said.text())

    async def capture(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] = ENVIRONMENT,
        stdin: bytes | None = None,
        timeout: float,
    ) -> tuple[Ended, str]:
        """As `run`, and what it wrote to standard output (the last CAPTURE bytes of it)."""
        with Said(CAPTURE) as output:
            result = await self.run(argv, env=env, stdin=stdin, stdout=output.end, timeout=timeout)
            return result, output.text()

    async def _finish(self, process: Process, began: float, timeout: float, doing: str, said: Said) -> int:
        """Wait for the end, at most as long as it has; whoever stops waiting ends it."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout + SLACK):
                end = await self._processes.wait(process)
        except BaseException as error:
            errand = self.give_up(process)
            if not isinstance(error, TimeoutError):
                raise
            await asyncio.shield(errand)
        else:
            self.forget(process)
            if loop.time() - began < timeout or end.signal != signal.SIGKILL:
                return end.code
        words = said.text()
        raise DeadlineExceeded(
            doing, cause=f"it did not end within {timeout:g} s" + (f"; it said: {words}" if words else "")
        )

    def give_up(self, process: Process) -> asyncio.Task[None]:
        """Have a command ended that nobody waits for any more."""
        errand = asyncio.get_running_loop().create_task(self.end(process))
        self._errands.add(errand)
        errand.add_done_callback(self._errands.discard)
        return errand

    def kill(self, process: Process) -> None:
        """SIGKILL for a command, its group, and whatever descends from it. Nothing where it is reaped: its PID may be another's by now."""
        pidfd = self._processes.open(process)
        if pidfd is None or reaped(pidfd):
            return
        with contextlib.ExitStack() as stack:
            below = descendants(process.pid, pidfd, stack)
            kill_group(process.pid, pidfd)  # first of all: one that waits for what descends from it would end by itself
            self._processes.signal(process, signal.SIGKILL)
            for other in below:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(other, signal.SIGKILL)

    async def finish(self, process: Process, seconds: float) -> None:
        """Until a command has ended by itself; one that has not after that time is ended."""
        try:
            async with asyncio.timeout(seconds):
                await self._processes.wait(process)
        except TimeoutError:
            await self.end(process)
        else:
            self.forget(process)

    async def end(self, process: Process) -> None:
        """Kill a command with all that descends from it, and see it end and forget it; one that the kernel holds on to is left."""
        self.kill(process)
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._processes.wait(process)
        except TimeoutError:
            log.warning("process %d, a command, does not end: what does the kernel wait for?", process.pid)
        self.forget(process)

    async def end_strays(self, made_before: int | None = None) -> None:
        """End the commands that nobody waits for, an earlier daemon's or a lost launcher's: what they were to do is undone or done anew.

        With `made_before` only those that started before that (clock ticks since boot): of others the answer may be on its way.
        """
        strays = [process for process in self._marked() if process not in self.live]
        for process in strays:
            if made_before is not None and process.start_time >= made_before:
                continue
            if self._processes.alive(process):
                log.info("process %d was a command of an earlier daemon: killed", process.pid)
            await self.end(process)

    async def outlive(self, seconds: float) -> None:
        """Until the patient commands that nobody waits for have ended; those that have not after that time are ended."""
        left = [process for process in self._marked(PATIENT) if process not in self.live]
        try:
            async with asyncio.timeout(seconds):
                for process in left:
                    log.info("process %d is let finish what an earlier daemon asked of it", process.pid)
                    await self._processes.wait(process)
                    self.forget(process)
        except TimeoutError:
            for process in left:
                await self.end(process)

    def _marked(self, mark: bytes = MARK) -> Iterator[Process]:
        """The commands that have such a marker."""
        for path in sorted((self._run / "tasks").iterdir()):
            pid, _, start = path.name.partition(".")
            with contextlib.suppress(FileNotFoundError):
                if pid.isdecimal() and start.isdecimal() and path.read_bytes() == mark:
                    yield Process(int(pid), int(start))


class Said:
    """A pipe that is read here as data comes; the last `limit` bytes are kept.

    `end` is for the command. It can be read from as well, so that a command does not die of SIGPIPE where this daemon does, and
    so its end of file means nothing: what is in the pipe when the command has ended is all.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept = b""
        self._ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.end = os.open(f"/proc/self/fd/{theirs}", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            os.close(self._ours)
            raise
        finally:
            os.close(theirs)

    def __enter__(self) -> Said:
        asyncio.get_running_loop().add_reader(self._ours, self._read)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.get_running_loop().remove_reader(self._ours)
        os.close(self._ours)
        os.close(self.end)

    def _read(self) -> bool:
        """Take a chunk; False where there is none."""
        try:
            data = os.read(self._ours, 1 << 16)
        except BlockingIOError:
            return False
        self._kept = (self._kept + data)[-self._limit :]
        return True

    def text(self) -> str:
        """What was said so far."""
        for _ in range(64):
            if not self._read():
                break
        return self._kept.decode(errors="replace").strip()


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """A file's descriptor, for reading and writing."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def memory(data: bytes) -> Iterator[int]:
    """A file of nowhere with these bytes, to be read from its beginning: nobody has to feed a pipe."""
    fd = os.memfd_create("tare-stdin", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
        yield fd
    finally:
        os.close(fd)


def parent_of(pid: int) -> int:
    """A process's parent; 0 where it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except OSError:
        return 0


def descendants(pid: int, pidfd: int, stack: contextlib.ExitStack) -> list[int]:
    """The processes below one, parents before their children, as far as they can be seen now: pidfds, which `stack` closes.

    A PID may change hands at any time. It is a child's if that is so once its pidfd is open, and if its parent is not reaped then.
    """
    found: list[int] = []
    pending = [(pid, pidfd)]
    while pending:
        parent, held = pending.pop()
        for child in children(parent):
            try:
                below = os.pidfd_open(child)
            except ProcessLookupError:
                continue
            except OSError as error:
                log.warning("not all that descends from process %d can be killed: %s", pid, error)
                return found
            stack.callback(os.close, below)
            if parent_of(child) == parent and not reaped(held):
                found.append(below)
                pending.append((child, below))
    return found


def children(pid: int) -> list[int]:
    """A process's children, of all its threads; none where it is gone."""
    found: list[int] = []
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return found
    for thread in threads:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
            found += map(int, file.read().split())
    return found
