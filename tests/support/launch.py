"""Containers made by the built-in handler by hand: a real keeper and launcher in a run directory of the test's own, no daemon.

    async with Launch(tmp_path) as launch:
        result = await launch.run(["cat", "/proc/self/status"])        # to its end: code, out, err
        box = await launch.start(["sleep", "1000"])                    # or as far as it runs
        other = await launch.exec(box, ["id"])

The root file system is a layer with busybox. Leaving the context kills what lives, lets the namespaces go and ends keeper and
launcher; what does not go by itself is ended by force, and then the test fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tare.cgroups.layout import container_mounts, detect
from tare.cgroups.manager import Cgroup, CgroupManager
from tare.config import RuntimeConfig
from tare.handlers.builtin import BuiltinHandler, Hierarchies, PodNamespaces, Process
from tare.handlers.compile import Filter
from tare.handlers.plans import Directory, Mappings
from tare.handlers.processes import ExitRecord
from tare.launch import linux
from tare.storage.overlay import Overlay
from tests.support import leaks
from tests.support.mounts import mounts_below

Json = dict[str, Any]

BUSYBOX = Path("/bin/busybox")
CAPABILITIES = ("CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE")
NO_CGROUP = Cgroup(path="/none", join=(), directory_v2=None, oom_file=None, kill_file=None, freezer_file=None)
CLOSED = ["nosuid", "noexec", "nodev"]
DEVPTS = ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
MASKED = ("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware", "/not/there")
READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger", "/not/there")
NAMESPACES = ("mount", "pid", "ipc", "uts", "network", "cgroup")
BESIDE = ("hooks", "annotations", "hostname", "domainname")
FIRST_ID, IDS = 100000, 65536
MAPPING = [{"containerID": 0, "hostID": FIRST_ID, "size": IDS}]
PYTHON_DIRECTORIES = ("/usr", "/lib", "/lib64", "/bin")
SECONDS = 20.0


def layer(directory: Path) -> Path:
    """A root file system of busybox, with the directories that a container's mounts need."""
    for name in ("bin", "etc", "proc", "dev", "sys", "tmp", "root"):
        (directory / name).mkdir(parents=True)
    (directory / "tmp").chmod(0o1777)
    shutil.copy(BUSYBOX, directory / "bin/busybox")
    for name in applets():
        (directory / "bin" / name).symlink_to("busybox")
    return directory


@functools.cache
def applets() -> list[str]:
    """What busybox can be called."""
    return [name for name in subprocess.check_output([BUSYBOX, "--list"], text=True).split() if name != "busybox"]


def process(args: Sequence[str], **changes: Any) -> Json:
    """An OCI process object."""
    return {
        "args": list(args),
        "env": ["PATH=/bin", "COLOUR=blue"],
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "capabilities": {kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")},
        "noNewPrivileges": True,
    } | changes


def standard_mounts() -> list[Json]:
    """The file systems that a container has."""
    return [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": CLOSED},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": DEVPTS},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": CLOSED},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*CLOSED, "ro"]},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*CLOSED, "ro"]},
    ]


def bind(destination: str, source: Path | str, *options: str) -> Json:
    """A bind mount, rprivate unless told otherwise."""
    given = ["rbind", *(options or ("rprivate",))]
    return {"destination": destination, "type": "bind", "source": str(source), "options": given}


def python_mounts() -> list[Json]:
    """The node's Python, to be run in a container where busybox cannot ask the question."""
    return [bind(path, path, "ro", "rprivate") for path in PYTHON_DIRECTORIES]


def namespaces(**paths: Path | str | None) -> list[Json]:
    """New ones of all kinds, but for those named: a path to join, or None for the node's."""
    found: list[Json] = []
    for kind in NAMESPACES:
        path = paths.get(kind, "")
        if path is not None:
            found.append({"type": kind, "path": str(path)} if path else {"type": kind})
    return found


