"""Mount options one by one: what the OCI runtime specification, config.md ("Linux mount options"), says of each."""

from __future__ import annotations

import pytest

from tare.handlers import options
from tare.launch import linux

RO, NOSUID, NODEV, NOEXEC = 1, 2, 4, 8
NOATIME, STRICT, FIELD = linux.MOUNT_ATTR_NOATIME, linux.MOUNT_ATTR_STRICTATIME, linux.MOUNT_ATTR_ATIME


@pytest.mark.parametrize(
    ("given", "attributes", "clear"),
    [
        ([], 0, 0),
        (["defaults", "async"], 0, 0),
        (["ro"], RO, 0),
        (["rw"], 0, RO),
        (["ro", "rw"], 0, RO),
        (["rw", "ro"], RO, 0),
        (["nosuid", "nodev", "noexec", "suid"], NODEV | NOEXEC, NOSUID),
        (["nosymfollow", "nodiratime"], 0x200080, 0),
        (["symfollow", "diratime"], 0, 0x200080),
        (["noatime"], NOATIME, FIELD),
        (["strictatime"], STRICT, FIELD),
        (["relatime"], 0, FIELD),
        (["noatime", "strictatime"], STRICT, FIELD),
        (["strictatime", "noatime"], NOATIME, FIELD),
        (["noatime", "relatime"], 0, FIELD),
        (["noatime", "atime"], 0, FIELD),
        (["strictatime", "atime"], STRICT, FIELD),
        (["strictatime", "nostrictatime"], 0, FIELD),
        (["noatime", "nostrictatime"], NOATIME, FIELD),
        (["noatime", "norelatime"], NOATIME, FIELD),
        (["relatime", "norelatime"], 0, FIELD),
        (["atime"], 0, FIELD),
        (["noatime", "ro"], NOATIME | RO, FIELD),
    ],
)
def test_attributes(given: list[str], attributes: int, clear: int) -> None:
    flags = options.parse(given)
    assert (flags.set, flags.clear) == (attributes, clear)
    recursive = options.parse([f"r{option}" for option in given if option not in options.NOTHING])
    assert (recursive.recursive_set, recursive.recursive_clear) == (attributes, clear)
    assert (recursive.set, recursive.clear) == (0, 0)


@pytest.mark.parametrize(
    ("given", "bind", "recursive"),
    [(["bind"], True, False), (["rbind"], True, True), (["rbind", "bind"], True, False), (["ro"], False, False)],
)
def test_binds(given: list[str], bind: bool, recursive: bool) -> None:
    flags = options.parse(given)
    assert (flags.bind, flags.recursive) == (bind, recursive)


def test_the_type_says_bind_too() -> None:
    assert options.of({"type": "bind", "destination": "/x"}).bind
    assert not options.of({"type": "tmpfs", "destination": "/x", "options": None}).bind


@pytest.mark.parametrize(
    ("option", "kind", "recursive"),
    [
        ("private", linux.MS_PRIVATE, False),
        ("rprivate", linux.MS_PRIVATE, True),
        ("rslave", linux.MS_SLAVE, True),
        ("rshared", linux.MS_SHARED, True),
        ("shared", linux.MS_SHARED, False),
        ("runbindable", linux.MS_UNBINDABLE, True),
    ],
)
def test_propagation(option: str, kind: int, recursive: bool) -> None:
    assert options.parse(["rbind", "private", option]).propagation == (kind, recursive)


def test_no_propagation_is_left_open() -> None:
    assert options.parse(["rbind", "ro"]).propagation is None


def test_file_system_options_stay_in_order() -> None:
    flags = options.parse(["size=64k", "ro", "mode=755", "newinstance", "gid=5=6", "rdefaults"])
    assert flags.data == (
        (b"size", b"64k"),
        (b"mode", b"755"),
        (b"newinstance", None),
        (b"gid", b"5=6"),
        (b"rdefaults", None),
    )
