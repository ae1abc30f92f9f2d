"""The failpoint matrix for what is not on a pod's ordinary way: checkpoints and restoring, images from archives, the audit's repairs.

As in `test_matrix`: at a point of an operation somebody is killed, the call is made again, and its answer is what it would have been; nothing
is lost or left. Of checkpointing every seventh point runs (TARE_MATRIX=all: everybody at every point), and every one of the others.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, product
from pathlib import Path
from typing import TypeVar

import pytest

from tare.api.v1 import tare_pb2
from tare.cli.archives import pieces_of, requests
from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tests.support import victims
from tests.support.node import Node, busy_node
from tests.support.victims import CHECKPOINTS, ELSEWHERE, EVERY, Ambush, points

pytestmark = pytest.mark.root
R = TypeVar("R")
RETRY_SECONDS = 60.0
AGAIN = ("UNAVAILABLE",)
CRIU = Path(sys.executable).parent / "criu"
COUNTS = "trap 'echo end; exit 7' TERM; i=0; while :; do echo $i; i=$((i+1)); sleep 0.05; done"
EVERYBODY = (*victims.ALONE, *victims.OTHERS)
WHOLE = os.environ.get("TARE_MATRIX") == "all"
GHOST = "f" * 64


def cases(names: tuple[str, ...], every: int) -> list[object]:
    """Points of these operations, each with somebody who dies there: one in turn at one of so many, or everybody at all of them."""
    found = [point for name in names for point in points(victims.operations()[name])]
    chosen = product(found, EVERYBODY) if WHOLE else zip(found[::every], cycle(EVERYBODY), strict=False)
    return [pytest.param(point, who, id=f"{point}-{'+'.join(who)}") for point, who in chosen]


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("rest", settings=f'[runtime]\ncriu = "{CRIU}"\n') as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node without its daemon, on which each case must leave nothing."""
    shared.daemon.kill()
    yield shared
    if not shared.daemon.answers():
        shared.daemon.start()
    shared.remove_all()
    assert shared.settled() == []
    assert left(shared) == []
    client = shared.daemon.client
    assert not client.call(client.node.Audit, tare_pb2.AuditRequest()).findings


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory for archives."""
    with tempfile.TemporaryDirectory(prefix="tare-archives-", dir="/var/lib") as name:
        yield Path(name)


def left(node: Node) -> list[Path]:
    """What there is of checkpoints beside their archives."""
    return [path for name in ("checkpoints", "restores") for path in (node.daemon.root / name).glob("*")]


class Calls:
    """Calls that are made again, under a daemon that lives."""

    def __init__(self, node: Node, ambush: Ambush) -> None:
        self.node = node
        self.ambush = ambush
        self.tries = 0

    def again(self, work: Callable[[], R]) -> R:
        """What it answers, as soon as there is somebody to do it."""
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            self.tries += 1
            try:
                return work()
            except CallFailed as error:
                assert error.status in AGAIN and time.monotonic() < deadline, error
            self.ambush.wait()
            if not self.node.daemon.answers():
                self.node.daemon.kill()
                self.node.daemon.start()
            time.sleep(0.05)

    def counts(self, container: str, than: int) -> int:
        """Until it has counted further than that; how far it is."""
        deadline = time.monotonic() + RETRY_SECONDS
        while (found := max(self.numbers(container), default=-1)) <= than:
            assert time.monotonic() < deadline, f"{container} does not count on from {than}"
            time.sleep(0.02)
        return found

    def numbers(self, container: str) -> list[int]:
        """What it has counted."""
        log = Path(self.node.status(container).log_path)
        return [int(line) for line in self.node.log(container) if line.isdecimal()] if log.exists() else []

    def end(self, container: str, first: int) -> None:
        """It ends when it is told to, and has counted one by one."""
        node = self.node
        self.again(lambda: node.stop(container, 30))
        assert node.status(container).exit_code == 7
        node.wait_for_log(container, "end")
        lines = node.log(container)
        assert lines == [*map(str, range(first, first + len(lines) - 1)), "end"]


@pytest.mark.parametrize(("point", "who"), cases(CHECKPOINTS, EVERY))
def test_checkpoints_and_restoring(node: Node, place: Path, point: str, who: tuple[str, ...]) -> None:
    node.daemon.start({"TARE_FAILPOINTS": f"{point}=hold"})
    client = node.daemon.client
    name = "-".join((point, *who)).lower()
    with Ambush(node.daemon, who) as ambush:
        calls = Calls(node, ambush)
        pod = node.run_pod(f"first-{name}")
        old = node.start(node.create(pod, "main", "sh", "-c", COUNTS))
        calls.counts(old, 2)

        def alone() -> Path:
            to = place / f"{calls.tries}.tar"
            request = pb.CheckpointContainerRequest(container_id=old, location=str(to))
            client.call(client.runtime.CheckpointContainer, request)
            return to

        def together() -> Path:
            to = place / f"pod-{calls.tries}"
            client.call(client.runtime.CheckpointPod, pb.CheckpointPodRequest(pod_sandbox_id=pod, output_path=str(to)))
            return to

        def restored(where: Path) -> tuple[str, str]:
            request = pb.RestorePodRequest(checkpoint_path=str(where), config=node.pod_config(f"second-{name}"))
            answer = client.call(client.runtime.RestorePod, request)
            (container,) = answer.restored_containers
            return answer.pod_sandbox_id, container.container_id

        archive = calls.again(alone)
        assert archive.stat().st_size > 10_000
        calls.counts(old, calls.counts(old, -1))
        where = calls.again(together)
        calls.counts(old, calls.counts(old, -1))
        other, new = calls.again(lambda: restored(where))
        assert [pod.id for pod in client.pods() if pod.metadata.name == f"second-{name}"] == [other]
        calls.again(lambda: node.start(new))
        calls.counts(new, 3)
        calls.end(new, calls.numbers(new)[0])
        calls.end(old, 0)
    assert ambush.killed


@pytest.mark.parametrize(("point", "who"), cases(ELSEWHERE[:1], 1))
def test_images_from_archives(node: Node, place: Path, point: str, who: tuple[str, ...]) -> None:
    layout = node.daemon.base.parent / "busybox"
    node.daemon.start({"TARE_FAILPOINTS": f"{point}=hold"})
    client = node.daemon.client
    name = "tests.example/loaded:1"
    with Ambush(node.daemon, who) as ambush:
        calls = Calls(node, ambush)
        answer = calls.again(lambda: client.call(client.tare.Load, requests(pieces_of(str(layout)), name)))
    assert ambush.killed or who == ("logger",)
    (image,) = answer.images
    known = client.call(client.images.ListImages, pb.ListImagesRequest()).images
    assert [item.id for item in known if name in item.repo_tags] == [image.image_id]
    assert not any(item.trouble for item in client.stream(client.tare.Verify, tare_pb2.VerifyRequest(images=[name])))


@pytest.mark.parametrize(("point", "who"), cases(ELSEWHERE[1:], 1))
def test_repairs(node: Node, point: str, who: tuple[str, ...]) -> None:
    node.daemon.start({"TARE_FAILPOINTS": f"{point}=hold"})
    client = node.daemon.client
    stray = node.daemon.run / "pods" / GHOST
    stray.mkdir()
    with Ambush(node.daemon, who) as ambush:
        calls = Calls(node, ambush)
        calls.again(lambda: client.call(client.node.Audit, tare_pb2.AuditRequest(repair=True)))
    assert ambush.killed or who == ("logger",)
    assert not stray.exists()