def user_namespace(
    path: Path | str = "",
    *,
    uid: Sequence[Json] = MAPPING,
    gid: Sequence[Json] = MAPPING,
    **paths: Path | str | None,
) -> Json:
    """The part of a linux object that has the container in a user namespace, a new one or that at a path; others as `namespaces`."""
    own = {"type": "user", "path": str(path)} if path else {"type": "user"}
    return {"namespaces": [own, *namespaces(**paths)], "uidMappings": list(uid), "gidMappings": list(gid)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a process ended and what it wrote."""

    code: int
    signal: int
    out: str
    err: str


@dataclass(slots=True, kw_only=True)
class Box:
    """A container that was started. `upper` is its writable directory; `stdin` says that a FIFO is there for it."""

    id: str
    process: Process
    upper: Path
    cgroup: Cgroup
    streams: dict[str, int] = field(default_factory=dict)
    terminal: int = -1

    def read(self, name: str = "stdout") -> str:
        """What it has written and nobody has read."""
        return drain(self.streams[name])


def drain(fd: int) -> str:
    """All that is in a pipe now."""
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(fd, 1 << 16):
            parts.append(part)
    return b"".join(parts).decode(errors="replace")


class Launch:
    """A handler over keeper and launcher in `base`/run, and the containers made by it."""

    def __init__(self, base: Path, *, filter: Filter | None = None, cgroups: bool = False) -> None:
        self.base = base
        self.run_directory = base / "run"
        self.layer = base / "layer"
        self.filter = filter
        self.manager = CgroupManager() if cgroups else None
        self.parent = f"/tare-test-{os.getpid()}-{time.monotonic_ns()}"
        self.processes: dict[Process, None] = {}
        self.pods: dict[str, PodNamespaces] = {}
        self.descriptors: list[int] = []
        self.boxes = 0
        self.handler = self.new_handler()

    def new_handler(self) -> BuiltinHandler:
        """A handler as a daemon has it."""
        return BuiltinHandler(self.run_directory, RuntimeConfig(), self._filter, self.hierarchies())

    async def _filter(self, _: Mapping[str, Any]) -> Filter:
        assert self.filter is not None
        return self.filter

    def hierarchies(self) -> Hierarchies:
        """The control groups of this machine as a container sees them."""
        mounts = container_mounts(detect())
        first = tuple((mount.name, tuple(mount.options.split(","))) for mount in mounts if mount.kind == "cgroup")
        unified = next((mount.name for mount in mounts if mount.kind == "cgroup2"), "")
        return Hierarchies(v1=first, unified=unified if first else "")

    async def __aenter__(self) -> Launch:
        self.run_directory.mkdir(mode=0o700)
        layer(self.layer)
        try:
            await self.handler.connect()
            await until(lambda: self.pid_of("launcher") > 0, "the launcher")
        except BaseException:
            await self.destroy()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        troubles = await self.destroy()
        if error is None:
            assert not troubles, "had to be ended by force: " + "; ".join(troubles)

    # Containers

    def spec(
        self, args: Sequence[str], *, mounts: Sequence[Json] = (), root: Json | None = None, **changes: Any
    ) -> Json:
        """An OCI configuration. `changes` are of the process object; `linux` is laid over the linux object, BESIDE stand beside it."""
        beside = {key: changes.pop(key) for key in BESIDE if key in changes}
        parts: Json = {"namespaces": namespaces(), "maskedPaths": MASKED, "readonlyPaths": READONLY}
        parts |= changes.pop("linux", {})
        if self.filter is not None:
            parts["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"}
        return {
            "process": process(args, **changes),
            "root": root or {},
            "mounts": [*standard_mounts(), *mounts],
            "linux": parts,
            **beside,
        }

    def place(self, *, stdin: bool = False, lowers: Sequence[Path] = ()) -> tuple[str, Overlay, dict[str, int]]:
        """A new container's ID, its writable layer, and our ends of its FIFOs."""
        self.boxes += 1
        identity = f"c{self.boxes}"
        streams = self.run_directory / "containers" / identity
        writable = self.base / "snapshots" / identity
        for directory in (streams, writable / "upper", writable / "work"):
            directory.mkdir(parents=True)
        ends = {}
        for name in ("stdin", "stdout", "stderr") if stdin else ("stdout", "stderr"):
            os.mkfifo(streams / name, 0o600)
            flags = os.O_RDWR if name == "stdin" else os.O_RDONLY
            ends[name] = os.open(streams / name, flags | os.O_NONBLOCK | os.O_CLOEXEC)
        self.descriptors += ends.values()
        overlay = Overlay(lowers=(*lowers, self.layer), upper=writable / "upper", work=writable / "work")
        return identity, overlay, ends

    def cgroup(self, identity: str, resources: Json | None = None) -> Cgroup:
        """A container's control group; one that joins nothing where the test wants none."""
        if self.manager is None:
            return NO_CGROUP
        return self.manager.create(f"{self.parent}/{identity}", resources or {})

    async def start(
        self,
        args: Sequence[str],
        *,
        lowers: Sequence[Path] = (),
        resources: Json | None = None,
        on_created: Callable[[Process], Awaitable[None] | None] | None = None,
        place: Callable[[Process], Awaitable[None]] | None = None,
        bundle: Path | None = None,
        **changes: Any,
    ) -> Box:
        """A container whose process has exec'd. `lowers` are layers above busybox's; `bundle` is a root of its own instead of layers.

        Raises StartFailed and what else start raises.
        """
        identity, overlay, ends = self.place(stdin=bool(changes.get("stdin")), lowers=lowers)
        cgroup = self.cgroup(identity, resources)
        masters: list[int] = []

        async def sink(master: int) -> None:
            masters.append(os.dup(master))
            self.descriptors.append(masters[0])

        made = await self.handler.start(
            identity,
            self.spec(args, **changes),
            overlay=overlay if bundle is None else Directory(str(bundle)),
            cgroup=cgroup,
            tty_sink=sink if changes.get("terminal") else None,
            on_created=on_created,
            place=place,
        )
        self.processes[made] = None
        terminal = masters[0] if masters else -1
        return Box(id=identity, process=made, upper=overlay.upper, cgroup=cgroup, streams=dict(ends), terminal=terminal)

    async def run(self, args: Sequence[str], **changes: Any) -> Result:
        """A container to its end."""
        box = await self.start(args, **changes)
        return await self.finish(box)

    async def finish(self, box: Box) -> Result:
        """Wait for a container's end."""
        end = await self.wait(box.process)
        return Result(code=end.code, signal=end.signal, out=box.read("stdout"), err=box.read("stderr"))

    async def wait(self, made: Process) -> ExitRecord:
        """The end of a process, which is forgotten with that."""
        async with asyncio.timeout(SECONDS):
            end = await self.handler.wait(made)
        self.handler.forget(made)
        self.processes.pop(made, None)
        return end

    async def begin_exec(self, box: Box, args: Sequence[str], stdout: int, **changes: Any) -> Process:
        """A further process in a container, with both its outputs going to a descriptor."""
        self.boxes += 1
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            made = await self.handler.exec(
                f"e{self.boxes}",
                box.process,
                process(args, **changes),
                cgroup=box.cgroup,
                stdin=null,
                stdout=stdout,
                stderr=stdout,
            )
        finally:
            os.close(null)
        self.processes[made] = None
        return made

    async def exec(self, box: Box, args: Sequence[str], **changes: Any) -> Result:
        """The same to its end."""
        ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            end = await self.wait(await self.begin_exec(box, args, theirs, **changes))
            return Result(code=end.code, signal=end.signal, out=drain(ours), err="")
        finally:
            os.close(ours)
            os.close(theirs)

    async def kill(self, box: Box) -> None:
        """End a container."""
        self.handler.signal(box.process, signal.SIGKILL)
        await self.wait(box.process)

    # Pods

    async def pod(
        self,
        *kinds: str,
        hostname: str = "pod",
        sysctls: Mapping[str, str] | None = None,
        mappings: Mappings | None = None,
    ) -> PodNamespaces:
        """A pod's namespaces."""
        identity = f"p{len(self.pods)}"
        (self.run_directory / "pods" / identity).mkdir(exist_ok=True)
        made = await self.handler.pod_namespaces(
            identity, kinds=frozenset(kinds), hostname=hostname, sysctls=dict(sysctls or {}), mappings=mappings
        )
        if made.netlink is not None:
            made.netlink.close()
        made = replace(made, netlink=None)
        self.pods[identity] = made
        return made

    async def remove_pod(self, made: PodNamespaces, *, known: bool = True) -> None:
        """Let them go, with or without the knowledge of their PID 1."""
        identity = next(name for name, pod in self.pods.items() if pod is made)
        await self.handler.remove_pod_namespaces(identity, made.pause if known else None)
        del self.pods[identity]

    # Processes of ours

    def pid_of(self, name: str) -> int:
        """The PID of "keeper" or "launcher"; 0 where there is none. The launcher's children have its name until they exec."""
        if name == "launcher":
            recorded = linux.recorded(str(self.run_directory / "launcher.pid"))
            if recorded is None:
                return 0
            os.close(recorded[1])
            return recorded[0]
        found = [process.pid for process in self._ours() if process.name == f"tare-{name}"]
        return found[0] if found else 0

    def signal_ours(self, name: str, number: int) -> int:
        """Signal the keeper or the launcher, which must be there; its PID."""
        pid = self.pid_of(name)
        assert pid > 0, f"there is no {name}"  # PID 0 is the whole process group of the tests
        os.kill(pid, number)
        return pid

    def _ours(self) -> list[leaks.Process]:
        """Keeper, launcher and what they have forked that has not become another program."""
        return [process for process in leaks.processes() if str(self.run_directory) in process.command.split(" ")]

    async def kill_ours(self, name: str) -> None:
        """SIGKILL the keeper or the launcher, and wait until it is gone."""
        pid = self.pid_of(name)
        assert pid > 0, f"there is no {name}"
        await ended_by(pid, signal.SIGKILL)

    async def destroy(self) -> list[str]:
        """End everything. Returns what did not end by itself."""
        troubles: list[str] = []
        try:
            await self._end_all()
        except Exception as error:  # noqa: BLE001 - whatever fails, force comes next, and the test hears of it
            troubles.append(repr(error))
        self.handler.close()
        for fd in self.descriptors:
            os.close(fd)
        troubles += self._force()
        await self._remove_cgroups()
        return troubles

    async def _end_all(self) -> None:
        for made in list(self.processes):
            self.handler.signal(made, signal.SIGKILL)
            await self.wait(made)
        for pod in list(self.pods.values()):
            await self.remove_pod(pod)
        async with asyncio.timeout(SECONDS):
            await self.handler.connect()
            while not await self.handler.quit():
                await asyncio.sleep(0.01)
            while self._ours():  # the last children of the launcher may be on their way out
                await asyncio.sleep(0.01)

    def _force(self) -> list[str]:
        troubles = []
        for process in self._ours():
            troubles.append(f"process {process.pid} {process.name}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for point in [*mounts_below(self.run_directory), *mounts_below(self.base / "snapshots")]:
            troubles.append(f"mount {point}")
            subprocess.run(["umount", "-l", point], check=True)
        return troubles

    async def _remove_cgroups(self) -> None:
        if self.manager is None:
            return
        for number in range(1, self.boxes + 1):
            await self.manager.kill(f"{self.parent}/c{number}")
            await self.manager.remove(f"{self.parent}/c{number}")
        await self.manager.remove_parent(self.parent)
        self.manager.close()


async def ended_by(pid: int, number: int) -> None:
    """Signal a process and wait until it has ended."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, number)
        await readable(pidfd)
    finally:
        os.close(pidfd)


async def readable(fd: int) -> None:
    """Until there is something to read."""
    event = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, event.set)
    try:
        async with asyncio.timeout(SECONDS):
            await event.wait()
    finally:
        asyncio.get_running_loop().remove_reader(fd)


async def line(box: Box, name: str = "stdout", count: int = 1) -> str:
    """What a container says next, so many lines of it."""
    said = ""
    while said.count("\n") < count:
        await readable(box.streams[name])
        said += box.read(name)
    return said.strip()


async def until(condition: Callable[[], bool], what: str, seconds: float = SECONDS) -> None:
    """Until something is so. Fails where it does not come to be."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        await asyncio.sleep(0.005)


def in_launch(base: Path, body: Callable[[Launch], Awaitable[None]], **settings: Any) -> None:
    """Run an asynchronous test body with a `Launch`."""

    async def inner() -> None:
        async with Launch(base, **settings) as launch:
            await body(launch)

    asyncio.run(inner())


def status(text: str) -> dict[str, str]:
    """/proc/PID/status as a dictionary."""
    pairs = (entry.partition(":") for entry in text.splitlines())
    return {key: value.strip() for key, _, value in pairs}


@asynccontextmanager
async def second_daemon(launch: Launch) -> AsyncIterator[BuiltinHandler]:
    """Another handler on the same run directory: the next daemon."""
    handler = launch.new_handler()
    await handler.connect()
    try:
        yield handler
    finally:
        handler.close()
