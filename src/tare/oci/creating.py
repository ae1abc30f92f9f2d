"""`create` and the first half of `run`: from a bundle to a process that waits before its exec. What fails undoes what was done."""

from __future__ import annotations

import _socket
import os
import time

from tare.errors import FailedPrecondition, InvalidArgument, describe
from tare.handlers import compile as compiler
from tare.handlers.plans import Directory, Place
from tare.handlers.shapes import InvalidConfig
from tare.launch import linux
from tare.oci import config, filters, groups, handover, interrupts, logs, shares, state, terminals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tare.cgroups.core import Cgroup
    from tare.handlers.plans import Compiled
    from tare.launch.plan import Plan
    from tare.oci.arguments import Options
    from tare.oci.birth import Birth
    from tare.oci.config import Config

FIRST_INHERITED = 3


class Request:
    """What a command line asks for."""

    def __init__(self, root: str, overall: Options, options: Options) -> None:
        self.root = root
        self.id = state.check_id(options.words[0])
        self.bundle = os.path.realpath(options.text("bundle") or ".")
        self.systemd = overall.given("systemd-cgroup")
        self.pid_file = options.text("pid-file") and os.path.abspath(options.text("pid-file"))
        self.console = options.text("console-socket") and os.path.abspath(options.text("console-socket"))
        self.pidfd_socket = options.text("pidfd-socket") and os.path.abspath(options.text("pidfd-socket"))
        self.keyring = not options.given("no-new-keyring")
        passed, self.environment = inherited()
        self.inherited = options.number("preserve-fds") + passed
        if options.given("no-pivot"):
            raise InvalidArgument(
                "create the container", cause="--no-pivot is not supported: the root is always pivoted"
            )


class Made:
    """A container whose process waits before its exec."""

    def __init__(self, container: state.Container, birth: Birth, config: Config) -> None:
        self.container = container
        self.birth = birth
        self.config = config


class Undo:
    """What has been done, as what undoes it: all of it in reverse, past failures, which are warnings."""

    def __init__(self) -> None:
        self.actions: list[tuple[str, Callable[[], object]]] = []

    def add(self, doing: str, action: Callable[[], object]) -> None:
        """One more."""
        self.actions.append((doing, action))

    def all(self) -> None:
        """Undo."""
        interrupts.ignore()
        while self.actions:
            doing, action = self.actions.pop()
            try:
                action()
            except Exception as error:  # noqa: BLE001 - the failure that led here is what is reported; this one is said besides
                logs.warning(f"undo: {doing}: {describe(error)}")


def create(request: Request, birth: Birth, *, held: bool) -> Made:
    """Make it; with `held` its process waits at its gate from then on, else for this command's GO.

    Raises InvalidConfig before anything is made, NotStarted and others after all was undone.
    """
    interrupts.take()
    undo = Undo()
    undo.add("end the process", birth.kill)
    try:
        data = read_config(request.bundle)
        spec = config.parse(data)
        spec["process"]["env"] = [*(spec["process"].get("env") or ()), *request.environment]
        rootfs = root_of(spec, request.bundle)
        terminals.check(spec["process"], request.console, detached=held)
        seccomp = filters.of(spec, request.root)
        path, unit = group_of(spec, request)
        share = shares.of(spec, request.id)
        joins = share.joins if share else ()
        expected = None if unit else groups.expected(path)
        # What cannot be done is refused before anything is made.
        made = compiled(spec, rootfs, request, expected, seccomp, joins, held=held)
        if not unit:
            groups.tree().check_free(path)  # what is in state.json `delete --force` ends: never a stranger's
        facts = first_facts(request, spec, rootfs, path)
        container = state.claim(request.root, request.id, facts)
        undo.add("remove the state directory", container.forget)
        keep_config(container, data)
        if share is not None:
            shares.apply(share)
            undo.add("remove the class of service", lambda: shares.remove(share))
        if expected is not None:
            group = groups.make(spec, path)
            undo.add(f"remove cgroup {path}", lambda: end_group(path))
            if group.join != expected.join:
                made = compiled(spec, rootfs, request, group, seccomp, joins, held=held)
        born(request, container, birth, made, undo, spec, held)
    except BaseException:
        undo.all()
        raise
    return Made(container, birth, spec)


def read_config(bundle: str) -> bytes:
    """The bundle's config.json. Raises FailedPrecondition, InvalidConfig."""
    path = f"{bundle}/{config.FILE}"
    try:
        return config.read(path)
    except OSError as error:
        raise FailedPrecondition(f"read {path}", cause=error.strerror or str(error)) from error


def root_of(spec: Config, bundle: str) -> str:
    """The root file system's directory. Raises InvalidConfig where it is none."""
    path = os.path.realpath(os.path.join(bundle, spec["root"]["path"]))
    if not os.path.isdir(path):
        raise InvalidConfig("root.path", f"{path} is not a directory")
    if path == "/":
        raise InvalidConfig("root.path", "is the node's own root")
    return path


def group_of(spec: Config, request: Request) -> tuple[str, str]:
    """(path, systemd unit or ""): with --systemd-cgroup the path is known once the unit is started. Raises InvalidConfig."""
    if not request.systemd:
        return groups.path_of(spec, request.id), ""
    from tare.oci import scopes

    return "", scopes.place_of(spec, request.id).unit


