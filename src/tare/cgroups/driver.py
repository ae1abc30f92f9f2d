"""The systemd driver: a container's control group as a scope of systemd's, with what systemd has no property for beside it.

    start     a process waits at its barrier; systemd makes the scope around it; the rest of the limits and the other trees are ours
    update    first the kernel's files, where a refusal puts all back; then systemd's properties, which it writes anew when reloaded
    remove    after the group's processes have ended: the scope, then what we made beside it

The cgroupfs driver is `manager` alone.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tare.cgroups.manager import Cgroup, CgroupManager
from tare.cgroups.systemd import Systemd
from tare.cgroups.units import Place, resource_properties, scope_properties
from tare.errors import FailedPrecondition


@dataclass(frozen=True, slots=True)
class SystemdDriver:
    """Scopes by their `units.Place`; `groups` are the node's."""

    systemd: Systemd
    groups: CgroupManager

    async def start(
        self, where: Place, description: str, pids: Sequence[int], resources: Mapping[str, object]
    ) -> Cgroup:
        """Put processes that wait at their barrier into a scope of their own, with these limits (OCI linux.resources).

        Its `path` is what systemd says. On failure the scope is gone again, and its processes with it. Raises as `Systemd.start`
        and `CgroupManager.create`.
        """
        properties = resource_properties(resources, self._version)
        await self.systemd.start(where.unit, [*scope_properties(where, description, pids), *properties])
        try:
            path = await self.systemd.control_group(where.unit)
            group = await asyncio.to_thread(self.groups.create, path, resources)
            await asyncio.to_thread(join, group, pids)
        except BaseException:
            await self.systemd.stop(where.unit)
            raise
        return group

    async def update(self, where: Place, path: str, resources: Mapping[str, object]) -> tuple[str, ...]:
        """Change limits in place; what was skipped is returned. Raises as `CgroupManager.update` and `Systemd.set_properties`.

        Where it is systemd that fails, the kernel has the new limits and systemd the old: the same call once more brings both together.
        """
        properties = resource_properties(resources, self._version)
        skipped = await self.groups.update(path, resources)
        await self.systemd.set_properties(where.unit, properties)
        return skipped

    async def remove(self, where: Place, path: str) -> None:
        """Idempotent. What still runs in the scope is ended by systemd. Raises as `Systemd.stop` and `CgroupManager.remove`."""
        await self.systemd.stop(where.unit)
        await self.groups.remove(path)

    @property
    def _version(self) -> int:
        return 2 if self.groups.layout == "v2" else 1


def join(group: Cgroup, pids: Sequence[int]) -> None:
    """Move processes into the group in every tree; in systemd's own they are there. One that has ended meanwhile is passed over."""
    for file in group.join:
        for pid in pids:
            try:
                with open(file, "w") as procs:
                    procs.write(str(pid))
            except ProcessLookupError:
                continue
            except OSError as error:
                if error.errno == errno.ESRCH:
                    continue
                raise FailedPrecondition(f"move process {pid} into cgroup {group.path}", cause=error) from error
