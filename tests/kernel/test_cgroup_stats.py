"""What this machine's control groups count of real work, on whichever layout it has; and a group that goes while it is looked at."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tare.cgroups.manager import Cgroup, CgroupManager
from tare.cgroups.stats import Counters, Reader

pytestmark = pytest.mark.root

NUMBERS = itertools.count()
MIB = 1 << 20
WORK = """
import os, sys, time
for path in sys.argv[1].split(":"):
    open(path, "w").write("0")
kept = bytearray(b"x" * (32 << 20))
end = time.process_time() + 0.3
while time.process_time() < end:
    os.stat("/")
print("done", flush=True)
sys.stdin.read()
"""


@pytest.fixture(name="groups")
def _groups() -> Iterator[CgroupManager]:
    manager = CgroupManager()
    yield manager
    manager.close()


@pytest.fixture(name="leaf")
def _leaf(groups: CgroupManager) -> Iterator[str]:
    """A container's path in a pod's group, and the end of both."""
    pod = f"/tare-stats-{os.getpid()}-{next(NUMBERS)}"
    groups.make_parent_now(pod)
    yield f"{pod}/a"
    asyncio.run(groups.kill(f"{pod}/a"))
    asyncio.run(groups.remove(f"{pod}/a"))
    assert asyncio.run(groups.remove_parent(pod))


@pytest.fixture(name="reader")
def _reader(groups: CgroupManager) -> Iterator[Reader]:
    reader = Reader(groups.found)
    yield reader
    reader.close()


def work_in(group: Cgroup) -> subprocess.Popen[bytes]:
    """A process that has used 0.3 s of CPU in the group, and holds 32 MiB there until its input ends."""
    command = [sys.executable, "-c", WORK, ":".join(group.join)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"done\n"
    return process


def test_work_is_counted_in_the_group_and_in_the_one_above(groups: CgroupManager, leaf: str, reader: Reader) -> None:
    group = groups.create(leaf, {"memory": {"limit": 256 * MIB}, "pids": {"limit": 7}})
    idle = reader.read(leaf)
    assert idle.cpu == 0
    with work_in(group) as process:
        found, above = reader.read(leaf), reader.read(leaf.rpartition("/")[0])
        details = reader.details(leaf)
        members = reader.members(leaf)
        process.communicate(b"")
    assert process.returncode == 0
    for counters in (found, above):
        assert counters.cpu is not None
        assert 0.3e9 <= counters.cpu < 30e9
        assert counters.memory is not None
        assert 32 * MIB <= counters.memory.rss <= counters.memory.usage < 200 * MIB
        assert counters.memory.working_set >= 32 * MIB
        assert counters.memory.page_faults > 0
    assert found.memory is not None
    assert (found.memory.limit, found.memory.available) == (256 * MIB, 256 * MIB - found.memory.working_set)
    assert (details.threads, details.threads_max) == (1, 7)
    assert details.user is not None and details.system is not None
    assert details.user + details.system > 0.2e9
    assert details.memory["peak"] >= 32 * MIB
    assert members == [process.pid]


def test_pressure_is_told_where_the_kernel_accounts_for_it(groups: CgroupManager, leaf: str, reader: Reader) -> None:
    groups.create(leaf, {})
    found = reader.read(leaf)
    accounted = groups.found.unified is not None and os.path.exists("/proc/pressure/cpu")
    for pressure in (found.cpu_pressure, found.memory_pressure, found.io_pressure):
        assert (pressure is not None) == accounted


def test_a_group_that_goes_and_comes_again(groups: CgroupManager, leaf: str, reader: Reader) -> None:
    group = groups.create(leaf, {})
    with work_in(group) as process:
        used = reader.read(leaf).cpu
        process.communicate(b"")
    assert used is not None and used > 0
    asyncio.run(groups.remove(leaf))
    assert reader.read(leaf) == Counters()
    assert reader.members(leaf) == []
    groups.create(leaf, {})
    found = reader.read(leaf)
    assert found.cpu == 0, "the new one's counter, not the old one's"
    assert found.memory is not None
