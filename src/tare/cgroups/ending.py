"""Ending what runs in a control group, so that nothing forks away from it.

v2 has a file for that. On v1 the group is frozen, each process gets SIGKILL, and it is thawed to die; what was forked in
between is for the next pass. On a hybrid machine v2's file reaches all but processes that somebody moved.
"""

from __future__ import annotations

import errno
import os

from tare.cgroups.names import detached
from tare.cgroups.tree import GONE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from tare.cgroups.tree import Tree

BATCH = 256


def places(tree: Tree, name: str) -> tuple[str, ...]:
    """Where a group is in a tree: as named, set aside, or nowhere."""
    return tuple(place for place in (name, detached(name)) if tree.exists(place))


def first_place(tree: Tree, name: str) -> str | None:
    """Where a group is in a tree: as named if it is there, else set aside; None where it is nowhere."""
    return name if tree.exists(name) else next(iter(places(tree, name)), None)


def listed(tree: Tree, name: str) -> list[int]:
    """The processes of a group in one tree."""
    return [pid for place in places(tree, name) for pid in tree.processes(place)]


def write_if_there(tree: Tree, place: str, file: str, value: str) -> bool:
    """Write to a group that may be removed at this moment; False where it is gone, has no such file, or is threaded."""
    try:
        tree.write(place, file, value)
    except OSError as error:
        if error.errno not in (*GONE, errno.EOPNOTSUPP):
            raise
        return False
    return True


def watched(trees: Sequence[Tree]) -> list[Tree]:
    """The trees whose lists of processes are believed: the unified one, and v1's freezer (or the first) beside it."""
    first = [tree for tree in trees if tree.hierarchy.version == 1]
    freezer = [tree for tree in first if "freezer" in tree.hierarchy.controllers]
    return [tree for tree in trees if tree.hierarchy.version == 2] + (freezer or first)[:1]


def members(trees: Sequence[Tree], name: str) -> list[int]:
    """PIDs in the group and below it, by every tree that is watched."""
    return list(dict.fromkeys(pid for tree in watched(trees) for pid in listed(tree, name)))


def kill_pass(trees: Sequence[Tree], name: str) -> int:
    """One pass over a group; how many processes were in it (0: it is empty)."""
    found = members(trees, name)
    if not found:
        return 0
    reached: set[int] = set()
    frozen: list[tuple[Tree, str]] = []
    for tree in watched(trees):
        for place in places(tree, name):
            if tree.hierarchy.version == 2 and write_if_there(tree, place, "cgroup.kill", "1"):
                reached.update(tree.processes(place))
            elif "freezer" in tree.hierarchy.controllers:
                frozen.append((tree, place))
    strays = [pid for pid in found if pid not in reached]
    try:
        if strays:
            for tree, place in frozen:
                write_if_there(tree, place, "freezer.state", "FROZEN")
            signal_all(trees, name, reached)
    finally:
        # What is frozen does not die of its SIGKILL, so it is thawed in any case.
        for tree, place in frozen:
            write_if_there(tree, place, "freezer.state", "THAWED")
    return len(found)


def signal_all(trees: Sequence[Tree], name: str, reached: set[int]) -> None:
    """SIGKILL by pidfds. A PID counts only if it is in the group after its pidfd was opened: it may be another's by then."""
    pids = [pid for pid in members(trees, name) if pid not in reached]
    for start in range(0, len(pids), BATCH):
        handles: dict[int, int] = {}
        try:
            for pid in pids[start : start + BATCH]:
                try:
                    handles[pid] = os.pidfd_open(pid)
                except ProcessLookupError:
                    continue
            still = set(members(trees, name))
            for pid, handle in handles.items():
                if pid in still:
                    send_kill(handle)
        finally:
            for handle in handles.values():
                os.close(handle)


def send_kill(handle: int) -> None:
    """SIGKILL to a process that may have ended."""
    import signal

    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
    except ProcessLookupError:
        return
