"""The built-in handler: Tare's own launcher, asked over its socket. What a container is to become is compiled to a plan here."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import secrets
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tare.cgroups.manager import Cgroup
from tare.config import RuntimeConfig
from tare.errors import DeadlineExceeded, InternalError, InvalidArgument, TareError, Unavailable
from tare.handlers import compile as compiler
from tare.handlers.channel import Channel, Refused, text
from tare.handlers.interpreter import start_keeper
from tare.handlers.pins import PIN_FLAGS, find_first, unpin
from tare.handlers.processes import ExitRecord, Process, Processes
from tare.launch import linux, packets, plan, wire
from tare.storage.overlay import Overlay

log = logging.getLogger(__name__)

SETUP_TIMEOUT = 60.0  # a child that is kept waiting by a mount source longer than this is given up
CHECK_TIMEOUT = 20.0
KEEPER_START = 10.0
KEEPER_RETRY = 1.0
END_TIMEOUT = 5.0
ENTER_ALL = (
    linux.CLONE_NEWNS
    | linux.CLONE_NEWPID
    | linux.CLONE_NEWNET
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUTS
    | linux.CLONE_NEWCGROUP
)

__all__ = ["BuiltinHandler", "ExitRecord", "PodNamespaces", "Process", "SourceInfo", "StartFailed"]


class StartFailed(TareError):
    """A container's process could not be started: at which step, with which errno (0: none), in the kernel's words."""

    def __init__(self, doing: str, *, step: str, cause: str, errno: int) -> None:
        super().__init__(doing, step=step, cause=cause, hint=advice(step, errno))
        self.errno = errno


@dataclass(frozen=True, slots=True, kw_only=True)
class PodNamespaces:
    """`pins` are files that hold the namespaces, by kind; `netlink` lives in a new network namespace; `pause` is a shared PID namespace's PID 1."""

    pins: dict[str, Path]
    netlink: socket.socket | None
    pause: Process | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """What is at a path of the node: a directory, something else, or (`errno` not 0) nothing that can be used."""

    path: str
    directory: bool
    errno: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchies:
    """cgroup v1 hierarchies to mount in a container: (folder, mount options) each, and the folder of v2 beside them ("" for none)."""

    v1: tuple[tuple[str, tuple[str, ...]], ...] = ()
    unified: str = ""

    def groups(self, cgroup: Cgroup) -> dict[str, str]:
        """A container's own directory in each hierarchy, by folder; one that is not at its usual path is left out."""
        if not self.v1:
            return {}
        tail = f"{cgroup.path}/cgroup.procs"
        folders = (join.removesuffix(tail) for join in cgroup.join if join.endswith(tail))
        return {os.path.basename(folder): folder + cgroup.path for folder in folders}


SeccompCompiler = Callable[[Mapping[str, Any]], Awaitable[compiler.Filter]]


