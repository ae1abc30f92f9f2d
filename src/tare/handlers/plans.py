"""What compilation takes and gives: the place of a container on the node, a compiled filter, a plan with what the launcher needs beside it.

Plain classes, and nothing imported: the command line that other engines call builds on them, and starts in milliseconds.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tare.launch.plan import Plan

STDIN, STDOUT, STDERR, ROOT, NULL, FIRST_FREE = 0, 1, 2, 3, 4, 16
"""Slots of descriptors in a plan; 8 to 15 are for namespaces, those from FIRST_FREE on for mounts."""


class Filter:
    """Compiled BPF, and the SECCOMP_FILTER_FLAG_ bits to load it with."""

    __slots__ = ("flags", "program")

    def __init__(self, *, program: bytes, flags: int = 0) -> None:
        self.program = program
        self.flags = flags


class Compiled:
    """A plan, and what the launcher has to know beside it."""

    __slots__ = ("clone_flags", "pid_namespace", "plan")

    def __init__(self, *, plan: Plan, clone_flags: int, pid_namespace: str = "") -> None:
        self.plan = plan
        self.clone_flags = clone_flags
        self.pid_namespace = pid_namespace


class Place:
    """Where a container's process is made: its FIFOs' directory, the mount point to pivot from, cgroup.procs files, v1 hierarchies.

    `hierarchies` are (folder name, mount options) of each cgroup v1 hierarchy, `unified` is the folder of v2 beside them;
    `groups` are the container's own directories in them, by folder.
    """

    __slots__ = ("base", "groups", "hierarchies", "join", "streams", "unified")

    def __init__(
        self,
        *,
        streams: Path,
        base: Path,
        join: tuple[str, ...] = (),
        hierarchies: tuple[tuple[str, tuple[str, ...]], ...] = (),
        unified: str = "",
        groups: Mapping[str, str] | None = None,
    ) -> None:
        self.streams = streams
        self.base = base
        self.join = join
        self.hierarchies = hierarchies
        self.unified = unified
        self.groups = groups or {}
