"""Control groups of this machine: limits hold, everything in a group can be ended, and nothing of strangers is touched."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tare.cgroups.layout import detect
from tare.cgroups.manager import Cgroup, CgroupManager
from tare.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument
from tare.runtime.records import Resources
from tare.runtime.spec import DeviceNode, resources

pytestmark = pytest.mark.root

ROOT = Path("/sys/fs/cgroup")
NUMBERS = itertools.count()


@pytest.fixture(name="groups")
def _groups() -> Iterator[CgroupManager]:
    manager = CgroupManager()
    try:
        yield manager
    finally:
        manager.close()


@pytest.fixture(name="pod")
def _pod(groups: CgroupManager) -> Iterator[str]:
    """A pod's group, and the end of all in it."""
    path = f"/tare-test-{os.getpid()}-{next(NUMBERS)}"
    groups.make_parent_now(path)
    yield path
    for leaf in ("a", "b"):
        asyncio.run(groups.kill(f"{path}/{leaf}"))
        asyncio.run(groups.remove(f"{path}/{leaf}"))
    assert asyncio.run(groups.remove_parent(path))
    assert not groups.exists(path)


JOIN = """
import os, sys
for path in sys.argv[2].split(":"):
    open(path, "w").write("0")
os.close(int(sys.argv[1]))
os.execvp(sys.argv[3], sys.argv[3:])
"""


def run_in(group: Cgroup, *command: str) -> subprocess.Popen[bytes]:
    """A process that is in the group, in every tree, when this returns."""
    ours, theirs = os.pipe()
    try:
        arguments = [sys.executable, "-c", JOIN, str(theirs), ":".join(group.join), *command]
        process = subprocess.Popen(arguments, pass_fds=(theirs,))
    finally:
        os.close(theirs)
    try:
        assert os.read(ours, 1) == b""
    finally:
        os.close(ours)
    return process


def file_of(groups: CgroupManager, controller: str, path: str, file: str) -> str:
    """The content of a limit's file."""
    tree = groups.found.tree_of(controller)
    assert tree is not None
    return Path(f"{tree.directory}{path}/{file}").read_text().strip()


def await_processes(groups: CgroupManager, path: str, count: int) -> None:
    """Until so many are in the group; a child of a test says so itself by being there."""

    async def look() -> None:
        async with asyncio.timeout(20):
            while len(groups.processes(path)) < count:
                await asyncio.sleep(0.005)

    asyncio.run(look())


def end(groups: CgroupManager, path: str, *processes: subprocess.Popen[bytes]) -> list[int]:
    """Kill the group and say how its processes ended."""
    asyncio.run(groups.kill(path))
    return [process.wait(20) for process in processes]


def test_limits_are_in_the_kernels_files(groups: CgroupManager, pod: str) -> None:
    wanted = {
        "memory": {"limit": 64 << 20, "swap": 64 << 20},
        "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0", "mems": "0"},
        "pids": {"limit": 77},
        "hugepageLimits": [{"pageSize": "2MB", "limit": 2 << 20}],
    }
    group = groups.create(f"{pod}/a", wanted)
    assert group.skipped == ()
    assert group.path == f"{pod}/a"
    first = groups.layout != "v2"
    assert file_of(groups, "memory", f"{pod}/a", "memory.limit_in_bytes" if first else "memory.max") == str(64 << 20)
    assert file_of(groups, "pids", f"{pod}/a", "pids.max") == "77"
    assert file_of(groups, "cpuset", f"{pod}/a", "cpuset.cpus") == "0"
    if first:
        assert file_of(groups, "cpu", f"{pod}/a", "cpu.shares") == "512"
        assert file_of(groups, "cpu", f"{pod}/a", "cpu.cfs_quota_us") == "50000"
        assert file_of(groups, "memory", f"{pod}/a", "memory.memsw.limit_in_bytes") == str(64 << 20)
    hugetlb = groups.found.tree_of("hugetlb")
    if hugetlb is not None and hugetlb.version == 2:
        assert file_of(groups, "hugetlb", f"{pod}/a", "hugetlb.2MB.max") == str(2 << 20)


def test_a_process_joins_every_tree(groups: CgroupManager, pod: str) -> None:
    group = groups.create(f"{pod}/a", {})
    process = run_in(group, "sleep", "60")
    await_processes(groups, f"{pod}/a", 1)
    places = {line.split(":", 2)[2] for line in Path(f"/proc/{process.pid}/cgroup").read_text().splitlines()}
    assert end(groups, f"{pod}/a", process) == [-signal.SIGKILL]
    assert places == {f"{pod}/a"}


