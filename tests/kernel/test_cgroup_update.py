"""Limits changed while processes run, groups frozen and thawed: what the kernel's files say then."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tare.cgroups import bpf, devices, freezing
from tare.cgroups.layout import detect
from tare.cgroups.manager import Cgroup, CgroupManager
from tare.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound
from tare.runtime.records import Resources
from tare.runtime.spec import DeviceNode, resources

pytestmark = pytest.mark.root

NUMBERS = itertools.count()
MIB = 1 << 20


@pytest.fixture(name="groups")
def _groups() -> Iterator[CgroupManager]:
    manager = CgroupManager()
    yield manager
    manager.close()


@pytest.fixture(name="leaf")
def _leaf(groups: CgroupManager) -> Iterator[str]:
    """A container's path in a pod's group, and the end of both."""
    pod = f"/tare-update-{os.getpid()}-{next(NUMBERS)}"
    groups.make_parent_now(pod)
    yield f"{pod}/a"
    asyncio.run(groups.kill(f"{pod}/a"))
    asyncio.run(groups.remove(f"{pod}/a"))
    assert asyncio.run(groups.remove_parent(pod))


def files(groups: CgroupManager, leaf: str, *names: str) -> dict[str, str]:
    """The content of files, each found in the tree of its controller."""
    found = {}
    for name in names:
        tree = groups.found.tree_of(name.partition(".")[0])
        assert tree is not None
        found[name] = Path(f"{tree.directory}{leaf}/{name}").read_text().strip()
    return found


def process_in(group: Cgroup, *command: str) -> subprocess.Popen[bytes]:
    """A process that joins the group first."""
    join = "import os, sys\nfor path in sys.argv[1].split(':'): open(path, 'w').write('0')\nos.execvp(sys.argv[2], sys.argv[2:])"
    process = subprocess.Popen(
        [sys.executable, "-c", join, ":".join(group.join), *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    return process


def say(process: subprocess.Popen[bytes], word: bytes) -> bytes:
    """A line to a process, and its answer."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(word + b"\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        assert stream is not None
        stream.close()
    process.kill()
    process.wait(20)


FIRST = detect().kind != "v2"
"""Whether memory, cpu and pids are v1's."""


def limits(memory: int, swap: int, quota: int, pids: int) -> dict[str, str]:
    """What `wanted` of the same numbers comes to."""
    if FIRST:
        return {
            "memory.limit_in_bytes": str(memory),
            "memory.memsw.limit_in_bytes": str(swap),
            "cpu.cfs_quota_us": str(quota),
            "pids.max": str(pids),
        }
    return {
        "memory.max": str(memory),
        "memory.swap.max": str(swap - memory),
        "cpu.max": f"{quota} 100000",
        "pids.max": str(pids),
    }


def wanted(memory: int, swap: int, quota: int, pids: int) -> dict[str, object]:
    return {"memory": {"limit": memory, "swap": swap}, "cpu": {"quota": quota}, "pids": {"limit": pids}}


def test_limits_go_up_and_down_in_whatever_order_the_kernel_needs(groups: CgroupManager, leaf: str) -> None:
    groups.create(leaf, wanted(64 * MIB, 64 * MIB, 50000, 20))
    for numbers in (
        (128 * MIB, 256 * MIB, 200000, 30),
        (32 * MIB, 32 * MIB, 5000, 10),
        (512 * MIB, 512 * MIB, 1000, 5),
    ):
        assert groups.update_now(leaf, wanted(*numbers)) == ()
        expected = limits(*numbers)
        assert files(groups, leaf, *expected) == expected


def test_what_is_not_named_stays(groups: CgroupManager, leaf: str) -> None:
    groups.create(leaf, wanted(64 * MIB, 64 * MIB, 50000, 20))
    asyncio.run(groups.update(leaf, {"pids": {"limit": -1}}))
    expected = limits(64 * MIB, 64 * MIB, 50000, 20) | {"pids.max": "max"}
    assert files(groups, leaf, *expected) == expected


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"cpu": {"quota": 10}}, "to '10"),
        ({"cpu": {"cpus": "4000"}}, "cpuset.cpus"),
        ({"pids": {"limit": 1 << 40}}, "pids.max"),
        ({"blockIO": {"throttleReadBpsDevice": [{"major": 999, "minor": 7, "rate": 1}]}}, "No such device"),
    ],
)
def test_all_or_nothing(groups: CgroupManager, leaf: str, bad: dict[str, object], words: str) -> None:
    if "blockIO" in bad and not groups.controllers & {"blkio", "io"}:
        return
    before = limits(64 * MIB, 64 * MIB, 50000, 20)
    groups.create(leaf, wanted(64 * MIB, 64 * MIB, 50000, 20))
    with pytest.raises(InvalidArgument, match=words):
        groups.update_now(leaf, {**wanted(128 * MIB, 256 * MIB, 60000, 30), **bad})
    assert files(groups, leaf, *before) == before


