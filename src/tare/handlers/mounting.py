"""The `mounts`, devices and protected paths of an OCI runtime specification as launch steps. Pure; nothing is opened here.

Sources are opened before any namespace is entered; file systems are made in the namespaces they belong to; all is attached beneath
the root. Sources: OCI runtime specification 1.2, config.md, "Mounts", and config-linux.md.
"""

from __future__ import annotations

import os
import stat

from tare.errors import InvalidArgument
from tare.handlers import mappings, options, volumes
from tare.handlers.mappings import wrong
from tare.handlers.namespaces import PIDS
from tare.handlers.options import encoded
from tare.handlers.plans import FIRST_FREE, NULL, USER
from tare.launch import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from tare.handlers.namespaces import Namespaces
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
    """The `mounts` of a specification, in its order, as steps: first those that open sources, then those that attach.

    With a user namespace what takes the node's privileges is laid ready in between (`launch.staging`), and taken from there. `staged` says
    that this is so for another reason; `other_proc`, which may be set, is what `Place` has, where who mounts is
    not in the PID namespace whose descriptor is in its slot by then.
    """

    def __init__(
        self,
        mounts: Sequence[Spec],
        place: Place,
        namespaces: Namespaces,
        *,
        staged: bool = False,
    ) -> None:
        self.other_proc: str | None = None
        self.staged = staged
        own_cgroups = namespaces.is_new("cgroup")
        self.groups = place.groups if own_cgroups or not namespaces.user else {}
        self.place = place
        self.namespaces = namespaces
        self.user = namespaces.user
        nodes_view = "cgroup" not in namespaces.kinds and not place.hierarchies
        if nodes_view or (self.user and not own_cgroups):
            mounts = [bound_cgroups(mount) for mount in mounts]
        self.mounts = [
            (FIRST_FREE + index, normal(mount["destination"]), mount, options.of(mount))
            for index, mount in enumerate(mounts)
        ]
        self.late_readonly: list[bytes] = []
        self.maps: dict[
            tuple[mappings.Lines, mappings.Lines], int
        ] = {}  # user namespaces that only map mounts: their slots
        self.mapped = {slot: self.mapping(index) for index, (slot, *_) in enumerate(self.mounts)}
        self.layers = 0
        at_dev = [flags for _, target, _, flags in self.mounts if target == "/dev"]
        self.fresh_dev = bool(at_dev) and not at_dev[-1].bind
        for _, target, mount, flags in self.mounts:
            check_target(target, mount, flags)

    def mapping(self, index: int) -> int | None:
        """The slot of the user namespace that a mount's owners are mapped by; None where they are as they are."""
        *_, mount, flags = self.mounts[index]
        path = f"mounts[{index}]"
        own = mappings.of(mount, path)
        if own is None and not flags.idmap:
            return None
        if not flags.bind:
            raise wrong(f"{path}.options", "only bind mounts can be idmapped")
        if own is None and not self.user:
            raise wrong(f"{path}.options", "idmap without mappings, where the container has no user namespace")
        if own is None or (self.namespaces.is_new("user") and own == self.namespaces.mappings):
            return USER
        return self.maps.setdefault((own.uid, own.gid), FIRST_FREE + len(self.mounts) + len(self.maps))

    def user_namespaces(self) -> list[Step]:
        """Those that only map mounts, made by the process in between."""
        return [
            ("new_user_namespace", "make a user namespace for mounts", slot, uid, gid, False)
            for (uid, gid), slot in self.maps.items()
        ]

    def open(self) -> list[Step]:
        """Bind sources, before any namespace is entered: their propagation is that of the node's mount until it is set."""
        steps: list[Step] = []
        for slot, target, mount, flags in self.mounts:
            if not flags.bind:
                continue
            source = encoded(mount.get("source", ""))
            label = f"mount {target}"
            steps.append(("open_tree", label, slot, source, flags.recursive))
            if target == "/proc":
                steps.append(("expect_proc", label, slot))
            by = self.mapped[slot]
            if by is not None:
                steps.append(("idmap", label, slot, by, source, flags.idmap_recursive))
            if flags.recursive_set or flags.recursive_clear:
                steps.append(("attributes", label, slot, flags.recursive_set, flags.recursive_clear, True))
            if flags.set or flags.clear:
                steps.append(("attributes", label, slot, flags.set, flags.clear, False))
            kind, recursive = flags.propagation or (linux.MS_PRIVATE, True)
            if self.user and kind == linux.MS_UNBINDABLE:
                kind = linux.MS_PRIVATE  # until it is taken, which is by a bind mount
            steps.append(("propagation", label, slot, kind, recursive))
        return steps

    def unions(self) -> list[Step]:
        """Image volumes, in the new mount namespace, while nothing is at the mount point that the root is going to have."""
        base = os.fsencode(self.place.base)
        steps: list[Step] = []
        for mount in self.mounts:
            for operation, label, slot, lowers, *more in volumes.union(*mount, self.borrowed(base)):
                laid, lowers = self.lay_layers(label, lowers)
                steps += [*laid, (operation, label, slot, lowers, *more)]
        return steps

    def borrowed(self, base: bytes) -> bytes:
        """A mount point that something may be on for a moment."""
        return base + b"/at" if self.user or self.staged else base

    def lay_layers(self, label: str, lowers: tuple[bytes, ...]) -> tuple[list[Step], tuple[bytes, ...]]:
        """Layers as overlayfs is to take them: idmapped, where the container has a user namespace."""
        if not self.user:
            return [], lowers
        steps: list[Step] = []
        laid: list[bytes] = []
        for lower in lowers:
            name = b"l%d" % self.layers
            self.layers += 1
            steps.append(("lay_layer", label, lower, USER, name))
            laid.append(os.fsencode(self.place.base) + b"/" + name)
        return steps, tuple(laid)

    def lay(self) -> list[Step]:
        """What is in the slots by now, laid ready for the child."""
        return [
            ("lay_mount", f"mount {target}", slot) for slot, target, mount, flags in self.mounts if laid(mount, flags)
        ]

    def attach(self) -> list[Step]:
        """New file systems, made in the namespaces they belong to, and everything in its place."""
        steps: list[Step] = []
        for slot, target, mount, flags in self.mounts:
            kind = mount.get("type", "")
            if kind == "cgroup" and not flags.bind:
                steps += self.cgroup(slot, target, flags)
                continue
            label = f"mount {target}"
            if kind == "proc" and self.other_proc and not flags.bind:
                steps += bound_proc(label, slot, self.other_proc, flags)
            elif not laid(mount, flags):
                steps.append(self.filesystem(slot, target, kind, mount.get("source") or kind, flags))
                steps += shaped(label, slot, target, kind, flags)
            elif self.user:
                steps.append(("take", label, slot))
                if flags.propagation and flags.propagation[0] in (linux.MS_SHARED, linux.MS_UNBINDABLE):
                    steps.append(("propagation", label, slot, *flags.propagation))
            strict = target in STRICT_TARGETS or target in PROC_FILES
            steps.append(("attach", label, slot, encoded(target), strict))
        return steps

    def has_options(self, kind: str) -> bool:
        """Whether a new file system of this kind is to have options beside its mount's flags."""
        return any(mount.get("type") == kind and flags.data and not flags.bind for _, _, mount, flags in self.mounts)

    def filesystem(self, slot: int, target: str, kind: str, source: str, flags: options.Flags) -> Step:
        """A new file system. /dev stays writable until its nodes are there."""
        attributes = flags.set
        if target == "/dev" and attributes & linux.MOUNT_ATTR_RDONLY:
            attributes &= ~linux.MOUNT_ATTR_RDONLY
            self.late_readonly.append(encoded(target))
        label, data = f"mount {target}", (named(source), *flags.data)
        if kind == "proc" and self.other_proc is not None:
            return ("proc", label, slot, PIDS, attributes, data)
        return ("filesystem", label, slot, encoded(kind), attributes, data)

    def cgroup(self, slot: int, target: str, flags: options.Flags) -> list[Step]:
        """The container's own cgroups: one cgroup2 mount, or a tmpfs with a mount for each v1 hierarchy.

        On v1 a bind mount of its group, which shows the same as a new mount where its cgroup namespace is its own. Where it is the node's,
        a new mount of v2 would set the flags of the node's own anew (nsdelegate), and take 15 ms for that.
        Of controllers that share a hierarchy (cpu,cpuacct) each has a link by its own name, as on the node.
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
        folders = [name for name, _ in self.place.hierarchies]
        shown = [name for name in (*folders, self.place.unified) if name in self.groups]
        if shown:
            groups = tuple((name.encode(), os.fsencode(self.groups[name])) for name in shown)
            steps.append(("bind_groups", label, path, flags.set, groups))
        for name, settings in self.place.hierarchies:
            below, part = path + b"/" + name.encode(), f"{label}/{name}"
            steps += [
                ("symlink", f"link {target}/{alias}", path + b"/" + alias.encode(), encoded(name))
                for alias in settings
                if alias not in ("none", *folders) and "=" not in alias
            ]
            if name in shown:
                continue
            data = (named("cgroup"), *(options.pair(setting) for setting in settings))
            steps.append(("filesystem", part, slot, b"cgroup", flags.set, data))
            steps.append(("attach", part, slot, below, False))
        if self.place.unified and self.place.unified not in shown:
            below, part = path + b"/" + self.place.unified.encode(), f"{label}/{self.place.unified}"
            steps.append(("filesystem", part, slot, b"cgroup2", flags.set, (named("cgroup"),)))
            steps.append(("attach", part, slot, below, False))
        if flags.set & linux.MOUNT_ATTR_RDONLY:
            self.late_readonly.append(path)
        return steps


def bound_proc(label: str, slot: int, path: str, flags: options.Flags) -> list[Step]:
    """A /proc that is mounted already, with the flags that a new one would have."""
    clear = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_NOEXEC
    return [
        ("open_tree", label, slot, encoded(path), False),
        ("expect_proc", label, slot),
        ("attributes", label, slot, flags.set, clear & ~flags.set, False),
        ("propagation", label, slot, *(flags.propagation or (linux.MS_PRIVATE, False))),
    ]


def laid(mount: Spec, flags: options.Flags) -> bool:
    """Whether a mount is open before the container's namespaces are entered: a bind mount, or an image volume."""
    return flags.bind or bool(volumes.layers(mount, flags))