def test_a_v1_cpuset_has_its_parents_cpus(groups: CgroupManager, pod: str) -> None:
    groups.create(f"{pod}/a", {})
    tree = groups.found.tree_of("cpuset")
    if tree is None or tree.version == 2:
        assert groups.layout == "v2"
        return
    for file in ("cpuset.cpus", "cpuset.mems"):
        assert file_of(groups, "cpuset", f"{pod}/a", file) == Path(tree.directory, file).read_text().strip()


def test_a_strangers_empty_cpuset_is_filled_and_its_own_kept(groups: CgroupManager) -> None:
    tree = groups.found.tree_of("cpuset")
    if tree is None or tree.version == 2:
        assert groups.layout == "v2"
        return
    path = f"/tare-test-{os.getpid()}-{next(NUMBERS)}"
    stranger = Path(tree.directory + path)
    stranger.mkdir()
    try:
        (stranger / "cpuset.cpus").write_text("1" if (os.cpu_count() or 1) > 1 else "0")
        groups.create(f"{path}/a", {})
        assert (stranger / "a/cpuset.cpus").read_text() == (stranger / "cpuset.cpus").read_text()
        assert (stranger / "cpuset.mems").read_text().strip()
        asyncio.run(groups.remove(f"{path}/a"))
    finally:
        stranger.rmdir()


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"cpu": {"quota": 10}}, ("to '10", "Invalid argument")),
        ({"cpu": {"period": 10**7}}, ("10000000'", "Invalid argument")),
        ({"cpu": {"cpus": "4000"}}, ("cpuset.cpus", "to '4000'", "Numerical result out of range")),
        ({"cpu": {"cpus": "x"}}, ("cpuset.cpus", "to 'x'", "Invalid argument")),
        ({"cpu": {"mems": "900"}}, ("cpuset.mems", "to '900'")),
        ({"pids": {"limit": 1 << 40}}, ("pids.max", "Invalid argument")),
        ({"memory": {"limit": 1000}}, ("memory.limit", "less than a page")),
    ],
)
def test_absurd_limits_leave_nothing(
    groups: CgroupManager, wanted: Mapping[str, object], words: tuple[str, ...]
) -> None:
    path = f"/tare-test-{os.getpid()}-{next(NUMBERS)}"
    with pytest.raises(InvalidArgument) as caught:
        groups.create(f"{path}/a", {"pids": {"limit": 10}, **wanted})
    assert all(word in str(caught.value) for word in words)
    assert not groups.exists(f"{path}/a") and not groups.exists(path)


def test_a_hugepage_size_that_the_kernel_does_not_have_is_skipped_and_named(groups: CgroupManager, pod: str) -> None:
    group = groups.create(f"{pod}/a", {"hugepageLimits": [{"pageSize": "3MB", "limit": 1}]})
    assert len(group.skipped) == 1 and "3MB" in group.skipped[0]


def test_a_fork_bomb_is_bounded_and_ended(groups: CgroupManager, pod: str) -> None:
    group = groups.create(f"{pod}/a", {"pids": {"limit": 40}})
    code = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    bomb = run_in(group, sys.executable, "-c", code)
    await_processes(groups, f"{pod}/a", 30)
    assert end(groups, f"{pod}/a", bomb) == [-signal.SIGKILL]
    assert groups.processes(f"{pod}/a") == []


def test_processes_that_left_the_unified_tree_are_frozen_and_killed(groups: CgroupManager, pod: str) -> None:
    if groups.layout == "v2":
        return
    group = groups.create(f"{pod}/a", {"pids": {"limit": 40}})
    command = "while :; do sleep 60 & sleep 60; done"
    process = run_in(group, "sh", "-c", command)
    await_processes(groups, f"{pod}/a", 3)
    for pid in groups.processes(f"{pod}/a"):
        (ROOT / "unified/cgroup.procs").write_text(str(pid))
    assert end(groups, f"{pod}/a", process) == [-signal.SIGKILL]
    assert groups.processes(f"{pod}/a") == []


