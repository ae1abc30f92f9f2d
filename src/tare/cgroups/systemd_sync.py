"""Scopes for a command that runs to its end: each call connects to systemd, waits for it, and hangs up.

    place()             "slice:prefix:name" → the unit (`units`)
    start_scope()       a process that waits at its barrier is put into a scope with its limits
    update_scope()      the limits are changed, in the kernel and in systemd
    stop_scope()        the scope goes, with what runs in it; what Tare made beside it is `Groups.remove_now`'s

Importing this takes asyncio and jeepney, some 80 ms: only where systemd is asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from tare.cgroups import driver
from tare.cgroups.core import Cgroup, Groups
from tare.cgroups.systemd import Systemd
from tare.cgroups.units import Place, place

__all__ = ["Place", "place", "start_scope", "stop_scope", "update_scope"]

R = TypeVar("R")


def start_scope(groups: Groups, where: Place, description: str, pid: int, resources: Mapping[str, object]) -> Cgroup:
    """Put a waiting process into a scope of its own. Returns its group, whose `path` is what systemd says. Raises as `driver.start`."""
    return _run(lambda systemd: driver.start(systemd, groups, where, description, [pid], resources))


def update_scope(groups: Groups, unit: str, path: str, resources: Mapping[str, object]) -> tuple[str, ...]:
    """Change limits in place; what was skipped is returned. Raises as `driver.update`."""
    return _run(lambda systemd: driver.update(systemd, groups, unit, path, resources))


def stop_scope(unit: str) -> None:
    """End a scope, with what runs in it, and wait until it is gone. Idempotent. Raises as `Systemd.stop`."""
    _run(lambda systemd: systemd.end(unit))


def _run(work: Callable[[Systemd], Awaitable[R]]) -> R:
    async def connected() -> R:
        systemd = Systemd()
        try:
            return await work(systemd)
        finally:
            await systemd.close()

    return asyncio.run(connected())
