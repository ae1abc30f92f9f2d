"""The same thing again and again: every OOM kill is called one, and short containers leave nothing and cost our processes nothing.

TARE_LOOPS multiplies how often: by hand, 50 makes 1,000 OOM kills and 10,000 containers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tare.api.v1 import tare_pb2
from tare.cri.v1 import api_pb2 as pb
from tests.support import leaks
from tests.support.node import Node, busy_node
from tests.support.victims import NAMES, ours

pytestmark = pytest.mark.root
LOOPS = int(os.environ.get("TARE_LOOPS", "1"))
OOM_KILLS = 20 * LOOPS
CONTAINERS = 200 * LOOPS
AT_ONCE = 4
WARM = 40  # containers until all that is made once is made
LIMIT = 16 << 20


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with busy_node("loops") as found:
        yield found
        client = found.daemon.client
        assert not client.call(client.node.Audit, tare_pb2.AuditRequest()).findings


def one(node: Node, pod: str, number: int, command: tuple[str, ...], limit: int = 0) -> pb.ContainerStatus:
    """A container from its making to its removal; how it ended."""
    resources = pb.LinuxContainerResources(memory_limit_in_bytes=limit) if limit else None
    container = node.start(node.create(pod, node.container_config(f"c{number}", *command, resources=resources)))
    status = node.wait(container)
    node.remove(container)
    return status


@pytest.mark.timeout(60 + 20 * OOM_KILLS)
def test_every_oom_kill_is_called_one(node: Node) -> None:
    """Instant ones: the whole container is gone when the kernel's counters are looked at."""
    pod = node.run_pod("greedy")
    command = ("tail", "/dev/zero")
    with ThreadPoolExecutor(AT_ONCE) as calls:
        ends = list(calls.map(lambda number: one(node, pod, number, command, LIMIT), range(OOM_KILLS)))
    assert {(end.exit_code, end.reason) for end in ends} == {(137, "OOMKilled")}
    node.remove_all()
    assert node.settled() == []


def memory(node: Node) -> dict[str, int]:
    """KiB that each of our processes has of its own (anonymous), and in files under the run directory, by name."""
    found = {}
    for victim in ("daemon", *NAMES):
        for pid in ours(node.daemon, victim):
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            (anonymous,) = (int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            found[f"{victim} {pid}"] = anonymous
            found[f"descriptors of {victim} {pid}"] = len(os.listdir(f"/proc/{pid}/fd"))
    found["processes"] = sum(str(node.daemon.run) in process.command for process in leaks.processes())
    return found


@pytest.mark.timeout(60 + 10 * CONTAINERS)
def test_short_containers_cost_nothing(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    pod = node.run_pod("short")

    def some(begin: int, count: int) -> None:
        with ThreadPoolExecutor(AT_ONCE) as calls:
            numbers = range(begin, begin + count)
            ends = calls.map(lambda number: one(node, pod, number, ("sh", "-c", f"echo {number}; exit 3")), numbers)
            assert {end.exit_code for end in ends} == {3}

    some(0, WARM)
    before = memory(node)
    some(WARM, CONTAINERS)
    after = memory(node)
    with capsys.disabled():
        print(f"\nloops: {CONTAINERS} containers: {', '.join(f'{k} {before.get(k)} -> {after[k]}' for k in after)}")
    assert before.keys() == after.keys()
    for name, value in before.items():
        # What allocators keep for the next time settles slowly; a leak of one object for each container would be more.
        allowed = 2048 + CONTAINERS // 5 if name.split()[0] in ("daemon", *NAMES) else 6
        assert after[name] <= value + allowed, (name, value, after[name])
    node.remove_all()
    assert node.settled() == []
