"""Mount options of the OCI runtime specification (config.md, "Linux mount options"), as flags and file system data. Pure."""

from __future__ import annotations

import os

from tare.errors import InvalidArgument
from tare.launch import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

SETS = {
    "ro": linux.MOUNT_ATTR_RDONLY,
    "nosuid": linux.MOUNT_ATTR_NOSUID,
    "nodev": linux.MOUNT_ATTR_NODEV,
    "noexec": linux.MOUNT_ATTR_NOEXEC,
    "nodiratime": linux.MOUNT_ATTR_NODIRATIME,
    "nosymfollow": linux.MOUNT_ATTR_NOSYMFOLLOW,
    "noatime": linux.MOUNT_ATTR_NOATIME,
    "relatime": linux.MOUNT_ATTR_RELATIME,
    "strictatime": linux.MOUNT_ATTR_STRICTATIME,
}
CLEARS = {
    "rw": linux.MOUNT_ATTR_RDONLY,
    "suid": linux.MOUNT_ATTR_NOSUID,
    "dev": linux.MOUNT_ATTR_NODEV,
    "exec": linux.MOUNT_ATTR_NOEXEC,
    "diratime": linux.MOUNT_ATTR_NODIRATIME,
    "symfollow": linux.MOUNT_ATTR_NOSYMFOLLOW,
    "atime": linux.MOUNT_ATTR_NOATIME,
    "norelatime": linux.MOUNT_ATTR_RELATIME,
    "nostrictatime": linux.MOUNT_ATTR_STRICTATIME,
}
NOTHING = frozenset({"defaults", "async", "silent", "loud", "iversion", "noiversion"})
"""What a mount is anyway, or what makes no difference: file systems that count versions of inodes do so unasked."""
ACCESS_TIMES = linux.MOUNT_ATTR_ATIME
ACCESS_TIME_OPTIONS = frozenset({"noatime", "relatime", "strictatime", "atime", "norelatime", "nostrictatime"})
PROPAGATION = {
    "private": (linux.MS_PRIVATE, False),
    "rprivate": (linux.MS_PRIVATE, True),
    "slave": (linux.MS_SLAVE, False),
    "rslave": (linux.MS_SLAVE, True),
    "shared": (linux.MS_SHARED, False),
    "rshared": (linux.MS_SHARED, True),
    "unbindable": (linux.MS_UNBINDABLE, False),
    "runbindable": (linux.MS_UNBINDABLE, True),
}


class Flags:
    """What options come to. Attributes are MOUNT_ATTR_ bits; the recursive ones hold for submounts too; data are fsconfig settings."""

    __slots__ = (
        *("bind", "clear", "copy_up", "data", "idmap", "idmap_recursive", "propagation", "recursive"),
        *("recursive_clear", "recursive_set", "set"),
    )

    def __init__(self) -> None:
        self.bind = False
        self.recursive = False
        self.set = 0
        self.clear = 0
        self.recursive_set = 0
        self.recursive_clear = 0
        self.idmap = False
        self.idmap_recursive = False
        self.copy_up = False
        self.propagation: tuple[int, bool] | None = None
        self.data: tuple[tuple[bytes, bytes | None], ...] = ()


def of(mount: Mapping[str, Any]) -> Flags:
    """The options of an OCI mount; its type "bind" says what the option says."""
    flags = parse(mount.get("options") or ())
    flags.bind = flags.bind or mount.get("type") == "bind"
    return flags


def parse(options: Sequence[str]) -> Flags:
    """Options in order: of two that contradict, the later one holds. What is no flag is the file system's own."""
    flags = Flags()
    data: list[tuple[bytes, bytes | None]] = []
    for option in options:
        if option in ("bind", "rbind"):
            flags.bind, flags.recursive = True, option == "rbind"
        elif option in NOTHING:
            continue
        elif option == "remount":
            raise InvalidArgument(
                "make a container", cause="`remount`: a container's mounts are made once, with their flags"
            )
        elif option in ("idmap", "ridmap"):
            flags.idmap, flags.idmap_recursive = True, option == "ridmap"
        elif option == "tmpcopyup":
            flags.copy_up = True
        elif option in PROPAGATION:
            flags.propagation = PROPAGATION[option]
        elif option in SETS or option in CLEARS:
            flags.set, flags.clear = change(flags.set, flags.clear, option)
        elif option[:1] == "r" and (option[1:] in SETS or option[1:] in CLEARS):
            flags.recursive_set, flags.recursive_clear = change(flags.recursive_set, flags.recursive_clear, option[1:])
        else:
            data.append(pair(option))
    flags.data = tuple(data)
    return flags


def change(set_bits: int, clear_bits: int, option: str) -> tuple[int, int]:
    """Apply one flag option.

    Access times are a field of three values, of which 0 is relatime, the kernel's own choice where none is named. The kernel
    wants the whole field cleared with whatever is set. `atime` and the like take back the option that they deny.
    """
    if option in ACCESS_TIME_OPTIONS:
        value = SETS.get(option, linux.MOUNT_ATTR_RELATIME)
        denied = CLEARS.get(option, linux.MOUNT_ATTR_RELATIME)
        if option in CLEARS and clear_bits & ACCESS_TIMES and set_bits & ACCESS_TIMES != denied:
            return set_bits, clear_bits
        return set_bits & ~ACCESS_TIMES | value, clear_bits | ACCESS_TIMES
    if option in SETS:
        return set_bits | SETS[option], clear_bits & ~SETS[option]
    return set_bits & ~CLEARS[option], clear_bits | CLEARS[option]


def pair(option: str) -> tuple[bytes, bytes | None]:
    """`key=value`, or a flag."""
    key, mark, value = option.partition("=")
    return encoded(key), encoded(value) if mark else None


def encoded(text: str) -> bytes:
    """As the kernel takes it. Raises InvalidArgument for what would be cut off at a zero byte."""
    if "\0" in text:
        raise InvalidArgument("make a container", cause=f"{text!r} has a NUL byte in it")
    return os.fsencode(text)