def test_block_io(groups: CgroupManager, leaf: str) -> None:
    """Of the machine's first disk, where there is one."""
    names = sorted(Path("/sys/block").iterdir())
    disks = [path for path in names if path.name[:2] in ("vd", "sd", "nv") and (path / "dev").exists()]
    if not disks or not groups.controllers & {"blkio", "io"}:
        return
    number = (disks[0] / "dev").read_text().strip()
    major, minor = (int(word) for word in number.split(":"))
    rate = {"major": major, "minor": minor, "rate": MIB}
    group = groups.create(leaf, {"blockIO": {"weight": 200, "throttleReadBpsDevice": [rate]}})
    assert all("weight" in name for name in group.skipped)
    file = "blkio.throttle.read_bps_device" if FIRST else "io.max"
    text = f"{number} {MIB}" if FIRST else f"{number} rbps={MIB} wbps=max riops=max wiops=max"
    assert files(groups, leaf, file) == {file: text}
    groups.update_now(leaf, {"blockIO": {"throttleReadBpsDevice": [{**rate, "rate": 0}]}})
    assert files(groups, leaf, file) == {file: ""}


def test_cpu_burst_idle_and_shares(groups: CgroupManager, leaf: str) -> None:
    groups.create(leaf, {"cpu": {"shares": 512, "quota": 50000, "burst": 10000}})
    burst = "cpu.cfs_burst_us" if FIRST else "cpu.max.burst"
    assert files(groups, leaf, burst) == {burst: "10000"}
    groups.update_now(leaf, {"cpu": {"shares": 256, "idle": 1}})
    assert files(groups, leaf, "cpu.idle") == {"cpu.idle": "1"}
    # A group that is idle has no shares: idle has to go first.
    groups.update_now(leaf, {"cpu": {"shares": 1024, "idle": 0, "quota": 5000, "burst": 0}})
    shares = {"cpu.shares": "1024"} if FIRST else {"cpu.weight": "100"}
    assert files(groups, leaf, *shares, "cpu.idle") == {**shares, "cpu.idle": "0"}


def test_v1_memory_extras(groups: CgroupManager, leaf: str) -> None:
    extras = {"limit": 64 * MIB, "swappiness": 7, "reservation": 32 * MIB, "disableOOMKiller": True, "kernel": 1}
    if not FIRST:
        with pytest.raises(FailedPrecondition, match="version 2"):
            groups.create(leaf, {"memory": extras})
        return
    group = groups.create(leaf, {"memory": extras})
    expected = {"memory.swappiness": "7", "memory.soft_limit_in_bytes": str(32 * MIB)}
    assert files(groups, leaf, *expected) == expected
    assert files(groups, leaf, "memory.oom_control")["memory.oom_control"].startswith("oom_kill_disable 1")
    with pytest.raises(InvalidArgument, match=r"cpu\.cfs_quota_us"):
        groups.update_now(leaf, {"memory": {"disableOOMKiller": False, "swappiness": 9}, "cpu": {"quota": 10}})
    assert files(groups, leaf, *expected) == expected
    assert files(groups, leaf, "memory.oom_control")["memory.oom_control"].startswith("oom_kill_disable 1")
    groups.update_now(leaf, {"memory": {"disableOOMKiller": False}})
    assert files(groups, leaf, "memory.oom_control")["memory.oom_control"].startswith("oom_kill_disable 0")
    assert group.skipped == ("memory.kmem.limit_in_bytes",)


GLUTTON = """
import sys
held = bytearray(64 << 20)
for line in sys.stdin:
    print("held", flush=True)
"""


def test_a_memory_limit_below_what_is_used(groups: CgroupManager, leaf: str) -> None:
    """v1's kernel refuses it; v2's would kill, so that checkBeforeUpdate refuses it."""
    group = groups.create(leaf, {"memory": {"limit": 512 * MIB, "swap": 512 * MIB}})
    process = process_in(group, sys.executable, "-c", GLUTTON)
    try:
        assert say(process, b"?") == b"held"
        refused: tuple[type[Exception], str] = (InvalidArgument, "Device or resource busy")
        if not FIRST:
            refused = (FailedPrecondition, "checkBeforeUpdate")
        asks = {"limit": 16 * MIB, "swap": 16 * MIB, "checkBeforeUpdate": True}
        with pytest.raises(refused[0], match=refused[1]):
            groups.update_now(leaf, {"pids": {"limit": 9}, "memory": asks})
        expected = {"pids.max": "max"} | {("memory.limit_in_bytes" if FIRST else "memory.max"): str(512 * MIB)}
        assert files(groups, leaf, *expected) == expected
        assert say(process, b"?") == b"held"
        assert process.poll() is None
    finally:
        end(process)


