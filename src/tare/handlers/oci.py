"""Containers made by another runtime's command line (runc, crun, runsc, …), under the same keeper, launcher, loggers and records.

    <run>/bundles/<container ID>/
        handler      the handler's name                    rootfs/       the container's root file system, mounted by a child
        config.json  what the runtime is told              volumes/N     image volumes, likewise
        state/       the runtime's own (--root)            pid           the PID file of `create`
        process      PID START of the main process         started       made before `start` is asked for
        log          what the runtime says of a failure    exec/         configuration, PID file and log of each exec

`create` is a child of the launcher with the container's FIFOs as its streams. What it leaves behind, the container's first process,
comes to the keeper, and has a marker before `start`: so its exit is recorded like any other's. An exec has a child of the launcher
stand in for it. A container whose daemon died is found by its bundle; `release` takes all of it away, in whatever state it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.config import HandlerConfig
from tare.errors import FailedPrecondition, InternalError, TareError, describe
from tare.handlers import labels, oci_bundle, volumes
from tare.handlers.builtin import BuiltinHandler, StartFailed
from tare.handlers.channel import Refused
from tare.handlers.oci_features import Features
from tare.handlers.oci_files import Bundle, encoded, listed, read
from tare.handlers.plans import FIRST_FREE, ROOT
from tare.handlers.processes import Process, readable
from tare.handlers.starting import OnCreated, tell
from tare.launch import linux, tasks

if TYPE_CHECKING:
    from tare.cgroups.manager import Cgroup
    from tare.launch.plan import Step
    from tare.storage.overlay import Overlay

log = logging.getLogger(__name__)

CREATE_SECONDS = 60.0
COMMAND_SECONDS = 30.0
TERMINAL_SECONDS = 5.0
# Options by which a runtime leaves control groups alone: then its commands run in the container's, and what they make is in it.
LEAVES_GROUPS = frozenset({"--cgroup-manager=disabled", "--ignore-cgroups", "--ignore-cgroups=true"})


class OciHandler:
    """The handler `name` of the settings. `engine` has the launcher run its commands; what is not of containers is done there."""

    def __init__(self, name: str, settings: HandlerConfig, engine: BuiltinHandler, run: Path) -> None:
        self.name = name
        self.settings = settings
        self.features = Features(settings)
        self._engine = engine
        self._commands = engine.commands
        self._run = run
        self._containers: dict[Process, str] = {}
        self._execs: dict[Process, Path] = {}
        self._errands: set[asyncio.Task[None]] = set()
        self._leaves_groups = bool(LEAVES_GROUPS.intersection(settings.options))

    def adopt(self, bundle: Bundle) -> None:
        """A container that an earlier daemon made."""
        process = bundle.process()
        if process is not None:
            self._containers[process] = bundle.id

    def owns(self, process: Process) -> bool:
        """Whether a process is a container's or an exec's of this handler."""
        return process in self._containers or process in self._execs

    # A container

    async def start(
        self,
        container_id: str,
        spec: dict[str, Any],
        *,
        overlay: Overlay,
        cgroup: Cgroup,
        tty_sink: Callable[[int], Awaitable[None]] | None = None,
        on_created: OnCreated | None = None,
        place: Callable[[Process], Awaitable[None]] | None = None,
    ) -> Process:
        """As the built-in handler's; what a start that fails leaves behind is taken away by `release`."""
        await self.features.look(self._commands)
        self.features.require(self.name)
        oci_bundle.check(
            spec,
            self.name,
            idmap=self.features.idmap_mounts,
            user_namespaces=self.features.user_namespaces,
            recursive_read_only=self.features.recursive_read_only,
        )
        bundle = Bundle(self._run, container_id)
        await self._prepare(bundle, spec, overlay, cgroup)
        process = await self._create(bundle, spec, cgroup, tty_sink, on_created)
        if place is not None:
            await place(process)
        bundle.started.touch()
        await self._tell(bundle, "start", container_id)
        return process

    async def _prepare(self, bundle: Bundle, spec: dict[str, Any], overlay: Overlay, cgroup: Cgroup) -> None:
        """The bundle, with everything mounted."""
        doing = f"make the bundle of container {bundle.id}"
        try:
            await asyncio.to_thread(bundle.clear)
            bundle.make(self.name)
        except OSError as error:
            raise InternalError(doing, cause=error) from error
        config = oci_bundle.configuration(
            spec,
            rootfs=str(bundle.rootfs),
            volume=str(bundle.volumes),
            cgroup=cgroup.path,
            sandbox=self.settings.sandbox,
        )
        lower_oom_score(config["process"])
        (bundle.directory / "config.json").write_bytes(encoded(config))
        try:
            await self._engine.run_steps(f"{bundle.id}-bundle", steps(bundle, spec, overlay), doing)
        except Refused as error:
            raise StartFailed(doing, step=error.step or "setup", cause=error.cause or "", errno=error.errno) from error

    async def _create(
        self,
        bundle: Bundle,
        spec: dict[str, Any],
        cgroup: Cgroup,
        tty_sink: Callable[[int], Awaitable[None]] | None,
        on_created: OnCreated | None,
    ) -> Process:
        """The container's first process, which waits for `start`."""
        own = spec["process"]
        with contextlib.ExitStack() as stack:
            arguments = ["create", "--bundle", str(bundle.directory), "--pid-file", str(bundle.pid_file)]
            terminal: Terminal | None = None
            streams: tuple[int | None, ...] = (None, None, None)
            if own.get("terminal"):
                terminal = stack.enter_context(Terminal(self._run, bundle.id))
                arguments += ["--console-socket", terminal.path]
            else:
                directory = self._run / "containers" / bundle.id
                streams = stack.enter_context(opened(directory, stdin=bool(own.get("stdin"))))
            stdin, stdout, stderr = streams
            result = await self._commands.run(
                self._argv(bundle.state, bundle.log, *arguments, bundle.id),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                timeout=CREATE_SECONDS,
                join=cgroup.join if self._leaves_groups else (),
            )
            if result.code:
                raise self._failed(f"start container {bundle.id}", "create", bundle.log, result.words)
            process = self._register(bundle)
            await tell(on_created, process)
            if terminal is not None and tty_sink is not None:
                await terminal.hand_over(tty_sink)
            return process

    def _register(self, bundle: Bundle) -> Process:
        """Write down who it is: with a marker its exit will be recorded by the keeper, its parent from now on."""
        doing = f"start container {bundle.id}"
        try:
            pid = int(bundle.pid_file.read_text())
            process = Process(pid, linux.start_time(pid))
            tasks.mark(str(self._run), process.pid, process.start_time)
            bundle.put_process(process)
        except (OSError, ValueError) as error:
            raise StartFailed(doing, step="create", cause=f"its first process is gone: {error}", errno=0) from error
        self._containers[process] = bundle.id
        return process

    async def release(self, container_id: str) -> None:
        """Take away all that there is of a container's run: the runtime's state, mounts, the bundle. Idempotent."""
        await self._commands.settle()
        bundle = Bundle(self._run, container_id)
        if listed(bundle.state):
            try:
                await self._tell(bundle, "delete", "--force", container_id)
            except TareError as error:
                log.warning("container %s: %s", container_id, describe(error))
        try:
            await asyncio.to_thread(bundle.clear)
        except OSError as error:
            raise InternalError(f"remove the bundle of container {container_id}", cause=error) from error
        for process in [process for process, owner in self._containers.items() if owner == container_id]:
            del self._containers[process]

    async def came_to_run(self, process: Process) -> bool:
        """Whether `start` took effect, in whatever state the container is by now."""
        bundle = Bundle(self._run, self._containers[process])
        if not bundle.started.exists():
            return False
        argv = self._argv(bundle.state, bundle.log, "state", bundle.id)
        result, text = await self._commands.capture(argv, timeout=COMMAND_SECONDS)
        try:
            return not result.code and json.loads(text).get("status") in ("running", "paused", "stopped")
        except ValueError as error:
            raise InternalError(f"read the state of container {bundle.id}", cause=error) from error

    # An exec

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
        """A further process in the container whose main process is `target`: what stands in for it."""
        command = next(iter(process.get("args") or ()), "nothing")
        container_id = self._containers.get(target)
        doing = f"exec {command!r} in the container of process {target.pid}"
        if container_id is None:
            raise StartFailed(doing, step="find the container", cause="its main process is gone", errno=3)
        bundle = Bundle(self._run, container_id)
        base = bundle.exec / exec_id
        base.with_suffix(".json").write_bytes(encoded(oci_bundle.process(process)))
        pid_file, said = str(base.with_suffix(".pid")), base.with_suffix(".log")
        arguments = ["exec", "--process", f"{base}.json", "--pid-file", pid_file, "--detach"]
        if self.settings.sandbox:
            arguments += ["--internal-pid-file", str(base.with_suffix(".inner"))]
        with contextlib.ExitStack() as stack:
            terminal: Terminal | None = None
            if process.get("terminal"):
                terminal = stack.enter_context(Terminal(self._run, exec_id))
                arguments += ["--console-socket", terminal.path]
            try:
                made = await self._commands.spawn(
                    self._argv(bundle.state, said, *arguments, container_id),
                    stdin=stdin,
                    stdout=stdout,
                    stderr=stderr,
                    join=cgroup.join if self._leaves_groups else (),
                    pid_file=pid_file,
                )
            except Refused as error:
                failure = self._failed(doing, "exec", said, str(error.cause or ""))
                remove_exec(base)
                raise failure from error
            self._execs[made] = base
            try:
                if terminal is not None and tty_sink is not None:
                    await terminal.hand_over(tty_sink)
            except BaseException:
                self._commands.give_up(made)
                self.forget(made)
                raise
            return made

    def root_of(self, process: Process) -> int:
        """The PID of an exec's own process, for which another stands in; the process's own PID otherwise."""
        base = self._execs.get(process)
        words = read(base.with_suffix(".pid")).split() if base is not None else []
        return int(words[0]) if words else process.pid

    # Processes

    def signal(self, process: Process, number: int) -> bool:
        """Send a signal; False where the process is gone. An exec can only be killed; a sandbox has a signal handed on to what is in it."""
        if not self._engine.alive(process):
            return False
        base = self._execs.get(process)
        if base is not None:
            if inner := read(base.with_suffix(".inner")).strip():
                self._hand_on(base.parent.parent.name, "--pid", inner, number=signal.SIGKILL)
            self._commands.kill(process)
            return True
        if not self.settings.sandbox or number == signal.SIGKILL:
            return self._engine.signal(process, number)
        self._hand_on(self._containers[process], number=number)
        return True

    def _hand_on(self, container_id: str, *options: str, number: int) -> None:
        """Have the runtime signal the container, or a process in it. Nobody waits for that."""

        async def tell() -> None:
            try:
                await self._tell(Bundle(self._run, container_id), "kill", *options, container_id, str(number))
            except TareError as error:
                log.warning("container %s: %s", container_id, describe(error))

        errand = asyncio.ensure_future(tell())
        self._errands.add(errand)
        errand.add_done_callback(self._errands.discard)

    def forget(self, process: Process) -> None:
        """Its end is on record elsewhere now."""
        base = self._execs.pop(process, None)
        if base is None:
            self._engine.forget(process)
            return
        self._commands.forget(process)
        remove_exec(base)

    # Commands

    def _argv(self, state: Path, said: Path, *arguments: str) -> list[str]:
        general = ["--root", str(state), "--log", str(said), "--log-format", "json"]
        return [self.settings.path, *self.settings.options, *general, *arguments]

    async def _tell(self, bundle: Bundle, *arguments: str) -> None:
        """A command that says nothing where it succeeds. Raises StartFailed with its words where it does not."""
        doing = f"{arguments[0]} container {bundle.id}"
        try:
            argv = self._argv(bundle.state, bundle.log, *arguments)
            result = await self._commands.run(argv, timeout=COMMAND_SECONDS)
        except Refused as error:
            raise FailedPrecondition(doing, step=arguments[0], cause=f"{self.settings.path}: {error.cause}") from error
        if result.code:
            raise self._failed(doing, arguments[0], bundle.log, result.words)

    def _failed(self, doing: str, step: str, said: Path, words: str) -> StartFailed:
        """What the runtime said in its log, or else on standard error."""
        cause = (
            last_error(read(said))
            or words
            or f"{self.settings.path} does not say why, but perhaps in the container's log"
        )
        # Tare's own command says itself what it was doing.
        return StartFailed(doing, step=step, cause=cause.removeprefix(f"{doing}: "), errno=0)


