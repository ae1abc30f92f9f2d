"""Which layout mountinfo describes."""

from __future__ import annotations

import pytest

from tare.cgroups import layout
from tare.errors import FailedPrecondition

ROOT = "/sys/fs/cgroup"
PURE = "29 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
TMPFS = "30 23 0:25 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,size=4096k,mode=755\n"
COMOUNTED = (
    "31 30 0:27 / /sys/fs/cgroup/systemd rw shared:10 - cgroup cgroup rw,xattr,name=systemd\n"
    "32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:11 - cgroup cgroup rw,cpu,cpuacct\n"
    "33 30 0:29 / /sys/fs/cgroup/cpuset rw shared:12 - cgroup cgroup rw,cpuset\n"
    "34 30 0:30 / /sys/fs/cgroup/memory rw shared:13 - cgroup cgroup rw,memory\n"
    "35 30 0:31 / /sys/fs/cgroup/freezer rw shared:14 - cgroup cgroup rw,freezer\n"
)
UNIFIED = "36 30 0:32 / /sys/fs/cgroup/unified rw shared:15 - cgroup2 cgroup2 rw,nsdelegate\n"
ELSEWHERE = "40 23 0:40 / /mnt/cgroup rw - cgroup cgroup rw,net_cls\n41 23 0:41 / /proc rw - proc proc rw\n"


def controllers(directory: str) -> str:
    return {ROOT: "cpuset cpu io memory hugetlb pids rdma misc\n", f"{ROOT}/unified": "hugetlb\n"}[directory]


def test_pure_v2() -> None:
    found = layout.parse(ELSEWHERE + PURE, ROOT, controllers)
    assert found.kind == "v2"
    assert [tree.directory for tree in found.hierarchies] == [ROOT]
    assert found.missing == ()
    assert layout.container_mounts(found) == (layout.ContainerMount(name="", kind="cgroup2", options=""),)


def test_v1_lists_what_is_missing() -> None:
    found = layout.parse(TMPFS + COMOUNTED + ELSEWHERE, ROOT, controllers)
    assert found.kind == "v1"
    assert found.unified is None
    assert found.missing == ("pids", "devices", "hugetlb", "blkio")
    assert "net_cls" not in found.controllers


def test_hybrid_joins_cpuset_late_and_the_unified_tree_last() -> None:
    found = layout.parse(TMPFS + COMOUNTED + UNIFIED, ROOT, controllers)
    assert found.kind == "hybrid"
    names = [tree.directory.removeprefix(f"{ROOT}/") for tree in found.hierarchies]
    assert names == ["freezer", "memory", "cpu,cpuacct", "systemd", "cpuset", "unified"]
    assert "hugetlb" not in found.missing


def test_how_a_container_sees_v1() -> None:
    mounts = {item.name: item for item in layout.container_mounts(layout.parse(TMPFS + COMOUNTED, ROOT, controllers))}
    assert mounts["systemd"].options == "none,name=systemd"
    assert mounts["cpu,cpuacct"].options == "cpu,cpuacct"
    assert mounts["cpu,cpuacct"].aliases == ("cpu", "cpuacct")
    assert mounts["memory"].aliases == ()


def test_what_is_mounted_over_the_root_hides_what_was_there() -> None:
    assert layout.parse(TMPFS + COMOUNTED + PURE, ROOT, controllers).kind == "v2"


def test_a_tree_mounted_twice_counts_once() -> None:
    again = "37 30 0:28 / /sys/fs/cgroup/cpu rw shared:11 - cgroup cgroup rw,cpu,cpuacct\n"
    found = layout.parse(TMPFS + COMOUNTED + again, ROOT, controllers)
    assert sum("cpu" in tree.controllers for tree in found.hierarchies) == 1


def test_escaped_mount_points() -> None:
    line = "29 23 0:26 / /tmp/a\\040b rw - cgroup2 none rw\n"
    found = layout.parse(line, "/tmp/a b", lambda directory: "pids" if directory == "/tmp/a b" else "")
    assert found.controllers == {"pids"}


def test_no_cgroups_at_all() -> None:
    with pytest.raises(FailedPrecondition, match="no cgroup file system is mounted at /sys/fs/cgroup"):
        layout.parse(ELSEWHERE + "nonsense\n", ROOT, controllers)
