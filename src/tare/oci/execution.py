"""`exec`: a further process in a running container, from flags or from a process object in a file."""

from __future__ import annotations

import os

from tare.errors import FailedPrecondition, InvalidArgument, NotFound
from tare.handlers import checking, hooks
from tare.handlers import compile as compiler
from tare.handlers.capabilities import CAPABILITY_BITS
from tare.launch import linux
from tare.oci import config, documents, filters, groups, handover, interrupts, lifecycle, logs, state, terminals
from tare.oci.creating import FIRST_INHERITED, Undo, inherited, write_pid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tare.oci.arguments import Options
    from tare.oci.birth import Birth
    from tare.oci.config import Config
    from tare.oci.state import Container

NAMESPACES = {
    "mount": linux.CLONE_NEWNS,
    "pid": linux.CLONE_NEWPID,
    "network": linux.CLONE_NEWNET,
    "ipc": linux.CLONE_NEWIPC,
    "uts": linux.CLONE_NEWUTS,
    "cgroup": linux.CLONE_NEWCGROUP,
    "user": linux.CLONE_NEWUSER,
    "time": linux.CLONE_NEWTIME,
}
SETS = ("bounding", "effective", "permitted")


def run(root: str, options: Options, birth: Birth) -> int:
    """The exit code of the program, 0 with --detach. Raises FailedPrecondition, InvalidConfig, NotStarted."""
    interrupts.take()
    undo = Undo()
    undo.add("end the process", birth.kill)
    detached = options.given("detach")
    console = options.text("console-socket") and os.path.abspath(options.text("console-socket"))
    try:
        container = state.load(root, options.words[0])
        spec = lifecycle.kept_config(container)
        check_running(container, options)
        process = process_of(spec, options)
        terminals.check(process, console, detached=detached)
        begin(container, spec, process, birth, options, root)
        if birth.terminal >= 0 and console:
            terminals.send(console, birth.terminal)
        if options.text("pidfd-socket"):
            handover.send(os.path.abspath(options.text("pidfd-socket")), handover.EXECUTION, birth.pidfd)
        if options.text("pid-file"):
            write_pid(os.path.abspath(options.text("pid-file")), birth.pid)
        attendance = None if detached else lifecycle.Attendance(birth)
        if detached:
            interrupts.heed()
        birth.go(f"exec in container {container.id}", process["args"][0])
        birth.end()
    except BaseException:
        undo.all()
        raise
    return 0 if attendance is None else attendance.wait(relayed=not console)


def check_running(container: Container, options: Options) -> None:
    """Only where a program runs, or would: not in a stopped container, and in a paused one only if asked. Raises FailedPrecondition."""
    doing = f"exec in container {container.id}"
    status = container.status()
    if status in ("stopped", "creating"):
        raise FailedPrecondition(doing, cause=f"cannot exec in a {status} container")
    if status == "paused" and not options.given("ignore-paused"):
        hint = "resume it, or use --ignore-paused"
        raise FailedPrecondition(doing, cause="cannot exec in a paused container", hint=hint)


def process_of(spec: Config, options: Options) -> Config:
    """The process object: from --process, or the container's own changed by flags. Raises InvalidConfig, InvalidArgument."""
    if options.text("process"):
        process: Config = documents.decoded(config.read(options.text("process")))
        checking.check_process(process, "")
    else:
        process = changed(dict(spec["process"]), options)
        checking.check_process(process)
    _, passed = inherited()
    process["env"] = [*(process.get("env") or ()), *passed]
    return process


def changed(process: Config, options: Options) -> Config:
    """The container's own process, with what flags say."""
    words = options.words[1:]
    if not words:
        raise InvalidArgument("exec", cause="there is no command, and no --process")
    process["args"] = words
    process["terminal"] = options.given("tty")
    if options.text("cwd"):
        process["cwd"] = options.text("cwd")
    process["env"] = [*(process.get("env") or ()), *options.many("env")]
    if options.text("apparmor"):
        process["apparmorProfile"] = options.text("apparmor")
    if options.text("process-label"):
        process["selinuxLabel"] = options.text("process-label")
    if options.given("no-new-privs"):
        process["noNewPrivileges"] = True
    if options.many("cap"):
        process["capabilities"] = with_capabilities(process.get("capabilities") or {}, options.many("cap"))
    if options.text("user"):
        user, mark, group = options.text("user").partition(":")
        process["user"] = dict(process["user"], uid=number(user, "--user"))
        process["user"].pop("additionalGids", None)
        if mark:
            process["user"]["gid"] = number(group, "--user")
    if options.many("additional-gids"):
        gids = [number(gid, "--additional-gids") for gid in options.many("additional-gids")]
        process["user"] = dict(process["user"], additionalGids=gids)
    return process


