"""What puts a file's value back, the steps from one v1 device list to another, and checks before an update."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tare.cgroups import devices
from tare.cgroups.layout import Hierarchy, Layout
from tare.cgroups.manager import CgroupManager
from tare.cgroups.section import Section
from tare.cgroups.writes import Write, previous, putting_back
from tare.errors import FailedPrecondition, InvalidArgument, NotFound

IO_MAX = "8:16 rbps=2097152 wbps=max riops=max wiops=120\n8:32 rbps=1 wbps=max riops=max wiops=max\n"


@pytest.mark.parametrize(
    ("file", "value", "text", "expected"),
    [
        ("memory.max", "4096", "max\n", "max"),
        ("cpu.max", "1000 100000", "max 100000\n", "max 100000"),
        ("cpuset.cpus", "0", "\n", "\n"),
        ("memory.oom_control", "1", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", "0"),
        ("io.max", "8:16 rbps=1", IO_MAX, "8:16 rbps=2097152 wbps=max riops=max wiops=120"),
        ("io.max", "8:1 rbps=1", IO_MAX, "8:1 rbps=max wbps=max riops=max wiops=max"),
        ("io.weight", "200", "default 100\n8:0 300\n", "default 100"),
        ("io.weight", "8:0 200", "default 100\n8:0 300\n", "8:0 300"),
        ("io.weight", "8:1 200", "default 100\n8:0 300\n", "8:1 default"),
        ("blkio.bfq.weight", "200", "100\n", "100"),
        ("blkio.throttle.read_bps_device", "8:0 5", "", "8:0 0"),
        ("blkio.throttle.read_bps_device", "8:0 5", "8:0 7\n", "8:0 7"),
        ("rdma.max", "mlx4_0 hca_handle=2", "", "mlx4_0 hca_handle=max hca_object=max"),
        ("net_prio.ifpriomap", "lo 3", "lo 0\neth0 5\n", "lo 0"),
    ],
)
def test_what_a_file_held(file: str, value: str, text: str, expected: str) -> None:
    assert previous(file, value, text) == expected


def test_a_file_that_says_nothing_is_not_put_back() -> None:
    assert putting_back(Write("memory", "memory.oom_control", "1"), "") is None
    assert putting_back(Write("pids", "pids.max", "1", "refuse"), "5") == Write("pids", "pids.max", "5", "ignore")


def rules(*entries: tuple[bool, str, int | None, int | None, str]) -> tuple[devices.Rule, ...]:
    """(allow, type, major, minor, access) each."""
    keys = ("allow", "type", "major", "minor", "access")
    return devices.parse([Section("rule", dict(zip(keys, entry, strict=True))) for entry in entries])


NOTHING = (False, "a", None, None, "rwm")
NULL = (True, "c", 1, 3, "rwm")
TUN = (True, "c", 10, 200, "rw")


@pytest.mark.parametrize(
    ("listed", "wanted", "expected"),
    [
        ("c 1:3 rwm\n", (NOTHING, NULL), []),
        ("c 1:3 rwm\n", (NOTHING, NULL, TUN), [("devices.allow", "c 10:200 rw")]),
        ("c 1:3 rwm\nc 10:200 rwm\n", (NOTHING, NULL, TUN), [("devices.deny", "c 10:200 m")]),
        ("c 1:3 r\nc 10:200 rwm\n", (NOTHING, NULL), [("devices.allow", "c 1:3 wm"), ("devices.deny", "c 10:200 rwm")]),
        ("a *:* rwm\n", (NOTHING, NULL), [("devices.deny", "a"), ("devices.allow", "c 1:3 rwm")]),
        ("a *:* rwm\n", ((True, "a", None, None, "rwm"),), []),
        ("c 1:3 rwm\n", ((True, "a", None, None, "rwm"),), [("devices.allow", "a")]),
        (
            "a *:* rwm\n",
            ((True, "a", None, None, "rwm"), (False, "b", 8, 0, "w")),
            [("devices.allow", "a"), ("devices.deny", "b 8:0 w")],
        ),
        ("", (NOTHING, (True, "a", 5, None, "m")), [("devices.allow", "b 5:* m"), ("devices.allow", "c 5:* m")]),
        ("", (NOTHING, NULL, (False, "c", 1, 3, "w")), [("devices.allow", "c 1:3 rm")]),
    ],
)
def test_from_one_list_of_devices_to_another(
    listed: str, wanted: tuple[tuple[bool, str, int | None, int | None, str], ...], expected: list[tuple[str, str]]
) -> None:
    assert devices.change(listed, rules(*wanted)) == expected


def test_back_to_a_list_of_devices() -> None:
    now, before = "c 1:3 rwm\nc 10:200 rw\n", "c 1:3 rwm\nc 1:5 r\n"
    assert devices.change_back(now, before) == [("devices.allow", "c 1:5 r"), ("devices.deny", "c 10:200 rw")]


def second_version(root: Path, **files: str) -> CgroupManager:
    """A v2 tree of plain files, with a group "abc" in it."""
    common = {"cgroup.controllers": "memory pids cpu\n", "cgroup.subtree_control": "memory pids cpu\n"}
    for directory in (root, root / "abc"):
        directory.mkdir(exist_ok=True)
        for name, text in common.items():
            (directory / name).write_text(text)
    for name, text in files.items():
        (root / "abc" / name.replace("_", ".")).write_text(text)
    tree = Hierarchy(directory=str(root), version=2, controllers=frozenset({"memory", "pids", "cpu"}))
    return CgroupManager(str(root), Layout(kind="v2", hierarchies=(tree,)))


@pytest.mark.parametrize(
    ("swap", "used", "swapped", "words"),
    [
        (None, 5000, "0", "its processes use 5000 bytes"),
        (8192, 4096, "4097", "its processes use 8193 bytes of memory and swap, and 8192 are to be allowed"),
        (8192, 4096, "4096", ""),
        (8192, 4096, None, ""),
        (None, 4096, None, ""),
    ],
)
def test_a_limit_below_what_is_used(
    tmp_path: Path, swap: int | None, used: int, swapped: str | None, words: str
) -> None:
    files = {"memory_max": "max", "memory_swap_max": "max", "memory_current": f"{used}\n"}
    if swapped is not None:
        files["memory_swap_current"] = swapped
    groups = second_version(tmp_path, **files)
    wanted = {"limit": 4096, "checkBeforeUpdate": True} | ({"swap": swap} if swap else {})
    try:
        if words:
            with pytest.raises(FailedPrecondition, match=words):
                groups.update_now("/abc", {"memory": wanted})
            assert (tmp_path / "abc/memory.max").read_text() == "max"
        else:
            groups.update_now("/abc", {"memory": wanted})
            # These plain files are not cut off by a shorter value.
            assert (tmp_path / "abc/memory.max").read_text().startswith("4096")
    finally:
        groups.close()


def test_a_refused_value_has_those_before_it_put_back(tmp_path: Path) -> None:
    groups = second_version(tmp_path, memory_max="10000", pids_max="77")
    (tmp_path / "abc/cpu.weight").mkdir()
    try:
        with pytest.raises(InvalidArgument, match=r"set cpu.weight of cgroup /abc to '100': Is a directory"):
            groups.update_now("/abc", {"memory": {"limit": 20000}, "cpu": {"shares": 1024}, "pids": {"limit": 99}})
        assert (tmp_path / "abc/memory.max").read_text() == "10000"
        assert (tmp_path / "abc/pids.max").read_text() == "77"
        with pytest.raises(NotFound, match="update cgroup /abd: it does not exist"):
            asyncio.run(groups.update("/abd", {}))
    finally:
        groups.close()
