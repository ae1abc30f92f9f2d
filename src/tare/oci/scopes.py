"""--systemd-cgroup: a container's group as a scope of systemd's, by linux.cgroupsPath "slice:prefix:name"."""

from __future__ import annotations

from tare.cgroups import systemd_sync
from tare.handlers.shapes import InvalidConfig
from tare.oci import groups

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from tare.cgroups.units import Place

PREFIX = "tare-oci"


def place_of(config: Mapping[str, Any], container_id: str) -> Place:
    """The unit that the configuration names; without a path one of its own in system.slice. Raises InvalidConfig."""
    text = (config.get("linux") or {}).get("cgroupsPath") or f"system.slice:{PREFIX}:{container_id}"
    if text.count(":") != 2:
        raise InvalidConfig("linux.cgroupsPath", f"{text!r} is not of the form slice:prefix:name")
    slice_name, prefix, name = text.split(":")
    return systemd_sync.place(f"{slice_name or 'system.slice'}:{prefix}:{name}", container_id)


def start(config: Mapping[str, Any], container_id: str, pid: int) -> str:
    """Put a process that waits at its barrier into its scope, with its limits: the group's path."""
    where = place_of(config, container_id)
    resources = groups.resources_of(config)
    return systemd_sync.start_scope(groups.tree(), where, f"Tare container {container_id}", pid, resources).path


def update(unit: str, path: str, resources: Mapping[str, object]) -> None:
    """Change its limits."""
    systemd_sync.update_scope(groups.tree(), unit, path, resources)


def stop(unit: str) -> None:
    """Stop it, with what runs in it. Idempotent."""
    systemd_sync.stop_scope(unit)
