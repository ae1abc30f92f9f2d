"""The namespaces of an OCI runtime specification, and what is set in them, as launch steps. Pure.

    new       by clone3 when the process is made; a cgroup namespace later, when the cgroup has been joined; a time namespace
              before, by the process in between, which writes its offsets
    by path   entered by descriptors that were opened first. PID, and user, by the process in between: they are its child's

With a user namespace the process in between enters all that exist, while it may, and the new ones are owned by it.
Sources: OCI runtime specification 1.2, config-linux.md, "Namespaces", "User namespace mappings", "Offset for Time Namespace", "Sysctl".
"""

from __future__ import annotations

from tare.handlers import mappings
from tare.handlers.mappings import wrong
from tare.handlers.options import encoded
from tare.handlers.plans import FIRST_NAMESPACE, USER
from tare.launch import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from tare.launch.plan import Step

    Spec = Mapping[str, Any]

KINDS = {
    "network": b"net",
    "ipc": b"ipc",
    "uts": b"uts",
    "cgroup": b"cgroup",
    "time": b"time",
    "pid": b"pid",
    "mount": b"mnt",
    "user": b"user",
}
BY_PATH = ("network", "ipc", "uts", "cgroup", "time")
"""Those that a process enters itself, in this order."""
PIDS = FIRST_NAMESPACE + len(BY_PATH)
"""The slot of a PID namespace that is joined."""
CLONE_FLAGS = {
    "pid": linux.CLONE_NEWPID,
    "network": linux.CLONE_NEWNET,
    "mount": linux.CLONE_NEWNS,
    "ipc": linux.CLONE_NEWIPC,
    "uts": linux.CLONE_NEWUTS,
}
IPC_SYSCTLS = frozenset(
    f"kernel.{name}" for name in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")
)
CLOCKS = ("monotonic", "boottime")
NANOSECONDS = 1_000_000_000
LARGEST_SECONDS = (1 << 63) - 1


