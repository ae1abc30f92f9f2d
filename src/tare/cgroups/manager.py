"""Control groups of containers as the daemon uses them: what `core` does, and waiting without blocking the event loop.

What may take the kernel a while (reclaiming memory, freezing, killing) is done in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping

from tare.cgroups.core import Cgroup, Groups
from tare.cgroups.layout import Layout
from tare.errors import DeadlineExceeded, FailedPrecondition

__all__ = ["Cgroup", "CgroupManager"]

log = logging.getLogger(__name__)
SLOWEST = 0.05


class CgroupManager(Groups):
    """`core.Groups` for the daemon, which makes them as directories; `scopes.SystemdGroups` is the other driver."""

    driver = "cgroupfs"

    def __init__(self, root: str = "/sys/fs/cgroup", layout: Layout | None = None, owner: str = "") -> None:
        super().__init__(root, layout, log.warning, owner)

    async def leave(self) -> None:
        """Let the connections go that the driver has; `close` is for what it has open."""

    def container_path(self, parent: str, container_id: str) -> str:
        """Where a container's group is, in its pod's."""
        return f"{parent.rstrip('/')}/{container_id}"

    async def make_parent(self, path: str) -> bool:
        """As `make_parent_now`."""
        return self.make_parent_now(path)

    def prepare(self, path: str, resources: Mapping[str, object]) -> Cgroup:
        """What is there of a container's group before its process: with this driver all of it. Raises as `create`."""
        return self.create(path, resources)

    def placing(self, path: str, resources: Mapping[str, object]) -> Callable[[int], Awaitable[None]] | None:
        """What has to be done once the process (its PID) waits at its barrier; None: it joins the group by itself."""
        return None

    def watch(self, path: str) -> None:
        """A container runs in the group from now on. With this driver the group stays until it is removed, with its counters."""

    async def remove_parent(self, path: str, timeout: float = 1.0) -> bool:
        """Remove a group that `make_parent` made, unless other groups are in it by now. True: it is gone. Idempotent."""
        deadline = time.monotonic() + timeout
        delay = 0.001
        while not self.remove_parent_now(path):
            if time.monotonic() > deadline or self.has_below(path):
                return False
            await asyncio.sleep(delay)
            delay = min(delay * 2, SLOWEST)
        return True

    async def update(self, path: str, resources: Mapping[str, object]) -> tuple[str, ...]:
        """As `update_now`."""
        return await asyncio.to_thread(self.update_now, path, resources)

    async def clear_leaf(self, path: str) -> None:
        """As `clear_leaf_now`."""
        if not self.leaf_went(path):
            await asyncio.to_thread(self.clear_leaf_now, path)

    async def kill(self, path: str, timeout: float = 10.0) -> None:
        """SIGKILL all that is in the group and below it, until nothing is. Idempotent.

        Raises DeadlineExceeded, naming the PIDs, where something does not end (in an uninterruptible wait).
        """
        deadline = time.monotonic() + timeout
        delay = 0.001
        while await asyncio.to_thread(self.kill_now, path):
            if time.monotonic() > deadline:
                left = self.processes(path)
                if not left:
                    return
                cause = f"PIDs {', '.join(map(str, left[:20]))} are still there after {timeout:g} s"
                raise DeadlineExceeded(f"kill the processes of cgroup {path}", cause=cause, hint="see /proc/PID/stack")
            await asyncio.sleep(delay)
            delay = min(delay * 2, SLOWEST)

    async def remove(self, path: str, timeout: float = 5.0) -> None:
        """Remove a container's group and the groups that were made inside of it, bottom-up. Idempotent.

        Waits for processes that have ended to leave. Raises FailedPrecondition at the timeout, naming who is in it.
        """
        deadline = time.monotonic() + timeout
        delay = 0.001
        while not await asyncio.to_thread(self.remove_now, path):
            if time.monotonic() > deadline:
                pids = self.processes(path)
                cause = f"PIDs {', '.join(map(str, pids[:20]))} are in it" if pids else "the kernel says it is busy"
                raise FailedPrecondition(f"remove cgroup {path}", cause=cause, hint="kill its processes first")
            await asyncio.sleep(delay)
            delay = min(delay * 2, SLOWEST)

    async def freeze(self, path: str, timeout: float = 10.0) -> None:
        """As `freeze_now`. Cancelled, it goes on."""
        work = asyncio.ensure_future(asyncio.to_thread(self.freeze_now, path, timeout))
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            await asyncio.wait((work,))
            if work.exception() is None:
                await self.thaw(path, timeout)
            raise

    async def thaw(self, path: str, timeout: float = 10.0) -> None:
        """As `thaw_now`."""
        await asyncio.to_thread(self.thaw_now, path, timeout)