PROBE = """
import os, sys
for line in sys.stdin:
    found = ""
    for letter, flag in (("r", os.O_RDONLY), ("w", os.O_WRONLY)):
        try: os.close(os.open(line.strip(), flag | os.O_NONBLOCK)); found += letter
        except PermissionError: pass
        except OSError: found += letter
    print(found or "-", flush=True)
"""


def test_devices_are_changed_while_a_process_runs(groups: CgroupManager, leaf: str) -> None:
    def rules(*nodes: tuple[int, int, str]) -> dict[str, object]:
        devs = [DeviceNode(path="/dev/x", kind="c", major=a, minor=b, access=access) for a, b, access in nodes]
        return {"devices": resources(Resources(), devs)["devices"]}

    group = groups.create(leaf, rules())
    process = process_in(group, sys.executable, "-c", PROBE)
    try:
        assert (say(process, b"/dev/null"), say(process, b"/dev/kmsg")) == (b"rw", b"-")
        groups.update_now(leaf, rules((1, 11, "r")))
        assert (say(process, b"/dev/null"), say(process, b"/dev/kmsg")) == (b"rw", b"r")
        groups.update_now(leaf, rules((1, 11, "rw")))
        assert say(process, b"/dev/kmsg") == b"rw"
        with pytest.raises(InvalidArgument):
            groups.update_now(leaf, {"cpu": {"quota": 10}, **rules()})
        assert say(process, b"/dev/kmsg") == b"rw"
        groups.update_now(leaf, rules())
        assert (say(process, b"/dev/null"), say(process, b"/dev/kmsg")) == (b"rw", b"-")
        groups.update_now(leaf, {"pids": {"limit": 9}})
        assert say(process, b"/dev/kmsg") == b"-"
    finally:
        end(process)


def test_a_v2_device_program_is_replaced_and_strangers_are_left(leaf: str) -> None:
    unified = detect().unified
    assert unified is not None
    directory = Path(unified.directory + leaf)
    manager = CgroupManager()
    try:
        manager.create(leaf, {})
        group = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            allow = devices.program([devices.Rule(allow=True)])
            deny = devices.program([devices.Rule(allow=False)])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(bpf, "NAME", b"stranger")
                bpf.attach(str(directory), allow)
            strangers = bpf.attached(group, "")
            bpf.attach(str(directory), allow, replace=True)
            first = set(bpf.attached(group, "")) - set(strangers)
            bpf.attach(str(directory), deny, replace=True)
            after = set(bpf.attached(group, ""))
            assert len(first) == 1 and len(after) == 2
            assert set(strangers) <= after and not first & after
        finally:
            os.close(group)
    finally:
        manager.close()


TICKER = """
import sys, time
for line in sys.stdin:
    print(time.monotonic_ns(), flush=True)
"""


def test_freezing_stops_everything_until_it_is_thawed(groups: CgroupManager, leaf: str) -> None:
    group = groups.create(leaf, {})
    process = process_in(group, sys.executable, "-c", TICKER)
    try:
        say(process, b"?")
        asyncio.run(groups.freeze(leaf))
        assert groups.frozen(leaf)
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"?\n")
        process.stdin.flush()
        os.set_blocking(process.stdout.fileno(), False)
        assert process.stdout.read() is None
        before = time.monotonic_ns()
        os.set_blocking(process.stdout.fileno(), True)
        asyncio.run(groups.freeze(leaf))
        asyncio.run(groups.thaw(leaf))
        assert not groups.frozen(leaf)
        assert int(process.stdout.readline()) > before
        asyncio.run(groups.thaw(leaf))
    finally:
        end(process)


def test_freezing_by_the_unified_tree_alone() -> None:
    unified = detect().unified
    assert unified is not None
    groups = CgroupManager(unified.directory)
    leaf = f"/tare-update-{os.getpid()}-{next(NUMBERS)}"
    try:
        group = groups.create(leaf, {})
        process = process_in(group, sys.executable, "-c", TICKER)
        try:
            say(process, b"?")
            asyncio.run(groups.freeze(leaf))
            assert groups.frozen(leaf)
            asyncio.run(groups.thaw(leaf))
            assert not groups.frozen(leaf) and say(process, b"?")
        finally:
            end(process)
    finally:
        asyncio.run(groups.kill(leaf))
        asyncio.run(groups.remove(leaf))
        groups.close()


