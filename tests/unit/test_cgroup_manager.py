"""Names of groups, and what the manager writes into a v2 tree (a directory tree of plain files that looks like one)."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import tare
from tare.cgroups.core import Groups, oom_count
from tare.cgroups.kills import Kills
from tare.cgroups.layout import Hierarchy, Layout
from tare.cgroups.manager import CgroupManager
from tare.cgroups.names import own_path, relative, resolve_parent
from tare.errors import FailedPrecondition, InvalidArgument, NotFound

SOURCE = str(Path(tare.__file__).parents[1])
FILES = {
    "cgroup.controllers": "cpu cpuset memory pids\n",
    "cgroup.events": "populated 0\n",
    "cgroup.kill": "",
    "cgroup.procs": "",
    "cgroup.subtree_control": "",
    "cpu.max": "",
    "cpu.weight": "",
    "cpuset.cpus": "",
    "memory.events": "low 0\nhigh 0\nmax 12\noom 2\noom_kill 2\noom_group_kill 1\n",
    "memory.max": "",
    "memory.swap.max": "",
    "pids.max": "",
}


def fill(directory: Path, **other: str) -> None:
    """A directory as the kernel would have filled it."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        (directory / name).write_text(other.get(name.replace(".", "_"), content))


@contextmanager
def manager(root: Path, controllers: str = "cpu cpuset memory pids") -> Iterator[CgroupManager]:
    tree = Hierarchy(directory=str(root), version=2, controllers=frozenset(controllers.split()))
    found = CgroupManager(str(root), Layout(kind="v2", hierarchies=(tree,)))
    try:
        yield found
    finally:
        found.close()


HEAVY = """
import os, sys
before = set(sys.modules)
import tare.cgroups.core
print(*sorted({name.partition(".")[0] for name in sys.modules.keys() - before}))
"""


def test_a_command_gets_groups_without_importing_anything_big() -> None:
    code = f"import sys; sys.path.append({SOURCE!r}){HEAVY}"
    told = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert set(told.stdout.split()) <= {"__future__", "tare", "errno", "math", "struct", "_struct"}


def test_limits_are_written_and_controllers_enabled_from_the_root_down(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "kubepods", tmp_path / "kubepods/pod1", tmp_path / "kubepods/pod1/abc"):
        fill(directory)
    resources = {"memory": {"limit": 8192, "swap": 8192}, "cpu": {"shares": 1024, "quota": 1000}, "pids": {"limit": 5}}
    with manager(tmp_path) as groups:
        made = groups.create("/kubepods/pod1/abc", resources)
    leaf = tmp_path / "kubepods/pod1/abc"
    written = {
        name: (leaf / name).read_text()
        for name in ("memory.max", "memory.swap.max", "cpu.weight", "cpu.max", "pids.max")
    }
    assert written == {
        "memory.max": "8192",
        "memory.swap.max": "0",
        "cpu.weight": "100",
        "cpu.max": "1000",
        "pids.max": "5",
    }
    for above in (tmp_path, tmp_path / "kubepods", leaf.parent):
        assert (above / "cgroup.subtree_control").read_text() == "+cpu +cpuset +memory +pids"
    assert (leaf / "cgroup.subtree_control").read_text() == ""
    assert made.join == (f"{leaf}/cgroup.procs",)
    assert made.directory_v2 == str(leaf)
    assert made.oom_file == f"{leaf}/memory.events"
    assert made.kill_file == f"{leaf}/cgroup.kill"
    assert made.freezer_file is None


def test_controllers_that_are_enabled_are_left_alone(tmp_path: Path) -> None:
    fill(tmp_path)
    fill(tmp_path / "pod", cgroup_subtree_control="cpu cpuset memory pids\n")
    fill(tmp_path / "pod/abc")
    with manager(tmp_path) as groups:
        groups.create("/pod/abc", {})
    assert (tmp_path / "cgroup.subtree_control").read_text() == ""
    assert (tmp_path / "pod/cgroup.subtree_control").read_text() == "cpu cpuset memory pids\n"


