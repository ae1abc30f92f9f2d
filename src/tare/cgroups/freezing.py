"""Stopping everything in a control group where it stands, and letting it go on.

v2 says through cgroup.events when the last process has stopped. v1 has freezer.state alone, which is asked again and again;
there a process in the middle of something may keep the group FREEZING until it is written to once more.
"""

from __future__ import annotations

import os
import time

from tare.cgroups.ending import places
from tare.errors import DeadlineExceeded, FailedPrecondition, NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from tare.cgroups.tree import Tree

FIRST_DELAY, SLOWEST = 0.0005, 0.02
AGAIN = 0.1


def find(trees: Sequence[Tree], path: str, name: str) -> tuple[Tree, str]:
    """The tree that freezes, and the group in it. On a hybrid machine it is v1's: what that froze, v2 never sees as frozen.

    Raises FailedPrecondition where nothing freezes, NotFound where there is no such group.
    """
    tree = next((tree for tree in trees if "freezer" in tree.hierarchy.controllers), None)
    tree = tree or next((tree for tree in trees if tree.hierarchy.version == 2), None)
    if tree is None:
        raise FailedPrecondition(f"freeze cgroup {path}", cause="this node has no freezer controller")
    found = places(tree, name)
    if not found:
        raise NotFound(f"freeze cgroup {path}", cause="it does not exist")
    return tree, found[0]


def is_frozen(tree: Tree, place: str) -> bool:
    """Whether all in the group has stopped, by the group's own word or one above it."""
    if tree.hierarchy.version == 1:
        return tree.read(place, "freezer.state").strip() == "FROZEN"
    return "frozen 1" in tree.read(place, "cgroup.events").splitlines()


def write(tree: Tree, place: str, *, frozen: bool) -> None:
    """Ask the kernel for one or the other."""
    if tree.hierarchy.version == 1:
        tree.write(place, "freezer.state", "FROZEN" if frozen else "THAWED")
    else:
        tree.write(place, "cgroup.freeze", "1" if frozen else "0")


def freeze(trees: Sequence[Tree], path: str, name: str, timeout: float) -> None:
    """Until all has stopped. At the deadline it is let go on again, and DeadlineExceeded says so."""
    tree, place = find(trees, path, name)
    write(tree, place, frozen=True)
    try:
        stopped = reached(tree, place, timeout, frozen=True)
    except BaseException:
        write(tree, place, frozen=False)
        raise
    if not stopped:
        write(tree, place, frozen=False)
        cause = f"not all of its processes have stopped after {timeout:g} s"
        raise DeadlineExceeded(f"freeze cgroup {path}", cause=cause, hint="it is thawed again")


def thaw(trees: Sequence[Tree], path: str, name: str, timeout: float) -> None:
    """Until it goes on. Raises DeadlineExceeded, as where a group above is frozen."""
    tree, place = find(trees, path, name)
    write(tree, place, frozen=False)
    if not reached(tree, place, timeout, frozen=False):
        cause = f"it is still frozen after {timeout:g} s"
        raise DeadlineExceeded(f"thaw cgroup {path}", cause=cause, hint="is a group above it frozen?")


def reached(tree: Tree, place: str, timeout: float, *, frozen: bool) -> bool:
    """Wait until the group is as it was asked to be; False where the time was not enough."""
    deadline = time.monotonic() + timeout
    if tree.hierarchy.version == 2:
        return announced(tree, place, deadline, frozen=frozen)
    delay, again = FIRST_DELAY, time.monotonic() + AGAIN
    while is_frozen(tree, place) is not frozen:
        if time.monotonic() > deadline:
            return False
        time.sleep(delay)
        delay = min(delay * 2, SLOWEST)
        if frozen and time.monotonic() > again:
            write(tree, place, frozen=True)
            again = time.monotonic() + AGAIN
    return True


def announced(tree: Tree, place: str, deadline: float, *, frozen: bool) -> bool:
    """cgroup.events says by POLLPRI that it changed."""
    import select

    events = os.open(tree.absolute(f"{place}/cgroup.events"), os.O_RDONLY | os.O_CLOEXEC)
    try:
        watch = select.poll()
        watch.register(events, select.POLLPRI)
        wanted = f"frozen {int(frozen)}"
        # Reading is what makes the next change one that is told.
        while wanted not in os.pread(events, 4096, 0).decode().splitlines():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            watch.poll(left * 1000)
        return True
    finally:
        os.close(events)