def test_a_frozen_group_can_be_killed(groups: CgroupManager, pod: str) -> None:
    group = groups.create(f"{pod}/a", {})
    process = run_in(group, "sleep", "60")
    await_processes(groups, f"{pod}/a", 1)
    if group.freezer_file is not None:
        Path(group.freezer_file).write_text("FROZEN")
    elif group.directory_v2 is not None:
        Path(group.directory_v2, "cgroup.freeze").write_text("1")
    assert end(groups, f"{pod}/a", process) == [-signal.SIGKILL]


def test_killing_waits_no_longer_than_it_is_told(groups: CgroupManager, pod: str) -> None:
    group = groups.create(f"{pod}/a", {})
    process = run_in(group, "sleep", "60")
    await_processes(groups, f"{pod}/a", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CgroupManager, "kill_now", lambda _self, _path: 1)
        with pytest.raises(DeadlineExceeded, match=str(process.pid)):
            asyncio.run(groups.kill(f"{pod}/a", timeout=0.05))
    assert end(groups, f"{pod}/a", process) == [-signal.SIGKILL]


def test_removing_says_who_is_in_it(groups: CgroupManager, pod: str) -> None:
    group = groups.create(f"{pod}/a", {})
    process = run_in(group, "sleep", "60")
    await_processes(groups, f"{pod}/a", 1)
    with pytest.raises(FailedPrecondition, match=f"PIDs {process.pid} are in it"):
        asyncio.run(groups.remove(f"{pod}/a", timeout=0.05))
    assert end(groups, f"{pod}/a", process) == [-signal.SIGKILL]


def test_a_zombie_does_not_keep_a_group(groups: CgroupManager, pod: str) -> None:
    group = groups.create(f"{pod}/a", {})
    process = run_in(group, "sleep", "60")
    await_processes(groups, f"{pod}/a", 1)
    asyncio.run(groups.kill(f"{pod}/a"))
    asyncio.run(groups.remove(f"{pod}/a"))
    assert not groups.exists(f"{pod}/a")
    assert process.wait(20) == -signal.SIGKILL


def test_groups_made_inside_go_bottom_up_and_neighbours_stay(groups: CgroupManager, pod: str) -> None:
    groups.create(f"{pod}/a", {})
    groups.create(f"{pod}/b", {})
    for tree in groups.hierarchies:
        os.makedirs(f"{tree.directory}{pod}/a/init.scope/deeper")
        os.makedirs(f"{tree.directory}{pod}/a/system.slice")
    asyncio.run(groups.remove(f"{pod}/a"))
    assert not groups.exists(f"{pod}/a") and groups.exists(f"{pod}/b")
    assert asyncio.run(groups.remove_parent(pod)) is False
    asyncio.run(groups.remove(f"{pod}/a"))


def test_a_strangers_pod_group_is_neither_completed_nor_removed(groups: CgroupManager) -> None:
    path = f"/tare-test-{os.getpid()}-{next(NUMBERS)}"
    tree = groups.hierarchies[min(2, len(groups.hierarchies) - 1)]
    stranger = Path(tree.directory + path)
    stranger.mkdir()
    try:
        assert groups.make_parent_now(path) is False
        group = groups.create(f"{path}/a", {"pids": {"limit": 9}})
        assert (stranger / "a").is_dir()
        assert [other for other in groups.hierarchies if Path(other.directory + path).exists()] == [tree]
        process = run_in(group, "sleep", "60")
        await_processes(groups, f"{path}/a", 1)
        assert groups.exists(f"{path}/a")
        assert groups.open(f"{path}/a") == group
        assert end(groups, f"{path}/a", process) == [-signal.SIGKILL]
        asyncio.run(groups.remove(f"{path}/a"))
        assert not groups.exists(f"{path}/a")
        assert stranger.is_dir()
        for other in groups.hierarchies:
            shared = Path(other.directory, "tare-detached")  # which another daemon may have groups in
            assert not (shared / "a").exists()
            assert not shared.exists() or any(entry.is_dir() for entry in shared.iterdir())
    finally:
        stranger.rmdir()


def test_oom_kills_are_counted(groups: CgroupManager, pod: str) -> None:
    group = groups.create(f"{pod}/a", {"memory": {"limit": 48 << 20, "swap": 48 << 20}})
    assert groups.oom_kills(f"{pod}/a") == 0
    glutton = run_in(group, sys.executable, "-c", "x = [bytes(1 << 20) + b'x' * (1 << 20) for _ in range(4000)]")
    assert glutton.wait(60) == -signal.SIGKILL
    assert groups.oom_kills(f"{pod}/a") == 1


