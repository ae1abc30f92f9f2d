"""Names of control groups: which paths may be used, slices, where a group is set aside (pure)."""

from __future__ import annotations

from tare.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tare.cgroups.layout import Hierarchy

DETACHED = "tare-detached"
MARK = "user.tare"  # an extended attribute of groups that a daemon has made: its run directory


def relative(path: str) -> str:
    """A group's path without the slash before it. Raises InvalidArgument for the root and for names that lead elsewhere."""
    name = path.strip("/")
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or "\0" in name or "\n" in name:
        raise InvalidArgument(f"use cgroup {path!r}", cause="is not a path of group names below the root")
    return name


def detached(name: str) -> str:
    """Where a container's group is in a tree that has no group of its pod."""
    return f"{DETACHED}/{name.rpartition('/')[2]}"


def resolve_parent(cgroup_parent: str) -> str:
    """The path that a cgroup_parent names. "a-b.slice" is systemd's name for /a.slice/a-b.slice, "-.slice" for the root's.

    Raises InvalidArgument.
    """
    if "/" not in cgroup_parent and cgroup_parent.endswith(".slice"):
        return slice_path(cgroup_parent)
    return "/" + relative(cgroup_parent)


def slice_path(name: str) -> str:
    """systemd.slice(5): dashes in a slice's name say where in the tree it is."""
    stem = name.removesuffix(".slice")
    parts = stem.split("-")
    if not all(parts) or "\0" in name or "\n" in name:
        raise InvalidArgument(f"use cgroup parent {name!r}", cause="is not the name of a slice")
    return "".join(f"/{'-'.join(parts[:depth])}.slice" for depth in range(1, len(parts) + 1))


def own_path(text: str, hierarchy: Hierarchy) -> str:
    """The path of a process's group in a v1 tree, from the text of its /proc/PID/cgroup (lines "id:controllers:/path")."""
    wanted = hierarchy.controllers or frozenset({f"name={hierarchy.name}"})
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if wanted <= set(controllers.split(",")):
            return path.strip("/")
    return ""
