"""What compilation takes and gives: the place of a container on the node, a compiled filter, a plan with what the launcher needs beside it.

Plain classes, and nothing imported: the command line that other engines call builds on them, and starts in milliseconds.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tare.launch.plan import Plan

STDIN, STDOUT, STDERR, ROOT, NULL, USER, FIRST_NAMESPACE, FIRST_FREE = 0, 1, 2, 3, 4, 6, 8, 16
"""Slots of descriptors in a plan; those from FIRST_FREE on are for mounts."""


class Filter:
    """Compiled BPF, and the SECCOMP_FILTER_FLAG_ bits to load it with. `listener` is the path of the socket that is given the listener of its
    notifications, with `metadata`; "" where there are none."""

    __slots__ = ("flags", "listener", "metadata", "program")

    def __init__(self, *, program: bytes, flags: int = 0, listener: str = "", metadata: str = "") -> None:
        self.program = program
        self.flags = flags
        self.listener = listener
        self.metadata = metadata


class Compiled:
    """A plan, and what the launcher has to know beside it: the namespaces to clone into, whether a process in between makes the child,
    and the cgroup v2 directory that clone3 is to place it in ("": none). `apart`: the process in between is placed there itself, since it does
    all that takes privileges."""

    __slots__ = ("apart", "cgroup", "clone_flags", "helper", "plan")

    def __init__(
        self, *, plan: Plan, clone_flags: int, helper: bool = False, apart: bool = False, cgroup: str = ""
    ) -> None:
        self.plan = plan
        self.clone_flags = clone_flags
        self.helper = helper
        self.apart = apart
        self.cgroup = cgroup

    @property
    def maker(self) -> int:
        """Who makes the child, as the launcher is told (`wire.CREATE`)."""
        return int(self.helper) + int(self.apart)


class Directory:
    """A directory of the node, with what is mounted below, as a root file system: a bundle's."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path


class Mappings:
    """Of a user namespace: (first ID in the container, first ID on the node, how many) each."""

    __slots__ = ("gid", "uid")

    def __init__(self, uid: tuple[tuple[int, int, int], ...], gid: tuple[tuple[int, int, int], ...]) -> None:
        self.uid = uid
        self.gid = gid

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mappings) and (self.uid, self.gid) == (other.uid, other.gid)

    def __hash__(self) -> int:
        return hash((self.uid, self.gid))


class Place:
    """Where a container's process is made: its FIFOs' directory, the mount point to pivot from, cgroup.procs files, v1 hierarchies.

    Without a directory of FIFOs it keeps the streams that it has inherited.
    `hierarchies` are (folder name, mount options) of each cgroup v1 hierarchy, `unified` is the folder of v2 beside them; `groups` are
    the container's own directories in them, by folder. `directory_v2` is the one on v2, into which clone3 places the process; where it
    cannot, `join` has its file too. With `barrier` the process waits first, until somebody (systemd) has placed it. `other_proc` is how
    a /proc of a PID namespace that is joined can be had by who is not in it: None for not at all, "" for a new one, or where one is mounted.
    `id` and `bundle` (an absolute path) are what hooks are told of the container.
    """

    __slots__ = (
        "barrier",
        "base",
        "bundle",
        "directory_v2",
        "groups",
        "hierarchies",
        "id",
        "join",
        "other_proc",
        "streams",
        "unified",
    )

    def __init__(
        self,
        *,
        streams: Path | None,
        base: Path | str,
        join: tuple[str, ...] = (),
        hierarchies: tuple[tuple[str, tuple[str, ...]], ...] = (),
        unified: str = "",
        groups: Mapping[str, str] | None = None,
        directory_v2: str | None = None,
        barrier: bool = False,
        other_proc: str | None = None,
        id: str = "",
        bundle: str = "/",
    ) -> None:
        self.streams = streams
        self.base = base
        self.join = join
        self.hierarchies = hierarchies
        self.unified = unified
        self.groups = groups or {}
        self.directory_v2 = directory_v2
        self.barrier = barrier
        self.other_proc = other_proc
        self.id = id
        self.bundle = bundle
