"""From an OCI runtime specification to a launch plan: which primitive steps, in which order. Pure; nothing is opened here.

The order is the design's: cgroup joined → sources opened → namespaces entered → the mount namespace cut off from the node's →
root file system → mounts → devices → masks → pivot → working directory → streams, then (after the gate) limits, credentials, seccomp.
Field names and meanings are those of the OCI runtime specification 1.2, config.md and config-linux.md.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tare.errors import InvalidArgument
from tare.handlers import options, volumes
from tare.handlers.capabilities import mask
from tare.handlers.options import encoded
from tare.launch import linux
from tare.storage.overlay import Overlay

if TYPE_CHECKING:
    from tare.launch.plan import Plan, Step

Spec = Mapping[str, Any]

NAMESPACE_KINDS = {"network": b"net", "ipc": b"ipc", "uts": b"uts", "cgroup": b"cgroup"}
SUPPORTED_NAMESPACES = frozenset({"mount", "pid", *NAMESPACE_KINDS})
CLONE_FLAGS = {
    "pid": linux.CLONE_NEWPID,
    "network": linux.CLONE_NEWNET,
    "mount": linux.CLONE_NEWNS,
    "ipc": linux.CLONE_NEWIPC,
    "uts": linux.CLONE_NEWUTS,
}
STANDARD_DEVICES = (("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0))
STANDARD_LINKS = (
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
)
STRICT_TARGETS = frozenset({"/proc", "/sys", "/dev"})
# Below /proc, only what a container may be given its own view of: no file that the kernel takes orders by.
PROC_FILES = frozenset(
    f"/proc/{name}"
    for name in (
        "cpuinfo",
        "diskstats",
        "loadavg",
        "meminfo",
        "slabinfo",
        "stat",
        "swaps",
        "uptime",
        "sys/crypto/fips_enabled",
        "sys/kernel/ns_last_pid",
    )
)
FILE_TYPES = {"c": 0o020000, "u": 0o020000, "b": 0o060000, "p": 0o010000}


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Compiled BPF, and the SECCOMP_FILTER_FLAG_ bits to load it with."""

    program: bytes
    flags: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """A plan, and what the launcher has to know beside it."""

    plan: Plan
    clone_flags: int
    pid_namespace: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a container's process is made: its FIFOs' directory, the mount point to pivot from, cgroup.procs files, v1 hierarchies.

    `hierarchies` are (folder name, mount options) of each cgroup v1 hierarchy, `unified` is the folder of v2 beside them;
    `groups` are the container's own directories in them, by folder.
    """

    streams: Path
    base: Path
    join: tuple[str, ...] = ()
    hierarchies: tuple[tuple[str, tuple[str, ...]], ...] = ()
    unified: str = ""
    groups: Mapping[str, str] = field(default_factory=dict)


def container(spec: Spec, overlay: Overlay, place: Place, seccomp: Filter | None) -> Compiled:
    """The plan of a container's main process. Raises InvalidArgument for what cannot be done, naming the field."""
    linux_part = spec.get("linux", {})
    process = spec["process"]
    namespaces = namespaces_of(linux_part)
    own_groups = place.groups if namespaces.get("cgroup") == "" else {}
    mounts = Mounts(spec.get("mounts", ()), place, own_groups)
    steps: list[Step] = [("hide", "hide"), ("umask", "set umask", 0)]
    steps.append(("oom_score", "set oom_score_adj", int(process.get("oomScoreAdj") or 0)))
    steps += [("join_cgroup", f"join cgroup {path}", encoded(path)) for path in place.join]
    steps += open_namespaces(namespaces)
    steps += open_streams(process, place)
    steps += mounts.open()
    steps += enter_namespaces(namespaces)
    if spec.get("hostname") and namespaces.get("uts") == "":
        steps.append(("hostname", "set the host name", encoded(spec["hostname"])))
    steps.append(("isolate", "cut the mount namespace off"))
    steps += mounts.unions()
    steps += root_file_system(overlay, place)
    steps += volumes.directories(spec.get("directories") or ())
    steps += mounts.attach()
    steps += devices(linux_part, mounts.fresh_dev)
    steps.append(("session", "make a session"))
    if process.get("terminal"):
        size = process.get("consoleSize") or {}
        label = "open a terminal"
        steps.append(("terminal", label, process["user"]["uid"], size.get("height", 0), size.get("width", 0)))
    steps += protect(linux_part, spec.get("root", {}), mounts)
    propagation = options.PROPAGATION.get(linux_part.get("rootfsPropagation", ""), (0, False))[0]
    steps.append(("pivot", "pivot_root", propagation))
    steps.append(("working_directory", "change to the working directory", encoded(process.get("cwd") or "/")))
    if not process.get("terminal"):
        steps.append(("streams", "connect the streams", (STDIN, STDOUT, STDERR), process["user"]["uid"]))
    steps.append(("keyring", "make a session keyring"))
    steps += foresee(process)
    plan = {"steps": steps, "final": credentials(process, seccomp), **program(process)}
    flags = sum(flag for kind, flag in CLONE_FLAGS.items() if kind in namespaces and not namespaces[kind])
    return Compiled(plan=plan, clone_flags=flags, pid_namespace=namespaces.get("pid", ""))


