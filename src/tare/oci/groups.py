"""A container's control group: which one its configuration names, what is allowed in it, and the machine's trees, opened once."""

from __future__ import annotations

import time

from tare.cgroups.core import Cgroup, Groups
from tare.errors import DeadlineExceeded, FailedPrecondition, NotFound
from tare.handlers.shapes import InvalidConfig
from tare.oci import logs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

PREFIX = "/tare-oci-"
END_SECONDS, FIRST_DELAY, SLOWEST = 10.0, 0.0005, 0.02
# config-linux.md, "Default Devices", and terminals: what may be used in every container.
DEFAULT_DEVICES = (
    *(("c", 1, minor, "rwm") for minor in (3, 5, 7, 8, 9)),
    ("c", 5, 0, "rwm"),
    ("c", 5, 1, "rwm"),
    ("c", 5, 2, "rwm"),
    ("c", 136, -1, "rwm"),
    ("c", -1, -1, "m"),
    ("b", -1, -1, "m"),
)
_tree: list[Groups] = []


def tree() -> Groups:
    """The machine's control groups. Raises FailedPrecondition where there are none."""
    if not _tree:
        _tree.append(Groups(warn=logs.warning))
    return _tree[0]


def path_of(config: Mapping[str, Any], container_id: str) -> str:
    """The path below the trees' roots that a configuration names; a relative one is below them too, and without one it is the container's own."""
    text = (config.get("linux") or {}).get("cgroupsPath") or ""
    if ":" in text:
        hint = "slice:prefix:name is for --systemd-cgroup"
        raise InvalidConfig("linux.cgroupsPath", f"{text!r} is not a path ({hint})")
    path = "/" + "/".join(part for part in text.split("/") if part not in ("", "."))
    return path if path != "/" else f"{PREFIX}{container_id}"


def resources_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """linux.resources, with the devices that every container may use; where it names no rule, only those may be used."""
    resources = dict((config.get("linux") or {}).get("resources") or {})
    given = list(resources.get("devices") or ({"allow": False, "access": "rwm"},))
    defaults = [
        {
            "allow": True,
            "type": kind,
            "access": access,
            **({"major": major} if major >= 0 else {}),
            **({"minor": minor} if minor >= 0 else {}),
        }
        for kind, major, minor, access in DEFAULT_DEVICES
    ]
    resources["devices"] = given + defaults
    return resources


def expected(path: str) -> Cgroup:
    """The container's group as it is going to be, unless the group above it is missing in some tree."""
    return tree().expected(path)


def make(config: Mapping[str, Any], path: str) -> Cgroup:
    """The container's group with its limits. Raises as `Groups.create`, and FailedPrecondition where somebody is in it."""
    groups = tree()
    groups.check_free(path)
    groups.even_out(path)
    return groups.create(path, resources_of(config))


def joins(group: Cgroup) -> tuple[str, ...]:
    """The cgroup.procs files that a process writes itself into."""
    return group.join


def hierarchies() -> tuple[tuple[tuple[str, tuple[str, ...]], ...], str]:
    """What a container's /sys/fs/cgroup shows: (folder, mount options) of each v1 tree, and v2's folder beside them."""
    groups = tree()
    if groups.layout == "v2":
        return (), ""
    first = tuple(
        (found.directory.rpartition("/")[2], tuple(found.options.split(",")))
        for found in groups.hierarchies
        if found.version == 1
    )
    unified = [found.directory.rpartition("/")[2] for found in groups.hierarchies if found.version == 2]
    return first, unified[0] if unified else ""


def folders(group: Cgroup) -> dict[str, str]:
    """The container's own directory in each tree, by folder; one that is not at its usual path is left out."""
    if tree().layout == "v2":
        return {}
    tail = f"{group.path}/cgroup.procs"
    tops = (join.removesuffix(tail) for join in group.join if join.endswith(tail))
    return {top.rpartition("/")[2]: top + group.path for top in tops}


def kill(path: str, seconds: float = END_SECONDS) -> None:
    """SIGKILL all that is in a group, until nothing is. Raises DeadlineExceeded."""
    groups = tree()
    deadline, delay = time.monotonic() + seconds, FIRST_DELAY
    while groups.kill_now(path):
        if time.monotonic() > deadline:
            left = ", ".join(map(str, groups.processes(path)[:20]))
            raise DeadlineExceeded(f"kill the processes of cgroup {path}", cause=f"PIDs {left} do not end")
        time.sleep(delay)
        delay = min(delay * 2, SLOWEST)


def remove(path: str, seconds: float = END_SECONDS) -> None:
    """Remove a group, once what has ended in it is gone. Idempotent. Raises DeadlineExceeded."""
    groups = tree()
    deadline, delay = time.monotonic() + seconds, FIRST_DELAY
    while not groups.remove_now(path):
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"remove cgroup {path}", cause="something in it is busy")
        time.sleep(delay)
        delay = min(delay * 2, SLOWEST)


def vanished(path: str) -> bool:
    """Whether a group is gone, after one attempt at removing it: it goes at once where nothing is in it any more."""
    return tree().remove_now(path)


def members(path: str) -> list[int]:
    """PIDs in a group and below it."""
    return tree().processes(path)


def thaw(path: str) -> None:
    """Let a frozen group go on, so that what is in it can die. One that is not there, or cannot freeze, is passed over."""
    groups = tree()
    try:
        if groups.frozen(path):
            groups.thaw_now(path)
    except (NotFound, FailedPrecondition):
        return