def test_a_controller_that_the_ancestors_do_not_give_is_skipped_and_named(tmp_path: Path) -> None:
    fill(tmp_path)
    fill(tmp_path / "pod", cgroup_controllers="cpu pids\n")
    fill(tmp_path / "pod/abc", cgroup_controllers="cpu pids\n")
    (tmp_path / "pod/abc/memory.max").unlink()
    (tmp_path / "pod/abc/memory.swap.max").unlink()
    with manager(tmp_path) as groups:
        made = groups.create("/pod/abc", {"memory": {"limit": 8192}, "pids": {"limit": 5}})
        groups.create("/pod/abc", {"memory": {"limit": 8192}, "blockIO": {"weight": 100}})
        assert groups.skipped == {"memory": 2, "io": 1}
        with pytest.raises(FailedPrecondition, match="the groups above it do not give it the controller memory"):
            groups.update_now("/pod/abc", {"unified": {"memory.high": "1"}})
    assert made.skipped == ("memory",)
    assert (tmp_path / "pod/cgroup.subtree_control").read_text() == "+cpu +pids"


def test_an_unknown_unified_key_is_an_error(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "abc"):
        fill(directory)
    with (
        manager(tmp_path) as groups,
        pytest.raises(InvalidArgument, match=r"set memory\.hihg of cgroup /abc to '1': No such"),
    ):
        groups.create("/abc", {"unified": {"memory.hihg": "1"}})


def test_reading_a_group(tmp_path: Path) -> None:
    fill(tmp_path)
    fill(tmp_path / "abc", cgroup_procs="12\n13\n0\n")
    fill(tmp_path / "abc/init.scope", cgroup_procs="14\n")
    with manager(tmp_path) as groups:
        assert groups.exists("/abc") and not groups.exists("/abd")
        assert groups.processes("/abc") == [12, 13, 14]
        assert groups.processes("/abd") == []
        assert groups.oom_kills("/abc") == 2
        assert groups.oom_kills("/abd") == 0
        assert groups.open("/abc").directory_v2 == f"{tmp_path}/abc"
        with pytest.raises(NotFound):
            groups.open("/abd")
        assert groups.warm() is False


def test_killing_uses_the_kernels_file(tmp_path: Path) -> None:
    fill(tmp_path)
    fill(tmp_path / "abc", cgroup_procs="2147483647\n")
    with manager(tmp_path) as groups:
        assert groups.kill_now("/abc") == 1
        assert groups.kill_now("/abd") == 0
    assert (tmp_path / "abc/cgroup.kill").read_text() == "1"


def test_a_pods_group_is_made_only_where_there_is_none(tmp_path: Path) -> None:
    with manager(tmp_path) as groups:
        assert groups.missing_groups("/a/b/c") == ("/a/b/c", "/a/b", "/a")
        assert groups.make_parent_now("/a/b/c") is True
        assert groups.make_parent_now("/a/b/c") is False
        assert groups.missing_groups("/a/b/d") == ("/a/b/d",)
        assert asyncio.run(groups.remove_parent("/a/b")) is False
        assert asyncio.run(groups.remove_parent("/a/b/c")) is True
        assert asyncio.run(groups.remove_parent("/a/b/c")) is True
        assert (tmp_path / "a/b").is_dir()


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("kubepods.slice", "/kubepods.slice"),
        ("kubepods-burstable-pod1_2.slice", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"),
        ("/kubepods.slice/kubepods-pod1.slice", "/kubepods.slice/kubepods-pod1.slice"),
        ("/kubepods/burstable/pod1", "/kubepods/burstable/pod1"),
        ("kubepods/pod1/", "/kubepods/pod1"),
        ("slice", "/slice"),
    ],
)
def test_cgroup_parents(name: str, path: str) -> None:
    assert resolve_parent(name) == path


