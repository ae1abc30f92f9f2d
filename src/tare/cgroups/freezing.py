"""Stopping everything in a control group where it stands, and letting it go on.

v2 says through cgroup.events when the last process has stopped. v1 has freezer.state alone, which is asked again and again;
there a process in the middle of something may keep the group FREEZING until it is written to once more.
"""

from __future__ import annotations

import asyncio
import os
import select
import time
from collections.abc import Sequence

from tare.cgroups.ending import places
from tare.cgroups.tree import Tree
from tare.errors import DeadlineExceeded, FailedPrecondition, NotFound

FIRST_DELAY, SLOWEST = 0.0005, 0.02


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


async def freeze(trees: Sequence[Tree], path: str, name: str, timeout: float) -> None:
    """Until all has stopped. At the deadline it is let go on again, and DeadlineExceeded says so."""
    tree, place = find(trees, path, name)
    write(tree, place, frozen=True)
    try:
        async with asyncio.timeout(timeout):
            await reached(tree, place, frozen=True)
    except TimeoutError:
        write(tree, place, frozen=False)
        cause = f"not all of its processes have stopped after {timeout:g} s"
        raise DeadlineExceeded(f"freeze cgroup {path}", cause=cause, hint="it is thawed again") from None
    except BaseException:
        write(tree, place, frozen=False)
        raise


async def thaw(trees: Sequence[Tree], path: str, name: str, timeout: float) -> None:
    """Until it goes on. Raises DeadlineExceeded, as where a group above is frozen."""
    tree, place = find(trees, path, name)
    write(tree, place, frozen=False)
    try:
        async with asyncio.timeout(timeout):
            await reached(tree, place, frozen=False)
    except TimeoutError:
        cause = f"it is still frozen after {timeout:g} s"
        raise DeadlineExceeded(f"thaw cgroup {path}", cause=cause, hint="is a group above it frozen?") from None


async def reached(tree: Tree, place: str, *, frozen: bool) -> None:
    """Wait until the group is as it was asked to be."""
    if tree.hierarchy.version == 2:
        await announced(tree, place, frozen=frozen)
        return
    delay, again = FIRST_DELAY, time.monotonic() + 0.1
    while is_frozen(tree, place) is not frozen:
        await asyncio.sleep(delay)
        delay = min(delay * 2, SLOWEST)
        if frozen and time.monotonic() > again:
            write(tree, place, frozen=True)
            again = time.monotonic() + 0.1


async def announced(tree: Tree, place: str, *, frozen: bool) -> None:
    """cgroup.events says by POLLPRI that it changed; an epoll of its own brings that to the event loop, which waits for input alone."""
    changed = asyncio.Event()
    events = os.open(tree.absolute(f"{place}/cgroup.events"), os.O_RDONLY | os.O_CLOEXEC)
    try:
        watch = select.epoll()
        loop = asyncio.get_running_loop()
        try:
            watch.register(events, select.EPOLLPRI)
            loop.add_reader(watch, changed.set)
            wanted = f"frozen {int(frozen)}"
            # Reading is what makes the next change one that is told.
            while wanted not in os.pread(events, 4096, 0).decode().splitlines():
                await changed.wait()
                changed.clear()
                watch.poll(0)
        finally:
            loop.remove_reader(watch)
            watch.close()
    finally:
        os.close(events)