def execution(process: Spec, join: Sequence[str], namespaces: int, seccomp: Filter | None) -> Plan:
    """The plan of a process within a running container. `namespaces` are CLONE_NEW flags of those to enter."""
    before: list[Step] = [
        ("hide", "hide"),
        ("oom_score", "set oom_score_adj", int(process.get("oomScoreAdj") or 0)),
        *(("join_cgroup", f"join cgroup {path}", encoded(path)) for path in join),
    ]
    cwd = encoded(process.get("cwd") or "/")
    steps: list[Step] = [
        ("session", "make a session"),
        ("change_directory", "change to the working directory", cwd),
        ("keyring", "make a session keyring"),
    ]
    final = credentials(process, seccomp)
    user = process["user"]["uid"]
    return {"before": before, "namespaces": namespaces, "uid": user, "steps": steps, "final": final, **program(process)}


STDIN, STDOUT, STDERR, ROOT, NULL, FIRST_FREE = 0, 1, 2, 3, 4, 16


def namespaces_of(linux_part: Spec) -> dict[str, str]:
    """Type → path ("" : a new one). Raises InvalidArgument for what would leave the container in one of the node's by mistake."""
    doing = "make a container"
    namespaces: dict[str, str] = {}
    for item in linux_part.get("namespaces") or ():
        kind, path = item["type"], item.get("path") or ""
        if kind not in SUPPORTED_NAMESPACES or kind in namespaces:
            raise InvalidArgument(doing, cause=f"linux.namespaces has {kind!r}, which is unknown or there twice")
        namespaces[kind] = path
    if namespaces.get("mount") != "":
        raise InvalidArgument(doing, cause="linux.namespaces has no new mount namespace")
    return namespaces


def open_namespaces(namespaces: Mapping[str, str]) -> list[Step]:
    """Files of namespaces that exist, in slots 8 to 15. The PID namespace is the launcher's business."""
    return [
        ("open_namespace", f"open {kind} namespace {path}", 8 + index, encoded(path))
        for index, (kind, path) in enumerate(joined(namespaces))
    ]


def joined(namespaces: Mapping[str, str]) -> list[tuple[str, str]]:
    """Namespaces to enter by path."""
    order = ("network", "ipc", "uts", "cgroup")
    return [(kind, namespaces[kind]) for kind in order if namespaces.get(kind)]


def enter_namespaces(namespaces: Mapping[str, str]) -> list[Step]:
    """setns into what exists; a new cgroup namespace only now, when the cgroup has been joined."""
    steps: list[Step] = [
        ("enter", f"enter {kind} namespace", 8 + index, NAMESPACE_KINDS[kind])
        for index, (kind, _) in enumerate(joined(namespaces))
    ]
    if namespaces.get("cgroup") == "":
        steps.append(("unshare", "make a cgroup namespace", b"cgroup"))
    return steps


