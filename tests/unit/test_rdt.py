"""Shares of cache and memory bandwidth: what is to be done for them, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tare.errors import FailedPrecondition, InvalidArgument
from tare.runtime.rdt import MOUNT_POINT, Share, check, check_existing, mounted_at, share

L3, MB = "L3:0=7f0;1=1f", "MB:0=20;1=70"


def of(group: str, *lines: str, make: bool, remove: bool, monitor: str = "") -> Share:
    return Share(group=group, lines=lines, make=make, remove=remove, monitor=monitor)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, of("/r/abc", make=True, remove=True)),
        ({"l3CacheSchema": L3}, of("/r/abc", L3, make=True, remove=True)),
        ({"memBwSchema": MB, "l3CacheSchema": L3}, of("/r/abc", L3, MB, make=True, remove=True)),
        ({"closID": "gold"}, of("/r/gold", make=False, remove=False)),
        ({"closID": "gold", "schemata": [MB, "L2:0=f"]}, of("/r/gold", MB, "L2:0=f", make=True, remove=False)),
        ({"closID": "gold", "schemata": ["L2:0=f"], "memBwSchema": MB}, of("/r/gold", MB, "L2:0=f", make=True, remove=False)),
        ({"closID": "/"}, of("/r", make=False, remove=False)),
        ({"closID": "/", "enableMonitoring": True}, of("/r", make=False, remove=False, monitor="/r/mon_groups/abc")),
        ({"enableMonitoring": True, "enableCMT": True}, of("/r/abc", make=True, remove=True, monitor="/r/abc/mon_groups/abc")),
    ],
)  # fmt: skip
def test_shares(wanted: Mapping[str, object], expected: Share) -> None:
    assert share(wanted, "abc", "/r") == expected


@pytest.mark.parametrize(
    ("wanted", "path"),
    [
        ({"closID": ".."}, "closID"),
        ({"closID": "a/b"}, "closID"),
        ({"closID": "info"}, "closID"),
        ({"closID": 5}, "closID"),
        ({"l3CacheSchema": "L3:0=f\nMB:0=1"}, "l3CacheSchema"),
        ({"memBwSchema": "L3:0=f"}, "memBwSchema"),
        ({"schemata": "L3:0=f"}, "schemata"),
        ({"schemata": [""]}, r"schemata\[0\]"),
        ({"schemata": ["a", "b\nc"]}, r"schemata\[1\]"),
        ({"enableMonitoring": 1}, "enableMonitoring"),
        ({"enableCMT": "yes"}, "enableCMT"),
    ],
)
def test_what_is_wrong(wanted: Mapping[str, object], path: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"linux\.intelRdt\.{path}: "):
        share(wanted, "abc", None)


def test_where_there_is_none() -> None:
    assert check(None, "abc", None) is None
    assert check({}, "abc", "/r") is not None
    with pytest.raises(FailedPrecondition, match="no resctrl file system is mounted on this node"):
        check({"closID": "gold"}, "abc", None)
    with pytest.raises(InvalidArgument):
        check([], "abc", "/r")


SCHEMATA = "    MB:0=20;1=70\n    L3:0=7f0;1=01f\n"


@pytest.mark.parametrize(
    ("wanted", "found", "words"),
    [
        ({"closID": "gold"}, SCHEMATA, ""),
        ({"closID": "gold"}, None, "it does not exist"),
        ({"closID": "gold", "l3CacheSchema": "L3:1=1F"}, SCHEMATA, ""),
        ({"closID": "gold", "l3CacheSchema": L3, "memBwSchema": MB}, SCHEMATA, ""),
        ({"closID": "gold", "l3CacheSchema": L3}, None, ""),
        ({"closID": "gold", "l3CacheSchema": "L3:0=f"}, SCHEMATA, "does not say 'L3:0=f'"),
        ({"closID": "gold", "schemata": ["L2:0=f"]}, SCHEMATA, "does not say 'L2:0=f'"),
        ({}, None, ""),
        ({}, SCHEMATA, "it exists already"),
    ],
)
def test_classes_that_exist(wanted: Mapping[str, object], found: str | None, words: str) -> None:
    asked = share(wanted, "abc", "/r")
    if words:
        with pytest.raises(FailedPrecondition, match=words):
            check_existing(asked, found)
    else:
        check_existing(asked, found)


def test_where_it_is_mounted() -> None:
    line = f"30 20 0:30 / {MOUNT_POINT} rw,nosuid shared:5 - resctrl resctrl rw"
    assert mounted_at(f"29 20 0:29 / /x rw - tmpfs resctrl rw\n{line}\n") == MOUNT_POINT
    assert mounted_at("29 20 0:29 / /x rw - tmpfs resctrl rw\nbroken") is None