def shaped(label: str, slot: int, target: str, kind: str, flags: options.Flags) -> list[Step]:
    """What a new file system is to be besides its flags: shared, and if it is a tmpfs, like what it hides."""
    steps: list[Step] = []
    if kind == "tmpfs" and b"mode" not in dict(flags.data):
        steps.append(("like_hidden", label, slot, encoded(target)))
    if flags.copy_up:
        if kind != "tmpfs":
            raise InvalidArgument(label, cause="tmpcopyup is for a tmpfs alone")
        steps.append(("copy_up", label, slot, encoded(target)))
    if flags.propagation:
        steps.append(("propagation", label, slot, *flags.propagation))
    return steps


def bound_cgroups(mount: Spec) -> Spec:
    """The node's, bound: in a user namespace that does not own the cgroup namespace none can be mounted, and in the node's own cgroup
    namespace a new mount of v2 would show the same and set the flags of the node's anew."""
    if mount.get("type") not in ("cgroup", "cgroup2"):
        return mount
    given = mount.get("options") or ()
    wanted = ["rbind", "rprivate", *given, *(f"r{option}" for option in given if option in options.SETS)]
    return {"destination": mount["destination"], "type": "bind", "source": "/sys/fs/cgroup", "options": wanted}


def normal(path: str) -> str:
    """An absolute path without dots, as seen from the container's root."""
    return os.path.normpath("/" + path.lstrip("/"))


