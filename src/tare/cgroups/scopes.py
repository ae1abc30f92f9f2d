"""The daemon's control groups where systemd makes them: a slice for a pod, a scope for a container.

    /kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice      the kubelet's, or made here where it is not there
                                             └─ tare-<container ID>.scope       made around the process that waits at its barrier

A group that bears no scope's name (one made before the driver was changed) is made and removed as a directory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from tare.cgroups import driver
from tare.cgroups.core import Cgroup
from tare.cgroups.kills import Kills
from tare.cgroups.layout import Layout
from tare.cgroups.manager import CgroupManager
from tare.cgroups.names import relative, resolve_parent
from tare.cgroups.resources import plan
from tare.cgroups.systemd import Systemd
from tare.cgroups.units import Place, place_of, scope_of, slice_properties
from tare.errors import FailedPrecondition, InvalidArgument


class SystemdGroups(CgroupManager):
    """`run` is a directory of this boot, for what is known of OOM kills; `above` is the group that is this systemd's root: "" but for a test's."""

    driver = "systemd"

    def __init__(
        self, systemd: Systemd, run: Path, root: str = "/sys/fs/cgroup", layout: Layout | None = None, above: str = ""
    ) -> None:
        super().__init__(root, layout, str(run))
        self._systemd = systemd
        self._above = above
        self._kills = Kills(self.open_file, super().oom_kills, run / "oom.json")
        # A slice is stopped with all that is in it: nothing may be put into one between looking and stopping.
        self._slices = asyncio.Lock()

    def close(self) -> None:
        """Let go of the trees, and watch nothing more."""
        self._kills.close()
        super().close()

    async def leave(self) -> None:
        """Let the connection to systemd go."""
        await self._systemd.close()

    # Names

    def resolve_parent(self, cgroup_parent: str, default: str) -> str:
        """The path of the slice that a pod's cgroup_parent names; by `default`'s name where it is empty. Raises InvalidArgument."""
        name = cgroup_parent or f"{relative(default)}.slice"
        path = resolve_parent(name)
        last = path.rpartition("/")[2]
        if not last.endswith(".slice") or resolve_parent(last) != path:
            raise InvalidArgument(
                f"use cgroup parent {cgroup_parent!r}",
                cause="is no slice of systemd's",
                hint="is the kubelet's cgroup driver systemd too?",
            )
        return self._above + path

    def container_path(self, parent: str, container_id: str) -> str:
        """Where the container's scope is below its pod's slice."""
        return f"{parent}/{scope_of(parent, container_id).unit}"

    def _place(self, path: str) -> Place | None:
        """The unit that a group is; None where it is none of systemd's."""
        return place_of(path.removeprefix(self._above))

    # Pods

    async def make_parent(self, path: str) -> bool:
        """Start a pod's slice, and with it those above. One that exists is not touched: False. Raises as `Systemd.start`."""
        where = self._place(path)
        if where is None:
            return await super().make_parent(path)
        async with self._slices:
            if self.exists(path):
                return False
            await self._systemd.start(where.unit, slice_properties(where, f"Pods of Tare: {where.unit}"))
            self.mark_now(path)
        return True

    async def remove_parent(self, path: str, timeout: float = 1.0) -> bool:
        """Stop a slice that `make_parent` started, unless something is in it by now. True: it is gone. Idempotent."""
        where = self._place(path)
        if where is None:
            return await super().remove_parent(path, timeout)
        async with self._slices:
            if self.exists(path) and (self.has_below(path) or self.processes(path)):
                return False
            await self._systemd.stop(where.unit)
            return await super().remove_parent(path, timeout)

    # Containers

    def prepare(self, path: str, resources: Mapping[str, object]) -> Cgroup:
        """What is known of a container's group before it is there: its path. Its limits are looked at. Raises InvalidArgument."""
        if self._place(path) is None:
            return super().prepare(path, resources)
        plan(resources, self._versions)
        return Cgroup(path=path, join=(), directory_v2=None, oom_file=None, kill_file=None, freezer_file=None)

    def placing(self, path: str, resources: Mapping[str, object]) -> Callable[[int], Awaitable[None]] | None:
        """What puts a process that waits at its barrier into the group that was prepared."""
        where = self._place(path)
        if where is None:
            return super().placing(path, resources)

        async def place(pid: int) -> None:
            description = f"Tare container {where.unit.removeprefix('tare-').removesuffix('.scope')}"
            group = await driver.start(self._systemd, self, where, description, [pid], resources)
            if group.path != path:
                await self._systemd.end(where.unit)
                cause = f"systemd has made it at {group.path}"
                raise FailedPrecondition(f"make cgroup {path}", cause=cause, hint="is this systemd the node's own?")
            self.watch(path)

        return place

    def watch(self, path: str) -> None:
        """Count the OOM kills of a container that runs: its scope is removed as soon as it is empty. Idempotent."""
        if self._place(path) is not None:
            self._kills.watch(path)

    async def update(self, path: str, resources: Mapping[str, object]) -> tuple[str, ...]:
        """As `CgroupManager.update`, with systemd told of it."""
        where = self._place(path)
        if where is None:
            return await super().update(path, resources)
        return await driver.update(self._systemd, self, where.unit, path, resources)

    async def remove(self, path: str, timeout: float = 5.0) -> None:
        """As `CgroupManager.remove`, the unit first."""
        where = self._place(path)
        if where is not None:
            await self._systemd.end(where.unit)
            self._kills.forget(path)
        await super().remove(path, timeout)

    def oom_kills(self, path: str) -> int:
        """As `Groups.oom_kills`, also of a container whose scope is gone but was not removed here."""
        return self._kills.count(path)
