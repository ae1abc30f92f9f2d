"""Where a process is placed: the control groups that it joins, how, and what of them its container sees."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from tare.cgroups.manager import Cgroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Hierarchies:
    """cgroup v1 hierarchies to mount in a container: (folder, mount options) each, and the folder of v2 beside them ("" for none)."""

    v1: tuple[tuple[str, tuple[str, ...]], ...] = ()
    unified: str = ""

    def groups(self, cgroup: Cgroup) -> dict[str, str]:
        """A container's own directory in each hierarchy, by folder; one that is not at its usual path is left out."""
        if not self.v1:
            return {}
        tail = f"{cgroup.path}/cgroup.procs"
        folders = (join.removesuffix(tail) for join in cgroup.join if join.endswith(tail))
        return {os.path.basename(folder): folder + cgroup.path for folder in folders}


def joins(cgroup: Cgroup) -> tuple[str, ...]:
    """The cgroup.procs files that a child writes into; v2's is not among them where clone3 places it there."""
    if cgroup.directory_v2 is None:
        return cgroup.join
    return tuple(path for path in cgroup.join if not path.startswith(cgroup.directory_v2 + "/"))


@contextlib.contextmanager
def opened(directory: str) -> Iterator[tuple[int, ...]]:
    """A directory's descriptor in a tuple, or an empty one."""
    if not directory:
        yield ()
        return
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield (fd,)
    finally:
        os.close(fd)
