"""No descriptor and no PID for Tare's own processes: what runs goes on, the error says which limit it is, and all is well once there are some."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root
PIDS = Path("/sys/fs/cgroup/pids") if Path("/sys/fs/cgroup/pids").is_dir() else Path("/sys/fs/cgroup")


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with busy_node("limits") as found:
        yield found


@pytest.fixture
def container(node: Node) -> Iterator[str]:
    """One that runs."""
    yield node.start(node.create(node.run_pod("goes-on"), "main", "sh", "-c", "trap 'exit 4' TERM; sleep 1000 & wait"))
    node.remove_all()


def refusal(node: Node, name: str) -> CallFailed:
    """What making a pod with a running container fails with, at whichever call; the pod is removed afterwards."""
    with pytest.raises(CallFailed) as caught:
        node.start(node.create(node.run_pod(name), "main", "sleep", "1000"))
    return caught.value


def daemon_pid(node: Node) -> int:
    """The daemon's."""
    process = node.daemon.process
    assert process is not None
    return process.pid


@pytest.mark.parametrize("spare", [0, 1, 2])
def test_no_descriptor(node: Node, container: str, spare: int) -> None:
    """Whichever it is that cannot be had: a file's, a socket's, or one that comes with an answer."""
    pid = daemon_pid(node)
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")) + spare, hard))
    try:
        error = refusal(node, "no-descriptor")
        assert node.status(container).state == pb.CONTAINER_RUNNING
        assert container in [item.id for item in node.daemon.client.containers()]
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert (error.status, "RLIMIT_NOFILE" in str(error)) == ("RESOURCE_EXHAUSTED", True), error
    assert node.exec(container, "echo", "here").stdout == b"here\n"
    node.start(node.create(node.run_pod("afterwards"), "main", "true"))


@contextmanager
def limited(*pids: int) -> Iterator[Path]:
    """A control group in which these processes are, and which has no PID more than they take."""
    group = PIDS / f"tare-test-limits-{os.getpid()}"
    group.mkdir()
    homes = {pid: home(pid) for pid in pids}
    try:
        for pid in pids:
            (group / "cgroup.procs").write_text(str(pid))
        (group / "pids.max").write_text((group / "pids.current").read_text())
        yield group
    finally:
        (group / "pids.max").write_text("max")
        for pid, directory in homes.items():
            (directory / "cgroup.procs").write_text(str(pid))
        group.rmdir()


def home(pid: int) -> Path:
    """The group of a process in the tree that counts PIDs."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "pids" in controllers.split(",") or (not controllers and Path("/sys/fs/cgroup") == PIDS):
            return PIDS / path.lstrip("/")
    raise AssertionError("the process is in no such group")


def test_no_thread_for_the_daemon(node: Node, container: str) -> None:
    """It has few threads when it has just begun; what needs another is refused, what needs none is served, and nothing is half there."""
    node.daemon.kill()
    node.daemon.start()
    pod = node.run_pod("no-thread")
    outcomes: list[CallFailed | None] = []

    def create(number: int) -> None:
        try:
            node.create(pod, f"box-{number}", "true")
            outcomes.append(None)
        except CallFailed as error:
            outcomes.append(error)

    with limited(daemon_pid(node)) as group:
        for burst in range(10):  # until it needs one more than it has
            threads = [threading.Thread(target=create, args=(burst * 24 + number,)) for number in range(24)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if any(outcomes):
                break
        assert node.status(container).state == pb.CONTAINER_RUNNING
    failures = [error for error in outcomes if error is not None]
    assert {(error.status, str(group) in str(error)) for error in failures} == {("RESOURCE_EXHAUSTED", True)}, failures
    made = [item for item in node.daemon.client.containers() if item.pod_sandbox_id == pod]
    assert len(made) == outcomes.count(None)
    node.start(node.create(pod, "afterwards", "true"))


def test_no_process_for_the_launcher(node: Node, container: str) -> None:
    """Nothing can be started; what runs can be stopped and its end is known."""
    launcher = int((node.daemon.run / "launcher.pid").read_text().split()[0])
    with limited(launcher):
        error = refusal(node, "no-process")
        assert (error.status, "no PID left" in str(error)) == ("RESOURCE_EXHAUSTED", True), error
        assert node.status(container).state == pb.CONTAINER_RUNNING
        node.stop(container)
        assert node.wait(container).exit_code == 4
    node.start(node.create(node.run_pod("afterwards"), "main", "true"))