class Namespaces:
    """A specification's namespaces, checked: type → path ("" : a new one). Raises InvalidArgument with the JSON path that is wrong.

    `mappings` are those of the user namespace that the specification has; one that is joined may be told of with other ones (podman
    does that), so what is done by them is done by those that the kernel tells.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.linux: Spec = spec.get("linux") or {}
        self.kinds = parse(self.linux.get("namespaces") or ())
        self.mappings = mappings.of(self.linux, "linux")
        self.offsets = time_offsets(self.linux.get("timeOffsets"))
        self._check()

    def _check(self) -> None:
        if not self.is_new("mount"):
            self._check_shared_mounts()
        if "user" in self.kinds:
            self._check_user()
        elif self.mappings is not None:
            raise wrong("linux.uidMappings", "there is no user namespace for it among linux.namespaces")
        if self.offsets and self.kinds.get("time") != "":
            raise wrong("linux.timeOffsets", "there is no new time namespace for it among linux.namespaces")
        for key in ("hostname", "domainname"):
            if self.spec.get(key) and "uts" not in self.kinds:
                raise wrong(key, "there is no UTS namespace for it among linux.namespaces")

    def _check_shared_mounts(self) -> None:
        """A mount namespace that is joined stays as it is, and the node's, which a container has that names none: others live there."""
        whose = "joined by path" if "mount" in self.kinds else "the node's own"
        cause = f"the mount namespace is {whose}, and nothing is mounted or hidden in it"
        if self.user:
            raise wrong("linux.namespaces", f"the mount namespace is {whose}, which a user namespace may not be beside")
        for section, path, keys in (
            (self.spec, "", ("mounts",)),
            (self.linux, "linux.", ("devices", "maskedPaths", "readonlyPaths", "rootfsPropagation")),
            (self.spec.get("root") or {}, "root.", ("readonly",)),
        ):
            for key in keys:
                if section.get(key):
                    raise wrong(path + key, cause)

    def _check_user(self) -> None:
        if self.kinds["user"]:
            return
        if self.mappings is None:
            raise wrong("linux.uidMappings", "a new user namespace needs mappings")
        user = self.spec["process"]["user"]
        needed = [("linux.uidMappings", self.mappings.uid, 0), ("linux.gidMappings", self.mappings.gid, 0)]
        needed += [
            ("process.user.uid", self.mappings.uid, user["uid"]),
            ("process.user.gid", self.mappings.gid, user["gid"]),
        ]
        for index, gid in enumerate(user.get("additionalGids") or ()):
            needed.append((f"process.user.additionalGids[{index}]", self.mappings.gid, gid))
        for path, mapping, number in needed:
            if not mappings.covers(mapping, number):
                raise wrong(path, f"ID {number} has no mapping in the user namespace")

    @property
    def user(self) -> bool:
        """Whether the container has a user namespace."""
        return "user" in self.kinds

    @property
    def clone_flags(self) -> int:
        """Of those that clone3 makes. An IPC namespace is its maker's (its queues' file system is), so root of a user namespace makes it."""
        left_out = "ipc" if self.user else ""
        return sum(flag for kind, flag in CLONE_FLAGS.items() if self.is_new(kind) and kind != left_out)

    def is_new(self, kind: str) -> bool:
        """Whether it is made for this container."""
        return self.kinds.get(kind) == ""

    def joined(self, *kinds: str) -> list[tuple[int, str, str]]:
        """(slot, type, path) of those of these types that are entered by path."""
        places = ((FIRST_NAMESPACE + index, kind) for index, kind in enumerate((*BY_PATH, "pid", "mount")))
        return [(slot, kind, self.kinds[kind]) for slot, kind in places if kind in kinds and self.kinds.get(kind)]

    def open(self, *kinds: str) -> list[Step]:
        """Files of those that exist."""
        return [
            ("open_namespace", f"open {kind} namespace {path}", slot, encoded(path))
            for slot, kind, path in self.joined(*kinds)
        ]

    def enter(self, *kinds: str) -> list[Step]:
        """setns into those."""
        return [("enter", f"enter {kind} namespace", slot, KINDS[kind]) for slot, kind, _ in self.joined(*kinds)]

    def user_namespace(self) -> list[Step]:
        """The container's user namespace in its slot, made or opened."""
        path = self.kinds["user"]
        if path:
            return [("open_user_namespace", f"open user namespace {path}", USER, encoded(path))]
        assert self.mappings is not None
        return [("new_user_namespace", "make a user namespace", USER, self.mappings.uid, self.mappings.gid, True)]

    def time_namespace(self) -> list[Step]:
        """A new time namespace, for the children of who does this."""
        if not self.is_new("time"):
            return []
        lines = b"".join(b"%b %d %d\n" % (name.encode(), *offset) for name, offset in self.offsets)
        return [("new_time_namespace", "make a time namespace", lines)]

    def make(self) -> list[Step]:
        """Those that clone3 would make, by a process that needs no other for them."""
        kinds = [kind for kind in CLONE_FLAGS if kind != "pid" and self.is_new(kind)]
        return [("unshare", f"make {kind} namespace", KINDS[kind]) for kind in kinds]

    def fresh(self) -> list[Step]:
        """In them: a cgroup namespace, now that the cgroup has been joined, names, the loopback device, sysctls."""
        steps: list[Step] = []
        if self.is_new("ipc") and self.user:
            steps.append(("unshare", "make an IPC namespace", b"ipc"))
        if self.is_new("cgroup"):
            steps.append(("unshare", "make a cgroup namespace", b"cgroup"))
        if self.spec.get("hostname"):
            steps.append(("hostname", "set the host name", encoded(self.spec["hostname"])))
        if self.spec.get("domainname"):
            steps.append(("domainname", "set the domain name", encoded(self.spec["domainname"])))
        if self.is_new("network"):
            steps.append(("loopback", "bring the loopback device up"))
        for name, value in (self.linux.get("sysctl") or {}).items():
            steps.append(self.sysctl(name, value))
        return steps

    def sysctl(self, name: str, value: object) -> Step:
        """One sysctl of a namespace of the container's; others are refused."""
        path = f'linux.sysctl["{name}"]'
        if not isinstance(value, str):
            raise wrong(path, f"{value!r} is not a string")
        dotted = with_dots(name)
        label = f"set sysctl {dotted}"
        if dotted == "kernel.domainname" and "uts" in self.kinds:
            return ("domainname", label, encoded(value))
        if dotted == "kernel.hostname":
            raise wrong(path, "the host name is set by `hostname`")
        kind = "network" if dotted.startswith("net.") else "ipc"
        if kind == "ipc" and dotted not in IPC_SYSCTLS and not dotted.startswith("fs.mqueue."):
            raise wrong(path, "is not of a namespace: it would be set for the whole node")
        if kind not in self.kinds:
            raise wrong(path, f"the container has the node's own {kind} namespace")
        parts = [part.replace("/", ".") for part in dotted.split(".")]
        if not all(part and part not in (".", "..") for part in parts):
            raise wrong(path, "is no name of a sysctl")
        return ("write_file", label, b"/proc/sys/" + encoded("/".join(parts)), encoded(value))


def parse(given: Sequence[Spec]) -> dict[str, str]:
    """Type → path."""
    kinds: dict[str, str] = {}
    for index, item in enumerate(given):
        kind, path = item["type"], item.get("path") or ""
        here = f"linux.namespaces[{index}]"
        if kind not in KINDS or kind in kinds:
            raise wrong(f"{here}.type", f"{kind!r} is unknown or there twice")
        if path and not path.startswith("/"):
            raise wrong(f"{here}.path", f"{path!r} is not an absolute path")
        kinds[kind] = path
    return kinds


def time_offsets(given: Spec | None) -> list[tuple[str, tuple[int, int]]]:
    """(clock, (seconds, nanoseconds)) each."""
    found: list[tuple[str, tuple[int, int]]] = []
    for clock, offset in (given or {}).items():
        path = f"linux.timeOffsets.{clock}"
        if clock not in CLOCKS:
            raise wrong(path, f"is no clock that has an offset: those are {' and '.join(CLOCKS)}")
        seconds, nanoseconds = offset.get("secs", 0), offset.get("nanosecs", 0)
        if not isinstance(seconds, int) or abs(seconds) > LARGEST_SECONDS:
            raise wrong(f"{path}.secs", f"{seconds!r} is no number of seconds")
        if not isinstance(nanoseconds, int) or not 0 <= nanoseconds < NANOSECONDS:
            raise wrong(f"{path}.nanosecs", f"{nanoseconds!r} is no number under {NANOSECONDS}")
        found.append((clock, (seconds, nanoseconds)))
    return found


def with_dots(name: str) -> str:
    """A sysctl's name with dots between its parts; a dot of an interface's own name is a slash then, as sysctl(8) has it."""
    first = next((mark for mark in name if mark in "./"), ".")
    return name if first == "." else name.translate({ord("."): "/", ord("/"): "."})