class BuiltinHandler:
    """Speaks to keeper and launcher of one run directory. `seccomp` turns an OCI seccomp object into a filter."""

    def __init__(self, run: Path, config: RuntimeConfig, seccomp: SeccompCompiler, hierarchies: Hierarchies) -> None:
        self._run = run
        self._config = config
        self._seccomp = seccomp
        self._hierarchies = hierarchies
        self._processes = Processes(run)
        self._keeper = Channel(run / "keeper.sock", "the keeper", self._event, self._keeper_lost)
        self._launcher = Channel(run / "launcher.sock", "the launcher", self._event)
        self._names = (f"{secrets.token_hex(4)}-{number}".encode() for number in itertools.count())
        self._connecting = asyncio.Lock()
        self._errands: set[asyncio.Task[None]] = set()
        self._leaving = False

    async def connect(self) -> None:
        """Reach the keeper, started if there is none; from then on one that is lost is replaced. Raises Unavailable, InternalError."""
        async with self._connecting:
            self._leaving = False
            for name in ("tasks", "exits", "pods", "containers", "loggers", "rootfs"):
                (self._run / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            clock = asyncio.get_running_loop().time
            again, deadline = 0.0, clock() + KEEPER_START
            while not await self._greet():
                if clock() > again:  # one that died as it began is not heard of; where one lives, a second ends at once
                    await asyncio.to_thread(start_keeper, self._run)
                    again = clock() + KEEPER_RETRY
                if clock() > deadline:
                    cause = f"it does not listen after {KEEPER_START:g} s"
                    raise Unavailable("start the keeper", cause=cause, hint=f"see {self._run}/launch.log")
                await asyncio.sleep(0.005)

    async def _greet(self) -> bool:
        """Whether there is a keeper that answers, and a launcher's socket."""
        try:
            await self._keeper.request(wire.HELLO, (wire.VERSION,), doing="greet the keeper", timeout=10)
            self._launcher.connect()
        except (Unavailable, OSError):
            return False
        return True

    def _keeper_lost(self) -> None:
        if not self._leaving:
            self._run_errand(self._replace_keeper())

    async def _replace_keeper(self) -> None:
        """Have a keeper again, however long it takes: without one, a launcher's death would cost exits."""
        while not self._leaving:
            try:
                await self.connect()
            except TareError as error:
                log.warning("the keeper is gone, and no other could be started: %s", error)
                await asyncio.sleep(KEEPER_RETRY)
            else:
                log.warning("the keeper was gone: there is another one")
                return

    def _run_errand(self, errand: Coroutine[Any, Any, None]) -> None:
        """Do something that nobody waits for."""
        task = asyncio.get_running_loop().create_task(errand)
        self._errands.add(task)
        task.add_done_callback(self._errands.discard)

    async def quit(self) -> bool:
        """End keeper, launcher and loggers if no container and no pod's PID 1 lives; whether they end."""
        self._leaving = True
        try:
            await self._keeper.request(wire.QUIT, doing="end the keeper", timeout=10)
        except (Refused, Unavailable):
            self._leaving = False
            return False
        with contextlib.suppress(Unavailable, Refused, DeadlineExceeded):
            await self._keeper.request(wire.HELLO, doing="see the keeper end", timeout=10)
        self.close()
        return True

    def close(self) -> None:
        """Hang up."""
        self._leaving = True
        for errand in self._errands:
            errand.cancel()
        self._keeper.close()
        self._launcher.close()

    def launcher_pid(self) -> int:
        """The launcher's PID as it has written it down (for tests and for `doctor`); 0 where there is none."""
        return self._launcher_process()[0]

    def launcher_start_time(self) -> int:
        """When the launcher of now started, in clock ticks since boot; 0 where there is none."""
        return self._launcher_process()[1]

    def _launcher_process(self) -> tuple[int, int]:
        """Its PID and start time; zeros where there is none."""
        try:
            pid, start_time = (int(word) for word in (self._run / "launcher.pid").read_text().split())
        except (OSError, ValueError):
            return 0, 0
        return pid, start_time

    def _event(self, kind: int, fields: list[wire.Field]) -> None:
        if kind == wire.EXITED:
            pid, start = fields
            self._processes.tell(Process(int(pid), int(start)))

    async def _ask(
        self, kind: int, fields: Sequence[wire.Field], fds: Sequence[int], *, doing: str, timeout: float = 0.0
    ) -> tuple[list[wire.Field], list[int]]:
        """A request to the launcher; one that it dies over, or that comes too late, leaves nothing waiting there."""
        try:
            return await self._launcher.request(kind, fields, fds, doing=doing, timeout=timeout or SETUP_TIMEOUT)
        except (DeadlineExceeded, asyncio.CancelledError):
            if fields and isinstance(fields[0], bytes):
                await self._abandon(fields[0])
            raise

    async def _abandon(self, name: bytes) -> None:
        with contextlib.suppress(Unavailable, DeadlineExceeded):
            await self._launcher.request(wire.ABANDON, (name,), doing="give up a process", timeout=5)

    # Pods

    async def pod_namespaces(
        self, pod_id: str, *, kinds: frozenset[str], hostname: str, sysctls: dict[str, str]
    ) -> PodNamespaces:
        """Make a pod's namespaces, pinned under pods/<id>/. With "pid" their PID 1 stays, to reap."""
        directory = self._run / "pods" / pod_id
        pins = {kind: directory / kind for kind in sorted(kinds)}
        steps: list[plan.Step] = []
        if "uts" in kinds and hostname:
            steps.append(("hostname", "set the host name", hostname.encode()))
        for name, value in sysctls.items():
            file = "/proc/sys/" + name.replace(".", "/")
            steps.append(("write_file", f"set sysctl {name}", file.encode(), value.encode()))
        work: plan.Plan = {
            "steps": steps,
            "pins": [(kind.encode(), bytes(path)) for kind, path in pins.items()],
            "network": "net" in kinds,
            "stay": "pid" in kinds,
        }
        flags = sum(PIN_FLAGS[kind] for kind in kinds)
        doing = f"make the namespaces of pod {pod_id}"
        fields, fds = await self._send_plan(wire.NAMESPACES, (pod_id.encode(), flags), work, (), doing)
        netlink = socket.socket(fileno=fds.pop(0)) if fds else None
        packets.close_all(fds)
        pid, start = (int(field) for field in fields)
        return PodNamespaces(pins=pins, netlink=netlink, pause=Process(pid, start) if pid else None)

    async def remove_pod_namespaces(self, pod_id: str, pause: Process | None) -> None:
        """Let the namespaces go: PID 1 is ended, the pins are unmounted and removed. Idempotent."""
        await self._abandon(pod_id.encode())
        directory = self._run / "pods" / pod_id
        pin = directory / "pid"
        first = pause or (await asyncio.to_thread(find_first, pin) if os.path.ismount(pin) else None)
        if first is not None:
            await self._end(first)
        for kind in PIN_FLAGS:
            unpin(directory / kind)

    async def _end(self, process: Process) -> None:
        """Kill a process and drop what is known of it, once it has ended; one that does not is left to die in its own time."""
        self._processes.signal(process, signal.SIGKILL)
        try:
            async with asyncio.timeout(END_TIMEOUT):
                await self._processes.wait(process)
        except TimeoutError:
            log.warning("process %d does not end: what does the kernel wait for?", process.pid)
        self._processes.forget(process)

    async def check_sources(self, paths: Sequence[tuple[str, bool]]) -> list[SourceInfo]:
        """What is at each path of the node, in a process that can be given up; (path, True) makes a directory where nothing is.

        Raises DeadlineExceeded where a file system does not answer.
        """
        if not paths:
            return []
        name = b"check-" + next(self._names)  # never that of an earlier daemon, whose check may hang still
        work: plan.Plan = {"paths": [(os.fsencode(path), make) for path, make in paths]}
        doing = "look at mount sources " + ", ".join(path for path, _ in paths)
        fields, fds = await self._send_plan(wire.CHECK, (name,), work, (), doing, CHECK_TIMEOUT)
        packets.close_all(fds)
        answers = [text(field) for field in fields]
        return [
            SourceInfo(path=path, directory=answer == "d", errno=int(answer) if answer.isdecimal() else 0)
            for (path, _), answer in zip(paths, answers, strict=True)
        ]

    # Containers

    async def start(
        self,
        container_id: str,
        spec: dict[str, Any],
        *,
        overlay: Overlay,
        cgroup: Cgroup,
        tty_sink: Callable[[int], Awaitable[None]] | None = None,
        on_created: Callable[[Process], None] | None = None,
    ) -> Process:
        """Make a container's main process and let it exec. `on_created` is told while it still waits at its gate.

        Raises StartFailed for what the container's settings or files are at fault for.
        """
        process = await self.create(
            container_id, spec, overlay=overlay, cgroup=cgroup, tty_sink=tty_sink, on_created=on_created
        )
        try:
            await self._ask(wire.START, (container_id.encode(),), (), doing=f"start container {container_id}")
        except Refused as error:
            if error.step == "gate":  # its launcher was lost between the two requests, and it ended with that
                self._run_errand(self._end(process))
                raise Unavailable(f"start container {container_id}", cause=error) from error
            self._processes.forget(process)
            raise failed(error, f"start container {container_id}", spec["process"]) from error
        except BaseException:
            self._run_errand(self._end(process))
            raise
        return process

    async def create(
        self,
        container_id: str,
        spec: dict[str, Any],
        *,
        overlay: Overlay,
        cgroup: Cgroup,
        tty_sink: Callable[[int], Awaitable[None]] | None = None,
        on_created: Callable[[Process], None] | None = None,
    ) -> Process:
        """Make the process as far as its gate: all is set up, only credentials, filter and exec are to come."""
        doing = f"start container {container_id}"
        place = compiler.Place(
            streams=self._run / "containers" / container_id,
            base=self._run / "rootfs",
            join=joins(cgroup),
            hierarchies=self._hierarchies.v1,
            unified=self._hierarchies.unified,
            groups=self._hierarchies.groups(cgroup),
        )
        seccomp = spec.get("linux", {}).get("seccomp")
        compiled = compiler.container(spec, overlay, place, await self._seccomp(seccomp) if seccomp else None)
        fields = (container_id.encode(), compiled.clone_flags, os.fsencode(compiled.pid_namespace))
        try:
            with opened(cgroup.directory_v2) as fds:
                answer, received = await self._send_plan(wire.CREATE, fields, compiled.plan, fds, doing)
        except Refused as error:
            raise failed(error, doing, spec["process"]) from error
        process = Process(int(answer[0]), int(answer[1]))
        self._processes.adopt(process, received[0])
        for warning in answer[2:]:
            log.warning("container %s: %s", container_id, text(warning))
        try:
            if on_created is not None:
                on_created(process)
            if tty_sink is not None and len(received) > 1:
                await tty_sink(received[1])
        except BaseException:
            self._run_errand(self._end(process))
            raise
        finally:
            packets.close_all(received[1:])
        return process

    async def exec(
        self,
        exec_id: str,
        target: Process,
        process: dict[str, Any],
        *,
        cgroup: Cgroup,
        stdin: int,
        stdout: int,
        stderr: int,
    ) -> Process:
        """A further process in the container whose main process is `target`, past its exec.

        `process` is an OCI process object, with the container's seccomp object under "seccomp" if it has one.
        """
        command = next(iter(process.get("args") or ()), "nothing")
        doing = f"exec {command!r} in the container of process {target.pid}"
        pidfd = self._processes.open(target)
        if pidfd is None:
            raise StartFailed(doing, step="find the container", cause="its main process is gone", errno=3)
        seccomp = process.get("seccomp")
        work = compiler.execution(process, joins(cgroup), ENTER_ALL, await self._seccomp(seccomp) if seccomp else None)
        try:
            with opened(cgroup.directory_v2) as fds:
                streams = (pidfd, stdin, stdout, stderr, *fds)
                fields, received = await self._send_plan(wire.EXEC, (exec_id.encode(),), work, streams, doing)
        except Refused as error:
            raise failed(error, doing, process) from error
        made = Process(int(fields[0]), int(fields[1]))
        self._processes.adopt(made, received[0])
        packets.close_all(received[1:])
        return made

    async def _send_plan(
        self,
        kind: int,
        fields: Sequence[wire.Field],
        work: plan.Plan,
        fds: Sequence[int],
        doing: str,
        timeout: float = 0.0,
    ) -> tuple[list[wire.Field], list[int]]:
        try:
            sealed = plan.seal(work)
        except OSError as error:
            raise (InvalidArgument if error.errno == errno.E2BIG else InternalError)(doing, cause=error) from error
        try:
            return await self._ask(kind, fields, (sealed, *fds), doing=doing, timeout=timeout)
        finally:
            os.close(sealed)

    async def start_logger(self, group: str) -> None:
        """Have a logger for this group; it listens when this returns."""
        await self._ask(wire.LOGGER, (group.encode(),), (), doing=f"start the logger of group {group}", timeout=10)

    async def wait(self, process: Process) -> ExitRecord:
        """How a process ended, once it has."""
        return await self._processes.wait(process)

    def signal(self, process: Process, number: int) -> bool:
        """Send a signal; False where the process is gone."""
        return self._processes.signal(process, number)

    def alive(self, process: Process) -> bool:
        """Whether a process has not ended."""
        return self._processes.alive(process)

    async def came_to_run(self, process: Process) -> bool:
        """Whether a process that an earlier daemon started came past its exec; waits until it did, or has ended. It may have ended since.

        Until its exec it runs the launcher's image. One that fails before it, or waits at its gate for a daemon that is gone, is
        ended by the launcher with no exit record; so a record says that it ran, if the launcher lived all the while.
        """
        pid, start_time = self._launcher_process()
        image = executable(pid)
        if image is None or start_time > process.start_time:
            return False
        while self.alive(process):
            if executable(process.pid) not in (image, None):
                return True
            await asyncio.sleep(0.002)
        await self.wait(process)
        return self._processes.recorded(process)

    def forget(self, process: Process) -> None:
        """Drop the exit record and the pidfd."""
        self._processes.forget(process)


def executable(pid: int) -> tuple[int, int] | None:
    """Device and inode of what a process executes; None where there is no such process."""
    try:
        status = os.stat(f"/proc/{pid}/exe")
    except OSError:
        return None
    return status.st_dev, status.st_ino


def joins(cgroup: Cgroup) -> tuple[str, ...]:
    """The cgroup.procs files that a child writes into; v2's is not among them where clone3 places it there."""
    if cgroup.directory_v2 is None:
        return cgroup.join
    return tuple(path for path in cgroup.join if not path.startswith(cgroup.directory_v2 + "/"))


@contextlib.contextmanager
def opened(directory: str | None) -> Iterator[tuple[int, ...]]:
    """A directory's descriptor in a tuple, or an empty one."""
    if directory is None:
        yield ()
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield (fd,)
    finally:
        os.close(fd)


def failed(error: Refused, doing: str, process: Mapping[str, Any]) -> StartFailed:
    """What the launcher's child said, as an error of the process's start; where execve failed, with the program's name."""
    cause = error.cause or ""
    if error.step == "exec":
        cause = f"{process['args'][0]}: {cause}"
    return StartFailed(doing, step=error.step or "setup", cause=cause, errno=error.errno)


def advice(step: str, errno: int) -> str | None:
    """What to try, for the failures that users meet most."""
    if step == "exec" and errno == 2:
        return "is the command in the image, and is its interpreter?"
    if step == "exec" and errno == 13:
        return "is the command a file with execute permission?"
    if step == "exec" and errno == 8:
        return "is the command a program for this machine's architecture, or a script with a #! line?"
    return None