def open_streams(process: Spec, place: Place) -> list[Step]:
    """The container's ends of its FIFOs. Output is opened for reading too: so no SIGPIPE comes while no logger reads.

    `stdin` is Tare's own field: whether there is such a FIFO. Without one the container's own /dev/null is opened later.
    """
    if process.get("terminal"):
        return []
    stdin = [("open_stream", "open stdin", STDIN, os.fsencode(place.streams / "stdin"), os.O_RDONLY)]
    return [
        *(stdin if process.get("stdin") else []),
        ("open_stream", "open stdout", STDOUT, os.fsencode(place.streams / "stdout"), os.O_RDWR),
        ("open_stream", "open stderr", STDERR, os.fsencode(place.streams / "stderr"), os.O_RDWR),
    ]


def root_file_system(overlay: Overlay, place: Place) -> list[Step]:
    """The overlay of an image's layers under the container's writable directory."""
    lowers = tuple(bytes(path) for path in overlay.lowers)
    upper, work = bytes(overlay.upper), bytes(overlay.work)
    return [
        ("overlay", "make the root file system", ROOT, lowers, upper, work, bytes(place.base)),
        ("attach_root", "mount the root file system", ROOT, bytes(place.base)),
    ]


class Mounts:
    """The `mounts` of a specification, in its order, as steps: first those that open sources, then those that attach."""

    def __init__(self, mounts: Sequence[Spec], place: Place, groups: Mapping[str, str]) -> None:
        self.groups = groups
        self.mounts = [
            (FIRST_FREE + index, normal(mount["destination"]), mount, options.of(mount))
            for index, mount in enumerate(mounts)
        ]
        self.place = place
        self.late_readonly: list[bytes] = []
        at_dev = [flags for _, target, _, flags in self.mounts if target == "/dev"]
        self.fresh_dev = bool(at_dev) and not at_dev[-1].bind
        for _, target, mount, flags in self.mounts:
            check_target(target, mount, flags)

    def open(self) -> list[Step]:
        """Bind sources, before any namespace is entered: their propagation is that of the node's mount until it is set."""
        steps: list[Step] = []
        for slot, target, mount, flags in self.mounts:
            if not flags.bind:
                continue
            source = encoded(mount.get("source", ""))
            label = f"mount {target}"
            steps.append(("open_tree", label, slot, source, flags.recursive))
            if flags.recursive_set or flags.recursive_clear:
                steps.append(("attributes", label, slot, flags.recursive_set, flags.recursive_clear, True))
            if flags.set or flags.clear:
                steps.append(("attributes", label, slot, flags.set, flags.clear, False))
            propagation, recursive = flags.propagation or (linux.MS_PRIVATE, True)
            steps.append(("propagation", label, slot, propagation, recursive))
        return steps

    def unions(self) -> list[Step]:
        """Image volumes, in the new mount namespace, while nothing is at the mount point that the root is going to have."""
        base = bytes(self.place.base)
        return [step for mount in self.mounts for step in volumes.union(*mount, base)]

    def attach(self) -> list[Step]:
        """New file systems, made in the namespaces they belong to, and everything in its place."""
        steps: list[Step] = []
        for slot, target, mount, flags in self.mounts:
            kind = mount.get("type", "")
            if kind == "cgroup" and not flags.bind:
                steps += self.cgroup(slot, target, flags)
                continue
            if not flags.bind and not volumes.layers(mount, flags):
                steps.append(self.filesystem(slot, target, kind, flags))
            strict = target in STRICT_TARGETS or target in PROC_FILES
            steps.append(("attach", f"mount {target}", slot, encoded(target), strict))
        return steps

    def filesystem(self, slot: int, target: str, kind: str, flags: options.Flags) -> Step:
        """A new file system. /dev stays writable until its nodes are there."""
        attributes = flags.set
        if target == "/dev" and attributes & linux.MOUNT_ATTR_RDONLY:
            attributes &= ~linux.MOUNT_ATTR_RDONLY
            self.late_readonly.append(encoded(target))
        return ("filesystem", f"mount {target}", slot, encoded(kind), attributes, (named(kind), *flags.data))

    def cgroup(self, slot: int, target: str, flags: options.Flags) -> list[Step]:
        """The container's own cgroups: one cgroup2 mount, or a tmpfs with a mount for each v1 hierarchy.

        Where its cgroup namespace is its own, a bind mount of its group shows the same as a new mount, with fewer system calls.
        """
        label, path = f"mount {target}", encoded(target)
        attach = ("attach", label, slot, path, False)
        if not self.place.hierarchies:
            return [("filesystem", label, slot, b"cgroup2", flags.set, (named("cgroup"),)), attach]
        steps: list[Step] = [
            (
                "filesystem",
                label,
                slot,
                b"tmpfs",
                flags.set & ~linux.MOUNT_ATTR_RDONLY,
                (named("tmpfs"), (b"mode", b"755")),
            ),
            attach,
        ]
        for name, settings in self.place.hierarchies:
            below, part = path + b"/" + name.encode(), f"{label}/{name}"
            group = self.groups.get(name)
            if group is not None:
                steps.append(("bind_group", part, os.fsencode(group), flags.set, below))
                continue
            data = (named("cgroup"), *(options.pair(setting) for setting in settings))
            steps.append(("filesystem", part, slot, b"cgroup", flags.set, data))
            steps.append(("attach", part, slot, below, False))
        if self.place.unified:
            below, part = path + b"/" + self.place.unified.encode(), f"{label}/{self.place.unified}"
            group = self.groups.get(self.place.unified)
            if group is not None:
                steps.append(("bind_group", part, os.fsencode(group), flags.set, below))
            else:
                steps.append(("filesystem", part, slot, b"cgroup2", flags.set, (named("cgroup"),)))
                steps.append(("attach", part, slot, below, False))
        if flags.set & linux.MOUNT_ATTR_RDONLY:
            self.late_readonly.append(path)
        return steps