def check_target(target: str, mount: Spec, flags: options.Flags) -> None:
    """Raise InvalidArgument for a mount that would hide what Tare or the kernel relies on in a container."""
    doing = f"mount {target}"
    if target == "/":
        raise InvalidArgument(doing, cause="a mount on / would hide the whole container")
    if target == "/proc" and not flags.bind and mount.get("type") != "proc":
        raise InvalidArgument(doing, cause="nothing but a proc file system can be mounted on /proc")
    if target.startswith("/proc/") and target not in PROC_FILES:
        raise InvalidArgument(doing, cause="a mount within /proc would hide the kernel's own answers")
    if flags.bind and not mount.get("source"):
        raise InvalidArgument(doing, cause="a bind mount needs a source")


def named(source: str) -> tuple[bytes, bytes]:
    """What a file system is made of, or only what mountinfo shows as that."""
    return b"source", encoded(source)


def nodes(linux_part: Spec, fresh: bool) -> list[tuple[str, int, int, int, int, int]]:
    """(path, mode with type, major, minor, uid, gid) of the devices that every container has, where /dev is a new tmpfs, and of those asked for."""
    wanted = {device["path"]: device for device in linux_part.get("devices") or ()}
    found: list[tuple[str, int, int, int, int, int]] = []
    for name, major, minor in STANDARD_DEVICES if fresh else ():
        if f"/dev/{name}" not in wanted:
            found.append((f"/dev/{name}", 0o020666, major, minor, 0, 0))
    for path, item in wanted.items():
        mode = FILE_TYPES[item["type"]] | stat.S_IMODE(item.get("fileMode", 0o666))
        found.append((path, mode, item.get("major", 0), item.get("minor", 0), item.get("uid", 0), item.get("gid", 0)))
    return found


def devices(linux_part: Spec, fresh: bool, user: bool) -> list[Step]:
    """Nodes and links. In a user namespace nobody may make a device: those are taken that were laid ready."""
    steps: list[Step] = []
    for index, (path, mode, *numbers) in enumerate(nodes(linux_part, fresh)):
        if user and not stat.S_ISFIFO(mode):
            steps.append(("take_device", f"make {path}", b"d%d" % index, encoded(path)))
        else:
            steps.append(("device", f"make {path}", encoded(path), mode, *numbers))
    if fresh:
        steps += [("symlink", f"link {path}", path.encode(), target.encode()) for path, target in STANDARD_LINKS]
    return steps


def lay_devices(linux_part: Spec, fresh: bool) -> list[Step]:
    """The devices for a container with a user namespace."""
    return [
        ("lay_device", f"make {path}", b"d%d" % index, encoded(path), mode, *numbers)
        for index, (path, mode, *numbers) in enumerate(nodes(linux_part, fresh))
        if not stat.S_ISFIFO(mode)
    ]


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