def with_capabilities(sets: Config, names: list[str]) -> Config:
    """More capabilities, in the sets that matter after execve; ambient ones where the inheritable set has them. Raises InvalidArgument."""
    full = [name.upper() if name.upper().startswith("CAP_") else f"CAP_{name.upper()}" for name in names]
    for name in full:
        if name not in CAPABILITY_BITS:
            raise InvalidArgument("exec", cause=f"--cap {name} is not the name of a capability")
    return {**sets, **{kind: [*(sets.get(kind) or ()), *full] for kind in SETS}}


def number(word: str, flag: str) -> int:
    """A user's or group's number. Raises InvalidArgument."""
    if not word.isdecimal():
        raise InvalidArgument("exec", cause=f"{flag} takes numbers, not {word!r}")
    return int(word)


def begin(container: Container, spec: Config, process: Config, birth: Birth, options: Options, root: str) -> None:
    """Have the process made, as far as its gate."""
    doing = f"exec in container {container.id}"
    seccomp = filters.of(spec, root)
    try:
        pidfd = os.pidfd_open(container.pid)
    except ProcessLookupError:
        raise NotFound(doing, cause="container not running") from None
    try:
        if not container.alive():
            raise FailedPrecondition(doing, cause="container not running")
        kinds = {item["type"] for item in spec["linux"].get("namespaces") or ()}
        flags = sum(NAMESPACES[kind] for kind in kinds if kind in NAMESPACES)
        work = compiler.execution(
            process,
            joins(container, options),
            flags,
            seccomp,
            personality=spec["linux"].get("personality"),
            state=hooks.state(spec, container.id, str(container.facts["bundle"]), "running", container.pid),
        )
        work["inherit"] = FIRST_INHERITED + options.number("preserve-fds") + inherited()[0]
        if not process.get("terminal"):
            work["entered"].insert(0, ("own_streams", "own the streams", process["user"]["uid"]))
        if not owns_mounts(spec):
            # The root of a mount namespace that others live in is not the container's.
            within = ("root_within", "open the root file system", os.fsencode(str(container.facts["rootfs"])))
            work["entered"][:0] = [within, ("change_root", "change the root")]
        birth.execute(work, pidfd)
    finally:
        os.close(pidfd)
    interrupts.heed()
    birth.until_ready(doing)
    interrupts.keep()
    for warning in birth.warnings:
        logs.warning(f"container {container.id}: {warning}")


def owns_mounts(spec: Config) -> bool:
    """Whether the container has a mount namespace of its own."""
    return any(item["type"] == "mount" and not item.get("path") for item in spec["linux"].get("namespaces") or ())


def joins(container: Container, options: Options) -> list[str]:
    """The files of the container's group, or of groups below it that --cgroup names ([CONTROLLER,…:]PATH). Raises InvalidArgument."""
    own = list(groups.tree().open(container.cgroup).join)
    for text in options.many("cgroup"):
        controllers, mark, path = text.rpartition(":")
        below = "/" + path.strip("/") if path.strip("/") else ""
        if ".." in below.split("/"):
            raise InvalidArgument("exec", cause=f"--cgroup {text} leads out of the container's group")
        wanted = controllers.split(",") if mark else []
        own = [moved(file, below) if not wanted or folder(file) in wanted else file for file in own]
    return own


def moved(file: str, below: str) -> str:
    """The cgroup.procs of a group below. Raises NotFound."""
    place = f"{file.removesuffix('/cgroup.procs')}{below}/cgroup.procs"
    if not os.path.exists(place):
        raise NotFound("exec", cause=f"there is no cgroup {os.path.dirname(place)}")
    return place


def folder(file: str) -> str:
    """The tree that a file is in, by its folder below /sys/fs/cgroup."""
    return file.split("/")[4] if file.startswith("/sys/fs/cgroup/") else ""