@pytest.mark.parametrize(
    "name",
    ["/", "..", "/a/../b", "/a//b", "a/./b", "/a\0", "a\nb", "-a.slice", "a-.slice", "a--b.slice", "-.slice", ".slice"],
)
def test_cgroup_parents_that_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        resolve_parent(name)


def test_the_root_is_nobodys_group() -> None:
    for name in ("", "/", "//"):
        with pytest.raises(InvalidArgument):
            relative(name)


def test_default_parent(tmp_path: Path) -> None:
    with manager(tmp_path) as groups:
        assert groups.resolve_parent("", "/tare/pod1") == "/tare/pod1"
        assert groups.resolve_parent("a-b.slice", "/tare/pod1") == "/a.slice/a-b.slice"


def test_oom_counts() -> None:
    assert oom_count("oom_kill_disable 0\nunder_oom 0\noom_kill 3\n") == 3
    assert oom_count("low 0\noom_kill 0\noom_group_kill 1\n") == 1
    assert oom_count("oom_kill_disable 0\nunder_oom 0\n") == 0


def test_own_path() -> None:
    text = "9:name=systemd:/system.slice\n4:memory:/a/b\n2:cpu,cpuacct:/c\n0::/u\n"
    assert own_path(text, Hierarchy(directory="", version=1, controllers=frozenset({"memory"}))) == "a/b"
    assert own_path(text, Hierarchy(directory="", version=1, controllers=frozenset({"cpuacct", "cpu"}))) == "c"
    assert own_path(text, Hierarchy(directory="", version=1, controllers=frozenset(), name="systemd")) == "system.slice"
    assert own_path(text, Hierarchy(directory="", version=1, controllers=frozenset({"rdma"}))) == ""


def test_what_is_not_applied_is_said_once_in_words(tmp_path: Path) -> None:
    told: list[str] = []
    for directory in (tmp_path, tmp_path / "abc"):
        fill(directory)
    tree = Hierarchy(
        directory=str(tmp_path), version=2, controllers=frozenset(("cpu", "cpuset", "memory", "pids", "io"))
    )
    groups = Groups(str(tmp_path), Layout(kind="v2", hierarchies=(tree,)), told.append)
    assert groups.trouble() == "control groups (v2) lack hugetlb: limits on that are not applied"
    for _ in range(2):
        groups.create("/abc", {"memory": {"kernel": 1 << 30}})
    assert told == ["cgroup /abc: this node has no memory.kmem.limit_in_bytes, so limits on it are not applied"]
    words = "control groups (v2) lack hugetlb, memory.kmem.limit_in_bytes: limits on that are not applied"
    assert (groups.trouble(), groups.skipped) == (words, {"memory.kmem.limit_in_bytes": 2})
    groups.close()


def test_a_group_that_goes_while_its_file_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    fill(tmp_path / "a")

    def refuse(number: int) -> None:
        def opened(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "open", opened)

    with manager(tmp_path) as groups:
        file = groups.open_file("/a", "memory", "memory.events")
        assert file is not None
        os.close(file)
        with monkeypatch.context():
            refuse(errno.ENODEV)
            assert groups.open_file("/a", "memory", "memory.events") is None
            refuse(errno.EMFILE)
            with pytest.raises(OSError, match="Too many open files"):
                groups.open_file("/a", "memory", "memory.events")
        monkeypatch.undo()


@pytest.mark.parametrize("text", ["", '{"groups": {"/a": ', "[]", '{"groups": {}}', '{"groups": 1, "above": 2}'])
def test_counts_that_a_crash_has_cut_are_none(tmp_path: Path, text: str) -> None:
    kept = tmp_path / "oom.json"
    kept.write_text(text)
    found = Kills(lambda *_: None, lambda _: 7, kept)
    assert found.count("/a") == 7
    found.close()
