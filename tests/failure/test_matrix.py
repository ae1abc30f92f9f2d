"""The failpoint matrix: Tare's processes are killed before and after each step of each operation, and nothing is lost or left.

The cases are made from the operations themselves, so that a new step is covered when it is written. In each case

    a daemon is started that will die, or lose others, at one point ─► the call ─► (killed: a new daemon)
      ─► the same call again, which succeeds ─► the container runs, execs, and ends with its code ─► everything is removed
      ─► its log is whole, and no mount, namespace, link, lease, cgroup, process, file or record is left

The daemon alone and the launcher alone are killed at every point; loggers, the keeper, and several at once in turn, one of them at each
step (TARE_MATRIX=all: each of them at every point). `docs/reliability.md` has the table.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tests.support import victims
from tests.support.daemon import Daemon
from tests.support.images import busybox_image
from tests.support.node import Node, cgroups_named, rows
from tests.support.registry import Registry
from tests.support.victims import Ambush, points

pytestmark = pytest.mark.root
R = TypeVar("R")
RETRY_SECONDS = 30.0


OPERATIONS = [operation for name, operation in sorted(victims.operations().items()) if name in victims.OF_A_TRIP]
POINTS = [point for operation in OPERATIONS for point in points(operation)]
FAILING = [point for operation in OPERATIONS if not operation.finish for point in points(operation)[::2]]
ENDING = [point for operation in OPERATIONS if operation.finish for point in points(operation)[::2]]
WHOLE = os.environ.get("TARE_MATRIX") == "all"
CASES = [(point, each) for point in POINTS for each in victims.OTHERS] if WHOLE else victims.in_turn(OPERATIONS)
COUNTS = "trap 'echo end; exit 7' TERM; echo up; i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    """A node whose daemon does not run yet, with an image that can be pulled."""
    with tempfile.TemporaryDirectory(prefix="tare-matrix-", dir="/var/lib") as name:
        base = Path(name)
        daemon = Daemon(base / "tare")
        with Registry(base / "registry") as registry:
            registry.push(busybox_image(base / "busybox"), "tests/busybox:1")
            try:
                yield Node(daemon, f"{registry.url}/tests/busybox:1")
            finally:
                troubles = daemon.destroy()
            assert troubles == []


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which a case that failed leaves nothing for the next to stumble over."""
    shared.daemon.kill()
    yield shared
    if not shared.daemon.answers():
        shared.daemon.start()
    shared.remove_all()


class Trip:
    """The calls that lead from nothing to a running container and back, each of which is made again where it fails."""

    def __init__(self, node: Node, action: str, point: str, dead: Ambush | None = None) -> None:
        self.node = node
        self.name = f"{action}-{point}".lower()
        self.dead = dead
        self.died = False
        self.retried = False

    def call(self, work: Callable[[], R]) -> R:
        """What the call returns, at the first try or, after somebody was lost over it, at the second.

        Without keeper and launcher it is made again until there are others: the daemon has to see first that they are gone.
        """
        deadline = time.monotonic() + RETRY_SECONDS
        while True:
            try:
                return work()
            except CallFailed as error:
                assert error.status == "UNAVAILABLE", error
                assert not self.retried or (self.dead is not None and time.monotonic() < deadline), error
            self.retried = True
            self.revive()
            time.sleep(0.05)

    def revive(self) -> None:
        """A new daemon, if the old one has died of this and nothing else."""
        process = self.node.daemon.process
        assert process is not None
        if self.dead is not None:
            self.dead.wait()
        if not self.node.daemon.answers():
            assert process.wait(timeout=10) == -signal.SIGKILL
            self.died = True
            self.node.daemon.start()

    def run(self) -> None:
        """All the way, and back."""
        node = self.node
        self.call(node.pull)
        config = node.pod_config(self.name, pid=pb.POD)
        pod = self.call(lambda: node.run_pod(config))
        container = self.call(lambda: node.create(pod, "main", "sh", "-c", COUNTS))
        self.call(lambda: node.start(container))
        self.call(lambda: node.update(container, cpu_shares=700))
        self.call(lambda: node.update_pod(pod, cpu_shares=1400))
        assert node.status(container).resources.linux.cpu_shares == 700
        assert len(node.daemon.client.pods()) == len(node.daemon.client.containers()) == 1
        node.wait_for_log(container, "up")
        done = self.call(lambda: node.exec(container, "sh", "-c", "echo here; exit 3"))
        assert (done.stdout, done.exit_code) == (b"here\n", 3)
        idle = node.start(node.create(pod, "idle", "sleep", "1000"))
        self.call(lambda: node.stop(container, 30))
        assert node.status(container).exit_code == 7
        node.wait_for_log(container, "end")
        lines = node.log(container)
        assert lines == ["up", *map(str, range(len(lines) - 2)), "end"]
        self.call(lambda: node.stop_pod(pod))
        assert node.status(idle).exit_code == 137
        self.call(lambda: node.remove_pod(pod))
        self.call(node.remove_image)
        assert node.settled() == []
        assert cgroups_named(pod) == cgroups_named(container) == cgroups_named(idle) == []
        assert image_files(node) == []


