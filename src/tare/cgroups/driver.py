"""A container's control group as a scope of systemd's, with what systemd has no property for beside it.

    start     a process waits at its barrier; systemd makes the scope around it; the rest of the limits and the other trees are ours
    update    first the kernel's files, where a refusal puts all back; then systemd's properties, which it writes anew when reloaded

Groups in which this happens are the daemon's (`scopes`) or a command's (`systemd_sync`).
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping, Sequence

from tare.cgroups.core import Cgroup, Groups
from tare.cgroups.systemd import Systemd
from tare.cgroups.units import Place, resource_properties, scope_properties
from tare.errors import AlreadyExists, FailedPrecondition


async def start(
    systemd: Systemd,
    groups: Groups,
    where: Place,
    description: str,
    pids: Sequence[int],
    resources: Mapping[str, object],
) -> Cgroup:
    """Put processes that wait at their barrier into a scope of their own, with these limits (OCI linux.resources).

    Its `path` is what systemd says. A scope of the name that nobody has taken away is stopped first, if it is empty or what is in it has
    ended. On failure the scope is gone again, and its processes with it. Raises as `Systemd.start` and `Groups.create`.
    """
    properties = [*scope_properties(where, description, pids), *resource_properties(resources, version(groups))]
    try:
        await systemd.start(where.unit, properties)
    except AlreadyExists:
        if groups.processes(await systemd.control_group(where.unit) or where.path):
            raise
        await systemd.stop(where.unit)
        await systemd.start(where.unit, properties)
    try:
        path = await systemd.control_group(where.unit)
        if not path:
            raise FailedPrecondition(f"start unit {where.unit}", cause="its processes have ended already")
        group = await asyncio.to_thread(groups.create, path, resources)
        await asyncio.to_thread(join, group, pids)
    except BaseException:
        await systemd.end(where.unit)
        raise
    return group


async def update(
    systemd: Systemd, groups: Groups, unit: str, path: str, resources: Mapping[str, object]
) -> tuple[str, ...]:
    """Change limits in place; what was skipped is returned. Raises as `Groups.update_now` and `Systemd.set_properties`.

    Where it is systemd that fails, the kernel has the new limits and systemd the old: the same call once more brings both together.
    """
    properties = resource_properties(resources, version(groups))
    skipped = await asyncio.to_thread(groups.update_now, path, resources)
    await systemd.set_properties(unit, properties)
    return skipped


def version(groups: Groups) -> int:
    """Whose properties systemd takes."""
    return 2 if groups.layout == "v2" else 1


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
