"""Hooks through the gRPC socket of a real daemon, brought by a device (CDI): at every point, when one fails, and when the daemon is killed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tare.cri.v1 import api_pb2 as pb
from tare.handlers.hooks import POINTS
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root

THING = "vendor.com/thing=a"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cdi")


@pytest.fixture(scope="module")
def shared(directory: Path) -> Iterator[Node]:
    with busy_node("hooks", settings=f'[runtime]\ncdi_spec_dirs = ["{directory}"]\n') as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


def bring(directory: Path, hooks: dict[str, str]) -> None:
    """A device whose hooks are scripts."""
    entries = [
        {"hookName": point, "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"]}
        for point, script in hooks.items()
    ]
    edits: dict[str, Any] = {"hooks": entries, "env": ["THING=here"]}
    value = {"cdiVersion": "0.7.0", "kind": "vendor.com/thing", "devices": [{"name": "a", "containerEdits": edits}]}
    (directory / "vendor.json").write_text(json.dumps(value))


def created(node: Node, pod: str, script: str) -> str:
    """A container with the device, CREATED."""
    config = node.container_config("main", "sh", "-c", script, CDI_devices=[pb.CDIDevice(name=THING)])
    return node.create(pod, config)


def noted(log: Path) -> list[tuple[str, dict[str, Any]]]:
    """(point, state) as the hooks wrote them."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(line.partition(" ")[0], json.loads(line.partition(" ")[2])) for line in lines]


def until_noted(log: Path, point: str) -> None:
    """Wait for a hook."""
    deadline = time.monotonic() + 20
    while point not in [name for name, _ in noted(log)]:
        assert time.monotonic() < deadline, noted(log)
        time.sleep(0.01)


def scripts(log: Path) -> dict[str, str]:
    """For every point a script that notes it and what it is told; the container's own hook has a file of its own."""
    return {
        point: f"echo {point} $(cat) >> {log}" if point != "startContainer" else "echo $(cat) > /told"
        for point in POINTS
    }


def test_at_every_point(node: Node, directory: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    bring(directory, scripts(log))
    container = node.start(created(node, node.run_pod("hooks"), "cat /told"))
    assert node.wait(container).exit_code == 0
    [line] = node.log(container)
    assert json.loads(line)["status"] == "created" and json.loads(line)["id"] == container
    until_noted(log, "poststop")
    found = noted(log)
    assert [point for point, _ in found] == [point for point in POINTS if point != "startContainer"]
    assert {state["id"] for _, state in found} == {container}
    assert [state["status"] for _, state in found] == ["creating", "creating", "creating", "running", "stopped"]
    assert "pid" not in found[-1][1] and found[0][1]["pid"] == found[3][1]["pid"] > 1


@pytest.mark.parametrize("point", POINTS[:-1])
def test_one_that_fails(point: str, node: Node, directory: Path, tmp_path: Path) -> None:
    """The start fails in its words, the container is EXITED, and its poststop hooks are run."""
    log = tmp_path / "log"
    bring(directory, scripts(log) | {point: "echo the thing is broken >&2; exit 9"})
    container = created(node, node.run_pod("fails"), "echo ran; sleep 1000")
    node.refused("INTERNAL", "the thing is broken", node.start, container)
    status = node.status(container)
    assert status.state == pb.CONTAINER_EXITED and f"{point} hook /bin/sh" in status.message
    assert "the thing is broken" in status.message
    until_noted(log, "poststop")
    assert point not in [name for name, _ in noted(log)]


def test_a_poststop_hook_that_fails_changes_nothing(node: Node, directory: Path, tmp_path: Path) -> None:
    bring(directory, {"poststop": f"touch {tmp_path}/ran; exit 9"})
    container = node.start(created(node, node.run_pod("ends"), "exit 4"))
    assert node.wait(container).exit_code == 4
    deadline = time.monotonic() + 20
    while not (tmp_path / "ran").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_poststop_hooks_are_run_by_the_next_daemon(node: Node, directory: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    bring(directory, {"poststop": f"echo poststop $(cat) >> {log}"})
    container = node.start(created(node, node.run_pod("killed"), "sleep 1000"))
    node.daemon.kill()
    node.daemon.start()
    assert not log.exists()
    node.stop(container, 0)
    until_noted(log, "poststop")
    assert noted(log)[0][1]["id"] == container