class Terminal:
    """The socket on which a runtime hands over the master of a container's terminal. Its path is short: a socket's may have 107 bytes."""

    def __init__(self, run: Path, name: str) -> None:
        directory = run / "consoles"
        directory.mkdir(mode=0o700, exist_ok=True)
        self.path = str(directory / hashlib.sha256(name.encode()).hexdigest()[:16])
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    def __enter__(self) -> Terminal:
        Path(self.path).unlink(missing_ok=True)
        self._listener.bind(self.path)
        self._listener.listen(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        Path(self.path).unlink(missing_ok=True)

    async def hand_over(self, sink: Callable[[int], Awaitable[None]]) -> None:
        """Give the master, which the runtime has sent by now, to `sink`. Raises InternalError where it has not."""
        doing = "receive a terminal"
        try:
            async with asyncio.timeout(TERMINAL_SECONDS):
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
                with connection:
                    await readable(connection.fileno())
                    _, fds, _, _ = socket.recv_fds(connection, 4096, 4, socket.MSG_CMSG_CLOEXEC)
        except (TimeoutError, OSError) as error:
            raise InternalError(doing, cause=error or "the runtime did not send it") from error
        try:
            if len(fds) != 1:
                raise InternalError(doing, cause=f"the runtime sent {len(fds)} descriptors")
            await sink(fds[0])
        finally:
            for fd in fds:
                os.close(fd)


def steps(bundle: Bundle, spec: dict[str, Any], overlay: Overlay) -> list[Step]:
    """What a child of the launcher does to mount it all, on the node: image volumes, the root file system, directories in that."""
    base = bytes(bundle.rootfs)
    made: list[Step] = []
    for number, (mount, flags) in enumerate(oci_bundle.image_volumes(spec)):
        slot, target = FIRST_FREE + number, mount["destination"]
        made += volumes.union(slot, target, mount, flags, base)
        made.append(("put", f"mount {target}", slot, bytes(bundle.volumes / str(number))))
    lowers = tuple(bytes(path) for path in overlay.lowers)
    label = "make the root file system"
    made.append(("overlay", label, ROOT, lowers, bytes(overlay.upper), bytes(overlay.work), base))
    made.append(("attach_root", "mount the root file system", ROOT, base))
    return labels.labelled(made + volumes.directories(spec.get("directories") or ()), spec["linux"])


@contextlib.contextmanager
def opened(directory: Path, *, stdin: bool) -> Iterator[tuple[int | None, ...]]:
    """A container's ends of its FIFOs. Output is opened for reading too: so no SIGPIPE comes while no logger reads."""
    fds: list[int] = []
    try:
        if stdin:
            # A writer (the logger) may be on its way: opening must not wait for it, reading in the container must.
            fds.append(os.open(directory / "stdin", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            os.set_blocking(fds[0], True)
        fds += [os.open(directory / name, os.O_RDWR | os.O_CLOEXEC) for name in ("stdout", "stderr")]
        yield (fds[0] if stdin else None, *fds[-2:])
    finally:
        for fd in fds:
            os.close(fd)


def lower_oom_score(process: dict[str, Any]) -> None:
    """To go below one's own oom_score_adj takes CAP_SYS_RESOURCE; runtimes fail without it, where the launcher would do what it can."""
    wanted = int(process.get("oomScoreAdj") or 0)
    own = int(read(Path("/proc/self/oom_score_adj")) or 0)
    if wanted < own and not linux.capget() >> 24 & 1:
        log.warning("oom_score_adj %d is not permitted here", wanted)
        process["oomScoreAdj"] = own


def last_error(text: str) -> str:
    """The last error in a log of JSON lines; "" where there is none."""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError, AttributeError):
            entry = json.loads(line)
            if entry.get("level") in ("error", "fatal") and entry.get("msg"):
                return str(entry["msg"])
    return ""


def remove_exec(base: Path) -> None:
    """The files of an exec."""
    for suffix in (".json", ".pid", ".inner", ".log"):
        base.with_suffix(suffix).unlink(missing_ok=True)