def normal(path: str) -> str:
    """An absolute path without dots, as seen from the container's root."""
    return os.path.normpath("/" + path.lstrip("/"))


def check_target(target: str, mount: Spec, flags: options.Flags) -> None:
    """Raise InvalidArgument for a mount that would hide what Tare or the kernel relies on in a container."""
    doing = f"mount {target}"
    if target == "/":
        raise InvalidArgument(doing, cause="a mount on / would hide the whole container")
    if target == "/proc" and (flags.bind or mount.get("type") != "proc"):
        raise InvalidArgument(doing, cause="nothing but a proc file system can be mounted on /proc")
    if target.startswith("/proc/") and target not in PROC_FILES:
        raise InvalidArgument(doing, cause="a mount within /proc would hide the kernel's own answers")
    if flags.bind and not mount.get("source"):
        raise InvalidArgument(doing, cause="a bind mount needs a source")


def named(kind: str) -> tuple[bytes, bytes]:
    """What mountinfo shows as a mount's source."""
    return b"source", encoded(kind)


def devices(linux_part: Spec, fresh: bool) -> list[Step]:
    """The nodes and links that every container has, where /dev is a new tmpfs, and the devices asked for."""
    steps: list[Step] = []
    wanted = {device["path"]: device for device in linux_part.get("devices", ())}
    if fresh:
        for name, major, minor in STANDARD_DEVICES:
            path = f"/dev/{name}"
            if path not in wanted:
                steps.append(("device", f"make {path}", path.encode(), 0o020666, major, minor, 0, 0))
        steps += [("symlink", f"link {path}", path.encode(), target.encode()) for path, target in STANDARD_LINKS]
    for path, item in wanted.items():
        mode = FILE_TYPES[item["type"]] | item.get("fileMode", 0o666)
        numbers = (item.get("major", 0), item.get("minor", 0), item.get("uid", 0), item.get("gid", 0))
        steps.append(("device", f"make {path}", encoded(path), mode, *numbers))
    return steps


