"""What plugins want of a container that is being made, held against the node: mount sources, how mounts spread, the control group.

What can be said without looking at anything was said by who put it together (`tare.nri.adjust`).
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from tare.errors import FailedPrecondition, InvalidArgument
from tare.handlers.checking import check_edited
from tare.runtime.bounds import twice
from tare.runtime.plugins import Adjusted
from tare.runtime.ports import Parts

if TYPE_CHECKING:
    from tare.runtime.store import Plan


async def configuration(parts: Parts, name: str, before: Plan, wanted: Adjusted) -> dict[str, object]:
    """The OCI configuration, with devices by name in it. Raises InvalidArgument, NotFound, FailedPrecondition for what cannot be."""
    doing = f"make container {name} as plugins want it"
    await check_sources(parts, doing, wanted)
    if wanted.cgroup != before.cgroup:
        check_group(parts, doing, wanted.cgroup)
    spec = wanted.spec
    if wanted.devices:
        spec = await asyncio.to_thread(parts.cdi.inject, spec, wanted.devices)
    check_edited(doing, spec)
    profile = spec["linux"].get("seccomp")
    if profile is not None:
        await parts.seccomp(profile)
    return spec


async def check_sources(parts: Parts, doing: str, wanted: Adjusted) -> None:
    """What is bound is there, and spreads as it is to."""
    if wanted.sources:
        for source in await twice(lambda: parts.handler.check_sources([(path, False) for path in wanted.sources])):
            if source.errno:
                raise InvalidArgument(doing, cause=f"mount source {source.path}: {os.strerror(source.errno)}")
    if not wanted.spreading:
        return
    paths = [path for path, _ in wanted.spreading]
    found = await twice(lambda: parts.handler.propagation(paths))
    for (_, needed), source in zip(wanted.spreading, found, strict=True):
        if source.propagation not in ("shared", needed):
            cause = f"mount source {source.path} is on a mount that is {source.propagation}, not {needed}"
            raise FailedPrecondition(doing, cause=cause, hint="make that one shared: mount --make-rshared")


def check_group(parts: Parts, doing: str, path: str) -> None:
    """A group of its own, in one that is there: the container's end takes away that one, and nothing above it."""
    doing = f"{doing}: use control group {path!r}"
    if parts.cgroups.driver != "cgroupfs":
        cause = f"its group is made by {parts.cgroups.driver}, below its pod's and nowhere else"
        raise FailedPrecondition(doing, cause=cause)
    parent, _, last = path.rpartition("/")
    if path != os.path.normpath(path) or path[:1] != "/" or not parent.strip("/") or not last:
        raise InvalidArgument(doing, cause="it is no absolute path of a group below another")
    if missing := parts.cgroups.missing_groups(parent):
        raise FailedPrecondition(doing, cause=f"there is no group {missing[-1]}", hint="make it first")
    refuse_anothers(parts, doing, path)


def refuse_anothers(parts: Parts, doing: str, path: str) -> None:
    """Raise FailedPrecondition for a group that is there already, or is a container's on record."""
    store = parts.store
    if parts.cgroups.exists(path) or any(store.plan(key).cgroup == path for key in store.containers):
        raise FailedPrecondition(doing, cause="it is another's")
