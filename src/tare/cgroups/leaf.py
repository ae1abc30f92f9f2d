"""A group of its own for all that one exec starts, inside of its container's: by it they are told from the container's others.

    <container>            the container's limits; its main process, as a rule
    └─ tare-exec-1f0c…     no controller is enabled for it, so nothing is limited or counted twice, and its parent may have processes

It is made in the unified tree only, v2's or that of a hybrid machine, beside the main process: a container that makes groups itself
(systemd, another runtime) has moved that away from where nothing may be any more. What outlives the exec moves up when the exec has ended.
"""

from __future__ import annotations

import errno
import os
import time

from tare.cgroups.tree import GONE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tare.cgroups.tree import Tree

PREFIX = "tare-exec-"
ATTEMPTS, PAUSE = 20, 0.001


def beside(tree: Tree, place: str, main: int) -> str:
    """The group that a container's main process is in: `place`, the container's, or one below it."""
    try:
        with open(f"/proc/{main}/cgroup") as groups:
            lines = groups.read().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return place
    at = next((line.removeprefix("0::").strip("/") for line in lines if line.startswith("0::")), "")
    return at if at.startswith(f"{place}/") and tree.exists(at) else place


def make(tree: Tree, above: str) -> str | None:
    """A new leaf's path in the tree; None where the group above takes none (it has as many as it may, is threaded, or is gone)."""
    name = f"{above}/{PREFIX}{os.urandom(6).hex()}"
    try:
        tree.make(name)
        if tree.read(name, "cgroup.type").strip() == "domain":
            return name
        tree.remove_one(name)
    except OSError:
        return None
    return None


def clear(tree: Tree, name: str) -> None:
    """Move what is in it up, and remove it. One that has groups of its own by now stays, and goes with the container. Blocks for moments."""
    above = name.rpartition("/")[0]
    for _ in range(ATTEMPTS):
        if tree.remove_one(name) or tree.below(name):
            return
        for pid in tree.processes(name):
            if not move(tree, above, pid):
                return
        time.sleep(PAUSE)


def move(tree: Tree, place: str, pid: int) -> bool:
    """False where the group takes no processes (any more)."""
    try:
        tree.write(place, "cgroup.procs", str(pid))
    except ProcessLookupError:
        return True
    except OSError as error:
        if error.errno not in (*GONE, errno.EBUSY, errno.EOPNOTSUPP):
            raise
        return False
    return True
