"""The built-in handler: Tare's own launcher, asked over its socket. What a container is to become is compiled to a plan here."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tare.cgroups.manager import Cgroup
from tare.config import RuntimeConfig
from tare.errors import DeadlineExceeded, FailedPrecondition, TareError, Unavailable
from tare.handlers import attributes, health, renewal, starting
from tare.handlers import compile as compiler
from tare.handlers.channel import Channel, Refused, text
from tare.handlers.commands import Commands
from tare.handlers.failures import StartFailed, failed
from tare.handlers.hooked import Hooked
from tare.handlers.manager import Manager
from tare.handlers.pins import entered
from tare.handlers.placing import Hierarchies, joins, opened
from tare.handlers.plans import Directory, Mappings
from tare.handlers.pods import PodNamespaces, Pods
from tare.handlers.processes import ExitRecord, Process, Processes
from tare.launch import packets, plan, wire
from tare.storage.overlay import Overlay

log = logging.getLogger(__name__)

CHECK_TIMEOUT = 20.0
LABEL_TIMEOUT = 120.0  # for a tree of many files
KEEPER_RETRY = 1.0
END_TIMEOUT = 5.0

__all__ = ["BuiltinHandler", "ExitRecord", "Hierarchies", "PodNamespaces", "Process", "SourceInfo", "StartFailed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """What is at a path of the node: a directory, something else, or (`errno` not 0) nothing that can be used.

    `propagation` is told where it was asked for: "shared", "slave" or "private".
    """

    path: str
    directory: bool
    errno: int = 0
    propagation: str = "private"


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
        self.commands = Commands(self._send_plan, self._proceed, self._processes, run)
        self.hooked = Hooked(run, self.commands)
        self._pods = Pods(run, self._send_plan, self._abandon, self._end)
        ways = starting.Ways(
            ask=self._ask,
            send_plan=self._send_plan,
            abandon=self._abandon,
            end=self._end,
            run_errand=self._run_errand,
        )
        self._starts = starting.Starts(run, ways, self._processes, self.hooked, seccomp, hierarchies)
        self._names = (f"{secrets.token_hex(4)}-{number}".encode() for number in itertools.count())
        self._connecting = asyncio.Lock()
        self._errands: set[asyncio.Task[None]] = set()
        self._leaving = False
        self.manager = Manager()
        self.outdated = ""  # why keeper or launcher are of another version than this

    async def connect(self) -> None:
        """Reach the keeper, started if there is none; from then on one that is lost is replaced. Raises as `renewal.reach`."""
        async with self._connecting:
            self._leaving = False
            for name in ("tasks", "exits", "pods", "containers", "loggers", "rootfs"):
                (self._run / name).mkdir(mode=0o700, parents=True, exist_ok=True)
            self.outdated = await renewal.reach(self._run, self._keeper, self._launcher, self.manager)

    async def trouble(self) -> str | None:
        """Why no process can be made now; None where keeper and launcher both answer."""
        return next(iter((await self.troubles()).values()), None)

    async def troubles(self) -> dict[str, str]:
        """What is wrong with "keeper" and "launcher", of each that does not answer."""
        return await health.troubles(self._keeper, self._launcher)

    def _keeper_lost(self) -> None:
        if not self._leaving:
            self.manager.begin_again()
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

    def waiting(self) -> dict[str, int]:
        """How many requests to keeper and launcher have no answer yet."""
        return {"keeper": self._keeper.waiting, "launcher": self._launcher.waiting}

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
            return await self._launcher.request(
                kind, fields, fds, doing=doing, timeout=timeout or starting.SETUP_TIMEOUT
            )
        except (DeadlineExceeded, asyncio.CancelledError):
            if fields and isinstance(fields[0], bytes):
                await self._abandon(fields[0])
            raise

    async def _abandon(self, name: bytes) -> None:
        with contextlib.suppress(Unavailable, DeadlineExceeded):
            await self._launcher.request(wire.ABANDON, (name,), doing="give up a process", timeout=5)

    async def _proceed(self, name: bytes, doing: str) -> tuple[list[wire.Field], list[int]]:
        """What waits to be placed goes on: the rest of the answer to the request that made it."""
        return await self._ask(wire.PROCEED, (name,), (), doing=doing)

    # Pods

    async def pod_namespaces(
        self,
        pod_id: str,
        *,
        kinds: frozenset[str],
        hostname: str,
        sysctls: dict[str, str],
        mappings: Mappings | None = None,
    ) -> PodNamespaces:
        """As `pods.Pods.make`."""
        return await self._pods.make(pod_id, kinds=kinds, hostname=hostname, sysctls=sysctls, mappings=mappings)

    async def run_steps(self, name: str, steps: Sequence[plan.Step], doing: str) -> None:
        """Have a child of the launcher walk these steps in the node's namespaces, and end. Raises Refused with the step that failed."""
        work: plan.Plan = {"steps": list(steps), "pins": [], "network": False, "stay": False}
        _, fds = await self._send_plan(wire.NAMESPACES, (name.encode(), 0), work, (), doing)
        packets.close_all(fds)

    async def remove_pod_namespaces(self, pod_id: str, pause: Process | None) -> None:
        """As `pods.Pods.remove`."""
        await self._pods.remove(pod_id, pause)

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
        work: plan.Plan = {"paths": [(os.fsencode(path), make) for path, make in paths]}
        return await self._check([path for path, _ in paths], work, "look at mount sources", CHECK_TIMEOUT)

    async def propagation(self, paths: Sequence[str]) -> list[SourceInfo]:
        """How the mounts spread that paths of the node are on, found out in such a process too. Raises DeadlineExceeded."""
        work: plan.Plan = {"mounts": [os.fsencode(path) for path in paths]}
        return await self._check(paths, work, "look at the mounts of", CHECK_TIMEOUT)

    async def relabel(self, paths: Sequence[tuple[str, str]]) -> list[SourceInfo]:
        """Give each path of the node, with all below it, an SELinux label, in such a process too. Raises DeadlineExceeded."""
        work: plan.Plan = {"labels": [(os.fsencode(path), label.encode()) for path, label in paths]}
        return await self._check([path for path, _ in paths], work, "label mount sources", LABEL_TIMEOUT)

    async def _check(self, paths: Sequence[str], work: plan.Plan, doing: str, timeout: float) -> list[SourceInfo]:
        if not paths:
            return []
        name = b"check-" + next(self._names)  # never that of an earlier daemon, whose check may hang still
        doing = f"{doing} {', '.join(paths)}"
        fields, fds = await self._send_plan(wire.CHECK, (name,), work, (), doing, timeout)
        packets.close_all(fds)
        answers = [text(field) for field in fields]
        return [
            SourceInfo(
                path=path,
                directory=answer == "d",
                errno=int(answer) if answer.isdecimal() else 0,
                propagation=answer if answer in ("shared", "slave") else "private",
            )
            for path, answer in zip(paths, answers, strict=True)
        ]

    # Containers

    async def start(
        self,
        container_id: str,
        spec: dict[str, Any],
        *,
        overlay: Overlay | Directory,
        cgroup: Cgroup,
        tty_sink: starting.TerminalSink | None = None,
        on_created: starting.OnCreated | None = None,
        place: starting.Placing | None = None,
    ) -> Process:
        """Make a container's main process and let it exec. `on_created` is told, and what that returns is awaited, while it still waits.

        Raises StartFailed for what the container's settings or files are at fault for.
        """
        return await self._starts.start(
            container_id, spec, overlay=overlay, cgroup=cgroup, tty_sink=tty_sink, on_created=on_created, place=place
        )

    async def create(
        self,
        container_id: str,
        spec: dict[str, Any],
        *,
        overlay: Overlay | Directory,
        cgroup: Cgroup,
        on_created: starting.OnCreated | None = None,
    ) -> Process:
        """As `starting.Starts.create`."""
        return await self._starts.create(container_id, spec, overlay=overlay, cgroup=cgroup, on_created=on_created)

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
        tty_sink: Callable[[int], Awaitable[None]] | None = None,
    ) -> Process:
        """A further process in the container whose main process is `target`, past its exec.

        One with a terminal has that as its streams, and `tty_sink` gets the master. `process` is an OCI process object. Of the container's
        it may have "seccomp" and "personality", as in its configuration, and "container", its ID, for who is told of the filter's listener.
        """
        doing = f"exec {next(iter(process.get('args') or ()), 'nothing')!r} in the container of process {target.pid}"
        pidfd = self._processes.open(target)
        if pidfd is None:
            raise StartFailed(doing, step="find the container", cause="its main process is gone", errno=3)
        seccomp = process.get("seccomp")
        # On CPUs of its own before it is in the group: then clone3 must not place it there.
        late = attributes.affinity(process)[0] != []
        work = compiler.execution(
            process,
            cgroup.join if late else joins(cgroup),
            entered(target.pid),
            await self._seccomp(seccomp) if seccomp else None,
            personality=process.get("personality"),
            state=self.hooked.state(process.get("container", ""), process, target),
        )
        try:
            with opened("" if late else cgroup.directory_v2 or "") as fds:
                streams = (pidfd, stdin, stdout, stderr, *fds)
                fields, received = await self._send_plan(wire.EXEC, (exec_id.encode(),), work, streams, doing)
        except Refused as error:
            if not self._processes.alive(target):
                raise FailedPrecondition(doing, cause="that has ended") from error
            raise failed(error, doing, process) from error
        made = Process(int(fields[0]), int(fields[1]))
        self._processes.adopt(made, received[0])
        for warning in fields[2:]:
            log.warning("%s: %s", doing, text(warning))
        try:
            if tty_sink is not None and len(received) > 1:
                await tty_sink(received[1])
        except BaseException:
            self._run_errand(self._end(made))
            raise
        finally:
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
        sealed = starting.seal(work, doing)
        try:
            return await self._ask(kind, fields, (sealed, *fds), doing=doing, timeout=timeout)
        finally:
            os.close(sealed)

    async def terminal(self, container_id: str) -> int | None:
        """The master of a container's terminal, which is the caller's; None where nobody has it."""
        key = b"tty/" + container_id.encode()
        _, fds = await self._keeper.request(wire.FETCH, (key,), doing="fetch a terminal", timeout=10)
        packets.close_all(fds[1:])
        return fds[0] if fds else None

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

        One that fails before it, or waits at its gate for a daemon that is gone, is ended by the launcher with no exit record; so a record
        says that it ran, if the launcher lived all the while. Of one that has ended, and whose launcher was lost, nobody knows.
        """
        if await self._processes.came_to_run(process):
            return True
        if self._launcher_process()[1] > process.start_time:
            return False
        await self.wait(process)
        return self._processes.recorded(process)

    def forget(self, process: Process) -> None:
        """Drop the exit record and the pidfd."""
        self._processes.forget(process)