def protect(linux_part: Spec, root: Spec, mounts: Mounts) -> list[Step]:
    """Masked and read-only paths, and what becomes read-only when it is complete."""
    steps: list[Step] = [
        ("readonly_mount", f"make {os.fsdecode(path)} read-only", path) for path in mounts.late_readonly
    ]
    for path in linux_part.get("readonlyPaths") or ():
        steps.append(("readonly_path", f"make {path} read-only", encoded(path)))
    masked = linux_part.get("maskedPaths") or ()
    if masked:
        steps.append(("open_null", "open the null device", NULL, mounts.fresh_dev))
    steps += [("mask", f"mask {path}", NULL, encoded(path)) for path in masked]
    if root.get("readonly"):
        steps.append(("readonly_root", "make the root file system read-only"))
    return steps


def credentials(process: Spec, seccomp: Filter | None) -> list[Step]:
    """Who the process is and what it may do. Without no_new_privs a filter takes CAP_SYS_ADMIN, so it is loaded before that goes."""
    user = process["user"]
    uid, gid = user["uid"], user["gid"]
    caps = {kind: mask(names) for kind, names in (process.get("capabilities") or {}).items()}
    steps: list[Step] = [
        ("rlimit", f"set {item['type']}", rlimit_number(item["type"]), signed(item["soft"]), signed(item["hard"]))
        for item in process.get("rlimits") or ()
    ]
    steps.append(("umask", "set umask", user.get("umask", 0o022)))
    steps.append(("bounding", "drop capabilities", caps.get("bounding", 0)))
    early = seccomp is not None and not process.get("noNewPrivileges")
    if early and seccomp is not None:
        steps.append(("seccomp", "load the seccomp filter", seccomp.program, seccomp.flags))
    steps.append(("identity", f"become user {uid}:{gid}", uid, gid, tuple(user.get("additionalGids") or ())))
    sets = (caps.get("effective", 0), caps.get("permitted", 0), caps.get("inheritable", 0), caps.get("ambient", 0))
    steps.append(("capabilities", "set capabilities", *sets))
    if process.get("noNewPrivileges"):
        steps.append(("no_new_privileges", "set no_new_privs"))
    if seccomp is not None and not early:
        steps.append(("seccomp_last", "load the seccomp filter", seccomp.program, seccomp.flags))
    return steps


def foresee(process: Spec) -> list[Step]:
    """Warnings of what the credentials are going to leave out, said while there is somebody to hear them."""
    steps: list[Step] = [
        (
            "foresee_rlimit",
            f"set {item['type']}",
            encoded(item["type"]),
            rlimit_number(item["type"]),
            signed(item["hard"]),
        )
        for item in process.get("rlimits") or ()
    ]
    permitted = mask((process.get("capabilities") or {}).get("permitted", ()))
    steps.append(("foresee_capabilities", "set capabilities", permitted))
    return steps


def rlimit_number(name: str) -> int:
    """RLIMIT_ by its name. Raises InvalidArgument."""
    number = getattr(resource, name, None) if name.startswith("RLIMIT_") else None
    if not isinstance(number, int):
        raise InvalidArgument("set resource limits", cause=f"unknown limit {name}")
    return number


def signed(limit: int) -> int:
    """An rlimit as setrlimit takes it: the largest unsigned number is no limit."""
    return -1 if limit >= (1 << 64) - 1 else limit


def program(process: Spec) -> dict[str, list[bytes]]:
    """argv, environment, and where argv[0] is looked for: along the container's own PATH unless it has a slash."""
    argv = [encoded(word) for word in process.get("args") or ()]
    environment = [encoded(entry) for entry in process.get("env") or ()]
    if not argv:
        raise InvalidArgument("make a container", cause="process.args is empty: there is nothing to run")
    path = next((entry[5:] for entry in reversed(environment) if entry.startswith(b"PATH=")), b"")
    if b"/" in argv[0] or not argv[0]:
        candidates = [argv[0]]
    else:
        folders = (
            path.split(b":")
            if path
            else [b"/usr/local/sbin", b"/usr/local/bin", b"/usr/sbin", b"/usr/bin", b"/sbin", b"/bin"]
        )
        candidates = [(folder or b".") + b"/" + argv[0] for folder in folders]
    return {"argv": argv, "env": environment, "paths": candidates}