def image_files(node: Node) -> list[Path]:
    """What is kept of images."""
    kept = (node.daemon.root / name for name in ("blobs/sha256", "layers", "ingest"))
    return [path for directory in kept for path in directory.glob("*")]


def launcher_pid(node: Node) -> int:
    return int((node.daemon.run / "launcher.pid").read_text().split()[0])


@pytest.mark.parametrize("point", POINTS)
def test_the_daemon_is_killed(node: Node, point: str) -> None:
    node.daemon.start({"TARE_FAILPOINTS": f"{point}=kill"})
    trip = Trip(node, "kill", point)
    trip.run()
    assert trip.died


@pytest.mark.parametrize("point", POINTS)
def test_the_launcher_is_killed(node: Node, point: str) -> None:
    node.daemon.start({"TARE_FAILPOINTS": f"{point}=kill-launcher"})
    before = launcher_pid(node)
    Trip(node, "kill-launcher", point).run()
    deadline = time.monotonic() + 10
    while launcher_pid(node) == before:
        assert time.monotonic() < deadline, "there is no new launcher"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("point", "who"), [pytest.param(point, who, id=f"{point}-{'+'.join(who)}") for point, who in CASES]
)
def test_others_are_killed(node: Node, point: str, who: tuple[str, ...]) -> None:
    node.daemon.start({"TARE_FAILPOINTS": f"{point}=hold"})
    with Ambush(node.daemon, who) as ambush:
        trip = Trip(node, "-".join(name[0] for name in who), point, ambush)
        trip.run()
    assert ambush.killed or (ambush.killed is not None and who == ("logger",))  # there is none before the first start
    assert trip.died == ("daemon" in who)


@pytest.mark.parametrize("point", FAILING)
def test_the_step_fails(node: Node, point: str) -> None:
    """What was done until then is taken back, at once."""
    node.daemon.start({"TARE_FAILPOINTS": f"{point}=error"})
    pod = ""
    with pytest.raises(CallFailed, match=f"failpoint {point}"):
        node.pull()
        pod = node.run_pod(f"error-{point}".lower())
        container = node.start(node.create(pod, "main", "sleep", "1000"))
        node.update(container, cpu_shares=700)
        node.update_pod(pod, cpu_shares=1400)
        node.exec(container, "true")
        node.stop(container, 0)
    if pod:
        node.remove_pod(pod)
    node.remove_image()
    assert node.settled() == []
    assert image_files(node) == []


@pytest.mark.parametrize("point", ENDING)
def test_a_step_of_taking_down_fails(node: Node, point: str) -> None:
    """What was done stays done, and the next call, or the next daemon, does the rest."""
    node.daemon.start({"TARE_FAILPOINTS": f"{point}=error"})
    with pytest.raises(CallFailed, match=f"failpoint {point}"):
        node.pull()
        pod = node.run_pod(f"ending-{point}".lower())
        container = node.start(node.create(pod, "main", "sleep", "1000"))
        node.stop_pod(pod)
        node.remove(container)
        node.remove_pod(pod)
        node.remove_image()
    node.daemon.kill()
    node.daemon.start()
    assert intents(node) == []
    node.remove_all()
    node.remove_image()
    assert node.settled() == []
    assert image_files(node) == []


def intents(node: Node) -> list[tuple[object, ...]]:
    """Operations that are written down as begun and not ended."""
    return rows(node.daemon.run / "boot.db", "intents")
