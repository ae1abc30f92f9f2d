"""The `mounts`, devices and protected paths of an OCI runtime specification as launch steps. Pure; nothing is opened here.

Sources are opened before any namespace is entered; file systems are made in the namespaces they belong to; all is attached beneath
the root. Sources: OCI runtime specification 1.2, config.md, "Mounts", and config-linux.md.
"""

from __future__ import annotations

import os

from tare.errors import InvalidArgument
from tare.handlers import options, volumes
from tare.handlers.options import encoded
from tare.handlers.plans import FIRST_FREE, NULL
from tare.launch import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from tare.handlers.plans import Place
    from tare.launch.plan import Step

    Spec = Mapping[str, Any]

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
