"""Image volumes and the directories that an image declares, from an OCI runtime specification to launch steps. Pure.

An image volume is a mount of type "overlay" that has lower directories alone:

    {"destination": "/models", "type": "overlay", "source": "overlay", "options": ["ro", "lowerdir=<top>:<…>:<bottom>"], "subPath": "v1"}

Any runtime can make that, but for two things that Tare does itself: `subPath`, its own field, is what to show of the union (links in
it lead nowhere outside of the image), and a single lower directory, which overlayfs refuses, is bound.
"""

from __future__ import annotations

from tare.errors import InvalidArgument
from tare.handlers.options import Flags, encoded
from tare.launch import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from tare.launch.plan import Step

LOWER = b"lowerdir"


def joined(lowers: Sequence[str]) -> str:
    """The option of these directories, top first, with colons and backslashes escaped as overlayfs reads them."""
    return "lowerdir=" + ":".join(path.replace("\\", "\\\\").replace(":", "\\:") for path in lowers)


def layers(mount: Mapping[str, Any], flags: Flags) -> tuple[bytes, ...]:
    """The directories of an image volume, top first; none where a mount is something else."""
    data = dict(flags.data)
    if mount.get("type") != "overlay" or flags.bind or set(data) != {LOWER}:
        return ()
    return tuple(filter(None, parted(data[LOWER] or b"")))


def parted(text: bytes) -> list[bytes]:
    """The parts between colons; a backslash stands before a colon or backslash that is a path's own."""
    parts = [b""]
    left = iter(text.decode("latin-1"))
    for letter in left:
        if letter == ":":
            parts.append(b"")
        else:
            parts[-1] += (next(left, "") if letter == "\\" else letter).encode("latin-1")
    return parts


def union(slot: int, target: str, mount: Mapping[str, Any], flags: Flags, base: bytes) -> list[Step]:
    """The step that makes an image volume, detached, in its slot; none where a mount is something else. `base` is a mount point to borrow."""
    lowers = layers(mount, flags)
    if not lowers:
        return []
    if not flags.set & linux.MOUNT_ATTR_RDONLY:
        raise InvalidArgument(f"mount {target}", cause="an overlay without an upper directory must be read-only")
    sub_path = encoded(mount.get("subPath") or "")
    return [("union", f"mount {target}", slot, lowers, sub_path, flags.set | flags.recursive_set, base)]


def directories(paths: Sequence[str]) -> list[Step]:
    """Have these directories in the root file system, made where they are missing."""
    return [("directory", f"make the image's volume {path}", encoded(path)) for path in paths]