@pytest.mark.parametrize("privileged", [False, True])
def test_the_device_cgroup(groups: CgroupManager, pod: str, tmp_path: Path, privileged: bool) -> None:
    """Nodes may be made of any device, and opened only if it is allowed."""
    allowed = (DeviceNode(path="/dev/x", kind="c", major=1, minor=11, access="r"),)
    group = groups.create(f"{pod}/a", resources(Resources(), allowed, privileged=privileged))
    assert "devices" not in group.skipped
    report = device_report(group, tmp_path)
    assert report["null"] == "rw" and report["mknod"] == "yes"
    assert report["kmsg"] == ("rw" if privileged else "r")
    assert report["tun"] == ("rw" if privileged else "")


def device_report(group: Cgroup, where: Path) -> dict[str, str]:
    """What a process of the group can open: /dev/null, and nodes of kmsg (1:11) and tun (10:200)."""
    script = """
import os, stat, sys
for path in sys.argv[1].split(":"): open(path, "w").write("0")
where = sys.argv[2]
def tries(path):
    found = ""
    for letter, flag in (("r", os.O_RDONLY), ("w", os.O_WRONLY)):
        try: os.close(os.open(path, flag | os.O_NONBLOCK)); found += letter
        except PermissionError: pass
    return found
print("null", tries("/dev/null"))
for name, major, minor in (("kmsg", 1, 11), ("tun", 10, 200)):
    os.mknod(where + "/" + name, 0o600 | stat.S_IFCHR, os.makedev(major, minor))
    print(name, tries(where + "/" + name))
print("mknod yes")
"""
    command = [sys.executable, "-c", script, ":".join(group.join), str(where)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return dict(line.partition(" ")[::2] for line in done.stdout.splitlines())


def test_warming_up_is_for_v1(groups: CgroupManager) -> None:
    before = Path("/proc/self/cgroup").read_text()
    assert groups.warm() is (groups.layout != "v2")
    assert Path("/proc/self/cgroup").read_text() == before


def unified() -> str:
    """This machine's v2 tree."""
    found = detect().unified
    assert found is not None
    return found.directory


def test_the_unified_tree_by_itself_is_v2(tmp_path: Path) -> None:
    groups = CgroupManager(unified())
    path = f"/tare-test-{os.getpid()}-{next(NUMBERS)}"
    try:
        assert groups.layout == "v2"
        assert groups.make_parent_now(path) is True
        wanted = {"hugepageLimits": [{"pageSize": "2MB", "limit": 0}], "memory": {"limit": 1 << 20}}
        group = groups.create(f"{path}/a", {**wanted, "devices": resources(Resources())["devices"]})
        assert ("memory" in group.skipped) is ("memory" not in groups.controllers)
        assert file_of(groups, "hugetlb", f"{path}/a", "hugetlb.2MB.max") == "0"
        assert group.join == (f"{groups.hierarchies[0].directory}{path}/a/cgroup.procs",)
        if "devices" not in detect().controllers:
            assert device_report(group, tmp_path)["tun"] == ""
        process = run_in(group, "sh", "-c", "sleep 60 & sleep 60")
        await_processes(groups, f"{path}/a", 2)
        assert end(groups, f"{path}/a", process) == [-signal.SIGKILL]
    finally:
        asyncio.run(groups.kill(f"{path}/a"))
        asyncio.run(groups.remove(f"{path}/a"))
        assert asyncio.run(groups.remove_parent(path))
        groups.close()


def test_the_v2_device_program_decides(tmp_path: Path) -> None:
    """Also beside v1's device cgroup, which must agree: what is looked at is allowed there."""
    groups = CgroupManager(unified())
    path = f"/tare-test-{os.getpid()}-{next(NUMBERS)}"
    try:
        allowed = (DeviceNode(path="/dev/x", kind="c", major=1, minor=11, access="r"),)
        group = groups.create(f"{path}/a", {"devices": resources(Resources(), allowed)["devices"]})
        assert group.skipped == ()
        report = device_report(group, tmp_path)
        assert (report["null"], report["kmsg"], report["tun"]) == ("rw", "r", "")
    finally:
        asyncio.run(groups.remove(f"{path}/a"))
        assert asyncio.run(groups.remove_parent(path))
        groups.close()
