"""ID mappings of an OCI runtime specification: of a container's user namespace, and of mounts. Pure.

Sources: OCI runtime specification 1.2, config-linux.md, "User namespace mappings", and config.md, "Linux" mounts; user_namespaces(7).
"""

from __future__ import annotations

from tare.errors import InvalidArgument
from tare.handlers.plans import Mappings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    Spec = Mapping[str, Any]
    Lines = tuple[tuple[int, int, int], ...]

MOST_LINES = 340
LARGEST = (1 << 32) - 1
MEMBERS = ("containerID", "hostID", "size")


def of(section: Spec, path: str) -> Mappings | None:
    """`uidMappings` and `gidMappings` of a section whose JSON path is given; None where it has neither. Raises InvalidArgument."""
    uid = lines(section.get("uidMappings"), f"{path}.uidMappings")
    gid = lines(section.get("gidMappings"), f"{path}.gidMappings")
    if bool(uid) != bool(gid):
        missing, there = ("gidMappings", "uidMappings") if uid else ("uidMappings", "gidMappings")
        raise wrong(f"{path}.{missing}", f"there is none, but {there}: both must be given")
    return Mappings(uid, gid) if uid else None


def lines(given: Sequence[Spec] | None, path: str) -> Lines:
    """One list of mappings. Raises InvalidArgument for what the kernel would refuse."""
    found: list[tuple[int, int, int]] = []
    for index, item in enumerate(given or ()):
        inside, outside, count = (item.get(key, 0) for key in MEMBERS)
        here = f"{path}[{index}]"
        for key, value in zip(MEMBERS, (inside, outside, count), strict=True):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST:
                raise wrong(f"{here}.{key}", f"{value!r} is no number from 0 to {LARGEST}")
        if not count or inside + count > LARGEST or outside + count > LARGEST:
            raise wrong(f"{here}.size", f"{count} leads to nothing, or past the last ID")
        found.append((inside, outside, count))
    if len(found) > MOST_LINES:
        raise wrong(path, f"has {len(found)} mappings; the kernel takes {MOST_LINES}")
    for side, name in ((0, MEMBERS[0]), (1, MEMBERS[1])):
        ordered = sorted((line[side], line[2]) for line in found)
        free = 0
        for first, count in ordered:
            if first < free:
                raise wrong(path, f"{name} {first} is in two of the mappings")
            free = first + count
    return tuple(found)


def covers(mapping: Lines, number: int) -> bool:
    """Whether an ID of the container has one on the node."""
    return any(first <= number < first + count for first, _, count in mapping)


def wrong(path: str, cause: str) -> InvalidArgument:
    """An error about one member."""
    return InvalidArgument(f"read {path}", cause=cause)