def test_what_does_not_stop_in_time_is_thawed_again(groups: CgroupManager, leaf: str) -> None:
    """That it has not stopped is a pretence: what the kernel cannot freeze cannot be made here."""
    group = groups.create(leaf, {})
    process = process_in(group, sys.executable, "-c", TICKER)
    try:
        say(process, b"?")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tare.cgroups.freezing.is_frozen", lambda _tree, _place: False)
            patch.setattr("tare.cgroups.freezing.announced", lambda *_, **__: False)
            with pytest.raises(DeadlineExceeded, match="it is thawed again"):
                asyncio.run(groups.freeze(leaf, timeout=0.15))
        assert not groups.frozen(leaf) and say(process, b"?")
    finally:
        end(process)


def test_freezing_that_is_given_up_leaves_nothing_frozen(
    groups: CgroupManager, leaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups.create(leaf, {})
    begun, go_on = threading.Event(), threading.Event()
    reached = freezing.reached

    def slowly(*arguments: Any, frozen: bool) -> bool:
        begun.set()
        return go_on.wait(20) and reached(*arguments, frozen=frozen)

    async def body() -> None:
        work = asyncio.ensure_future(groups.freeze(leaf))
        await asyncio.to_thread(begun.wait, 20)
        work.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await work

    monkeypatch.setattr(freezing, "reached", slowly)
    asyncio.run(body())
    assert not groups.frozen(leaf)


def test_thawing_under_a_frozen_parent_says_so(groups: CgroupManager, leaf: str) -> None:
    groups.create(leaf, {})
    pod = leaf.rpartition("/")[0]
    asyncio.run(groups.freeze(pod))
    try:
        with pytest.raises(DeadlineExceeded, match="is a group above it frozen"):
            asyncio.run(groups.thaw(leaf, timeout=0.05))
    finally:
        asyncio.run(groups.thaw(pod))
    asyncio.run(groups.thaw(leaf))


def test_a_group_that_is_in_use_or_frozen_is_not_free(groups: CgroupManager, leaf: str) -> None:
    groups.check_free(leaf)
    group = groups.create(leaf, {})
    groups.check_free(leaf)
    process = process_in(group, sys.executable, "-c", TICKER)
    try:
        say(process, b"?")
        with pytest.raises(FailedPrecondition, match=f"it is not empty: PIDs {process.pid} are in it"):
            groups.check_free(leaf)
    finally:
        end(process)
    asyncio.run(groups.freeze(leaf))
    with pytest.raises(FailedPrecondition, match="it is frozen"):
        groups.check_free(leaf)
    asyncio.run(groups.thaw(leaf))
    groups.check_free(leaf)


def test_a_v2_group_is_given_to_the_containers_root() -> None:
    unified = detect().unified
    assert unified is not None
    groups = CgroupManager(unified.directory)
    leaf = f"/tare-update-{os.getpid()}-{next(NUMBERS)}"
    directory = Path(unified.directory + leaf)
    try:
        groups.create(leaf, {})
        groups.delegate(leaf, 12345)
        own = {
            name for name in ("", "cgroup.procs", "cgroup.subtree_control") if (directory / name).stat().st_uid == 12345
        }
        assert own == {"", "cgroup.procs", "cgroup.subtree_control"}
        assert (directory / "cgroup.max.depth").stat().st_uid == 0
        with pytest.raises(NotFound):
            groups.delegate("/tare-update-absent", 5)
    finally:
        asyncio.run(groups.remove(leaf))
        groups.close()


def test_a_v1_group_is_given_to_nobody(groups: CgroupManager, leaf: str) -> None:
    if not FIRST:
        return
    group = groups.create(leaf, {})
    groups.delegate(leaf, 12345)
    assert {os.stat(path).st_uid for path in group.join} == {0}


def test_there_is_nothing_to_freeze(groups: CgroupManager) -> None:
    for call in (groups.freeze, groups.thaw):
        with pytest.raises(NotFound):
            asyncio.run(call("/tare-update-absent/a"))
    with pytest.raises(NotFound):
        groups.frozen("/tare-update-absent/a")


def test_a_limit_on_sockets_memory_is_named_where_there_is_none(groups: CgroupManager, leaf: str) -> None:
    file = "memory.kmem.tcp.limit_in_bytes"
    group = groups.create(leaf, {"memory": {"kernelTCP": 1 << 30}})
    assert group.skipped == (() if FIRST else (file,))
    if FIRST:
        assert files(groups, leaf, file) == {file: str(1 << 30)}
    assert asyncio.run(groups.update(leaf, {"memory": {"kernelTCP": 1 << 29}})) == group.skipped
