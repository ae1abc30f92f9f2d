"""Shares of cache and memory bandwidth: what is to be done for them, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tare.errors import FailedPrecondition, InvalidArgument
from tare.handlers import rdt
from tare.handlers.rdt import MOUNT_POINT, Share, check_existing, mounted_at, share

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
        ({"closID": "gold", "enableMBM": True}, of("/r/gold", make=False, remove=False, monitor="/r/gold/mon_groups/abc")),
        ({"enableCMT": False, "enableMBM": False}, of("/r/abc", make=True, remove=True)),
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
    with pytest.raises(FailedPrecondition, match="no resctrl file system is mounted on this node"):
        share({"closID": "gold"}, "abc", None)


def test_what_a_configuration_asks_for(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text("30 20 0:30 / /r rw shared:5 - resctrl resctrl rw\n")
    assert rdt.of({}, "abc", "/not/looked/at") is None
    assert rdt.of({"linux": {"intelRdt": None}}, "abc", "/not/looked/at") is None
    found = rdt.of({"linux": {"intelRdt": {"enableCMT": True}}}, "abc", str(mountinfo))
    assert found is not None and found.joins == ("/r/abc/tasks", "/r/abc/mon_groups/abc/tasks")
    with pytest.raises(InvalidArgument, match=r"read linux\.intelRdt: is not an object"):
        rdt.of({"linux": {"intelRdt": []}}, "abc", str(mountinfo))


def test_groups_are_made_and_go(tmp_path: Path) -> None:
    """As far as plain directories can tell: a class that is there is used as it is and stays, the container's own counters come and go."""
    group = tmp_path / "gold"
    (group / "mon_groups").mkdir(parents=True)
    (group / "schemata").write_text(SCHEMATA)
    wanted = share({"closID": "gold", "l3CacheSchema": "L3:1=1F", "enableMonitoring": True}, "abc", str(tmp_path))
    rdt.apply(wanted)
    assert (group / "mon_groups/abc").is_dir() and (group / "schemata").read_text() == SCHEMATA
    with pytest.raises(FailedPrecondition, match="File exists"):
        rdt.apply(wanted)
    assert (group / "mon_groups/abc").is_dir()
    rdt.remove(wanted)
    rdt.remove(wanted)
    assert not (group / "mon_groups/abc").exists() and (group / "schemata").exists()


def test_a_class_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    """A schema that is not taken (here there is no file to take it), with the words that the kernel leaves."""
    (tmp_path / "info").mkdir()
    (tmp_path / "info/last_cmd_status").write_text("Invalid schema\n")
    wanted = share({"l3CacheSchema": "L3:0=zzz"}, "abc", str(tmp_path))
    with pytest.raises(FailedPrecondition, match="schemata: Invalid schema"):
        rdt.apply(wanted)
    assert not (tmp_path / "abc").exists()


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