def first_facts(request: Request, spec: Config, rootfs: str, path: str) -> dict[str, Any]:
    """What state.json says before anything is made. A unit is in it only once systemd has made it for this container."""
    image = os.stat("/proc/self/exe")
    return {
        "version": state.VERSION,
        "ociVersion": spec["ociVersion"],
        "pid": 0,
        "start": 0,
        "maker": [os.getpid(), linux.start_time(os.getpid())],
        "image": [image.st_dev, image.st_ino],
        "bundle": request.bundle,
        "rootfs": rootfs,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()) + f".{time.time_ns() % 10**9:09d}Z",
        "owner": os.getuid(),
        "annotations": spec.get("annotations") or {},
        "cgroup": path,
        "unit": "",
        "shared_pids": not any(
            item["type"] == "pid" and not item.get("path") for item in spec["linux"].get("namespaces") or ()
        ),
    }


def keep_config(container: state.Container, data: bytes) -> None:
    """The configuration as it was, for `exec`, hooks and updates."""
    linux.replace_file(container.path(state.CONFIG), data)


def compiled(
    spec: Config,
    rootfs: str,
    request: Request,
    group: Cgroup | None,
    seccomp: Any,
    more: tuple[str, ...] = (),
    *,
    held: bool,
) -> Compiled:
    """The plan. Without a group the process is placed at its barrier. `more` are other files to join by."""
    hierarchies, unified = groups.hierarchies()
    place = Place(
        streams=None,
        base=rootfs,
        join=(*(group.join if group else ()), *more),
        hierarchies=hierarchies,
        unified=unified,
        groups=groups.folders(group) if group else {},
        directory_v2=group.directory_v2 if group else None,
        barrier=request.systemd,
        id=request.id,
        bundle=request.bundle,
    )
    made = compiler.container(spec, Directory(rootfs), place, seccomp)
    adapt(made.plan, request, held=held)
    return made


def adapt(work: Plan, request: Request, *, held: bool) -> None:
    """What this command's flags change in a plan."""
    work.setdefault("before", [])
    work.setdefault("making", "make the process")
    work["inherit"] = FIRST_INHERITED + request.inherited
    if not request.keyring:
        work["steps"] = [step for step in work["steps"] if step[0] != "keyring"]
    work["steps"].append(("find_program", "exec", work["paths"], work["argv"][0]))
    if held:
        work["steps"].append(("hold", "wait to be started"))


def born(
    request: Request,
    container: state.Container,
    birth: Birth,
    made: Compiled,
    undo: Undo,
    spec: Config,
    held: bool,
) -> None:
    """Have the process made, and write down who it is."""
    doing = f"create container {request.id}"
    directory = os.open(made.cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if made.cgroup else -1
    gate = listen(container) if held else None
    try:
        birth.create(doing, made, gate, directory)
    finally:
        if gate:
            gate.close()
        if directory >= 0:
            os.close(directory)
    interrupts.heed()
    birth.until_ready(doing, lambda pid: place(request, container, spec, pid, undo))
    interrupts.keep()
    for warning in birth.warnings:
        logs.warning(f"container {request.id}: {warning}")
    if birth.terminal >= 0 and request.console:
        terminals.send(request.console, birth.terminal)
    if request.pidfd_socket:
        handover.send(request.pidfd_socket, handover.CONTAINER, birth.pidfd)
    container.facts.update(pid=birth.pid, start=linux.start_time(birth.pid))
    container.save()
    if request.pid_file:
        write_pid(request.pid_file, birth.pid)
    if held:
        birth.hold()


def place(request: Request, container: state.Container, spec: Config, pid: int, undo: Undo) -> None:
    """Have systemd put a process that waits at its barrier into its scope.

    A start that fails has stopped what it began. Under a name that is taken the unit is another's, which nothing here may stop; and
    a scope whose process was killed before this is written down goes by itself.
    """
    from tare.oci import scopes

    interrupts.keep()
    unit = scopes.place_of(spec, request.id).unit
    cgroup = scopes.start(spec, request.id, pid)
    undo.add("stop the scope", lambda: scopes.stop(unit))
    container.facts.update(unit=unit, cgroup=cgroup)
    container.save()
    undo.add("remove the cgroup", lambda: end_group(container.cgroup))
    interrupts.heed()


def listen(container: state.Container) -> _socket.socket:
    """The gate's socket. The path to its directory may be longer than a socket's address: so it is named by descriptor."""
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    directory = os.open(container.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{directory}/{state.GATE}")
        listener.listen(8)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(directory)
    return listener


def write_pid(path: str, pid: int) -> None:
    """The PID file, whole or not at all. Raises FailedPrecondition."""
    folder, _, name = path.rpartition("/")
    draft = f"{folder}/.{name}"
    try:
        if os.path.lexists(draft):
            os.unlink(draft)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            os.write(fd, b"%d" % pid)
        finally:
            os.close(fd)
        os.rename(draft, path)
    except OSError as error:
        raise FailedPrecondition(f"write the PID file {path}", cause=error) from error


def end_group(path: str) -> None:
    """What is in a group ends, and it is removed."""
    groups.kill(path)
    groups.remove(path)


def inherited() -> tuple[int, list[str]]:
    """(descriptors that LISTEN_FDS passes, what the program is told of them), as systemd's sockets are handed on (sd_listen_fds(3))."""
    count = os.environ.get("LISTEN_FDS", "")
    if not count.isdecimal() or not int(count):
        return 0, []
    return int(count), [f"LISTEN_FDS={count}", "LISTEN_PID=1"]
