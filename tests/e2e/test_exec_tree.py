"""What an exec starts ends at its timeout, wherever it has gone, and nothing else does."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.cgroups.core import Groups
from tare.cgroups.leaf import PREFIX
from tests.support.node import Node, busy_node, cgroups_named

pytestmark = pytest.mark.root
# A process that has left its session and whose parent is gone: nothing but its control group tells whose it is.
ESCAPE = "(setsid sh -c '(sleep 1000 & echo $! > /escaped) ' &) ; sleep 0.2; cat /escaped"


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    groups = Groups()
    unified = any(tree.version == 2 for tree in groups.hierarchies)
    groups.close()
    if not unified:
        pytest.skip("no unified tree on this machine")
    with busy_node("leaf") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []
    assert cgroups_named(PREFIX) == []


def container(node: Node, *command: str) -> str:
    """One that runs."""
    pod = node.run_pod("leaf")
    return node.start(node.create(pod, "main", *(command or ("sleep", "1000"))))


def sleepers(node: Node, main: str) -> list[str]:
    """What `sleep 1000` runs in the container, by its own PIDs."""
    listed = node.exec(main, "ps", "-o", "pid,args").stdout.decode().splitlines()
    return [line.split()[0] for line in listed if line.split()[1:] == ["sleep", "1000"]]


def test_what_has_left_session_and_parent_ends_at_the_timeout(node: Node) -> None:
    main = container(node)
    node.refused("DEADLINE_EXCEEDED", "1 s", lambda: node.exec(main, "sh", "-c", f"{ESCAPE}; sleep 1000", timeout=1))
    escaped = node.exec(main, "cat", "/escaped").stdout.decode().strip()
    assert escaped, "nothing escaped: the test shows nothing"
    assert sleepers(node, main) == ["1"]
    assert cgroups_named(PREFIX) == []


def test_what_outlives_its_exec_goes_on_and_another_exec_does_not_end_it(node: Node) -> None:
    main = container(node)
    escaped = node.exec(main, "sh", "-c", ESCAPE).stdout.decode().strip()
    node.refused("DEADLINE_EXCEEDED", "1 s", lambda: node.exec(main, "sleep", "30", timeout=1))
    assert sorted(sleepers(node, main)) == sorted(["1", escaped])
    assert cgroups_named(PREFIX) == []


def test_execs_at_once_have_a_group_each(node: Node) -> None:
    main = container(node)
    began = time.monotonic()
    node.refused("DEADLINE_EXCEEDED", "1 s", lambda: node.exec(main, "sh", "-c", "sleep 30 & sleep 30", timeout=1))
    assert time.monotonic() - began < 3
    assert node.status(main).exit_code == 0 and sleepers(node, main) == ["1"]


def test_an_exec_is_where_the_main_process_has_moved_to(node: Node) -> None:
    """As in a container that makes groups itself; on version 2 it could not join the container's own any more."""
    main = container(node)
    (own,) = [path for path in cgroups_named(main) if Path(path, "cgroup.type").exists()]
    inside = Path(own, "inside")
    inside.mkdir()
    for pid in Path(own, "cgroup.procs").read_text().split():
        Path(inside, "cgroup.procs").write_text(pid)
    seen = node.exec(main, "sh", "-c", "grep ^0:: /proc/self/cgroup; grep ^0:: /proc/1/cgroup").stdout.decode().split()
    assert seen[0].startswith(f"{seen[1]}/{PREFIX}") and seen[1].endswith("/inside"), seen
    assert node.exec(main, "true").exit_code == 0


def test_a_group_that_takes_no_more_is_joined_itself(node: Node) -> None:
    main = container(node)
    (own,) = [path for path in cgroups_named(main) if Path(path, "cgroup.type").exists()]
    Path(own, "cgroup.max.descendants").write_text("0")
    assert node.exec(main, "sh", "-c", "echo $((6 * 7))").stdout == b"42\n"
    node.refused("DEADLINE_EXCEEDED", "1 s", lambda: node.exec(main, "sh", "-c", "sleep 50 & sleep 50", timeout=1))
    assert sleepers(node, main) == ["1"]
