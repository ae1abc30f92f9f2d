"""The daemon is killed, or the node restarted, while pods run: what is there afterwards, and what it says of what happened meanwhile."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.daemon import Daemon
from tests.support.node import Node, busy_node, cgroups_named

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("restart") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    if not shared.daemon.answers():
        shared.daemon.start()
    shared.remove_all()
    assert shared.settled() == []


def restart(node: Node, environment: dict[str, str] | None = None) -> None:
    node.daemon.kill()
    node.daemon.start(environment)


def test_pods_go_on_when_the_daemon_is_killed(node: Node) -> None:
    ticking = "while true; do echo tick; sleep 0.05; done"
    pod = node.run_pod("on")
    lasting = node.start(node.create(pod, "lasting", "sh", "-c", ticking))
    ending = node.start(node.create(pod, "ending", "sh", "-c", "sleep 1000 & echo up; wait; exit 42"))
    created = node.create(pod, "created", "sh", "-c", "exit 6")
    before = node.status(lasting)
    node.wait_for_log(lasting, "tick")
    node.wait_for_log(ending, "up")
    node.daemon.kill()
    end_sleep(ending)
    node.daemon.start()
    assert node.pod_status(pod).state == pb.SANDBOX_READY
    assert node.status(lasting) == before
    assert node.exec(lasting, "echo", "here").stdout == b"here\n"
    assert node.wait(ending).exit_code == 42
    assert node.wait(node.start(created)).exit_code == 6
    count = len(node.log(lasting))
    node.wait_for_log(lasting, "tick")
    deadline = time.monotonic() + 10
    while len(node.log(lasting)) <= count:
        assert time.monotonic() < deadline, "the log has stopped"
        time.sleep(0.02)
    node.stop(lasting, 0)
    assert node.status(lasting).exit_code == 137


def end_sleep(container: str) -> None:
    """End what the container's PID 1 waits for, while there is no daemon to ask: that one ignores SIGTERM."""
    for pid in {int(pid) for path in cgroups_named(container) for pid in procs(path)}:
        os.kill(pid, signal.SIGTERM)


def procs(path: str) -> list[str]:
    return Path(path, "cgroup.procs").read_text().split()


def test_a_shared_pid_namespace_outlives_the_daemon_and_is_watched_again(node: Node) -> None:
    pod = node.run_pod(node.pod_config("pids", pid=pb.POD))
    first = node.start(node.create(pod, "first", "sleep", "1000"))
    restart(node)
    second = node.start(node.create(pod, "second", "ps", "-o", "args"))
    assert node.wait(second).exit_code == 0
    assert "sleep 1000" in node.log(second)
    assert node.status(first).state == pb.CONTAINER_RUNNING


def test_a_grace_is_not_remembered_but_a_stop_works(node: Node) -> None:
    pod = node.run_pod("stop")
    container = node.start(node.create(pod, "main", "sleep", "1000"))
    restart(node)
    node.stop(container, 0)
    assert node.status(container).exit_code == 137
    restart(node)
    assert node.status(container).exit_code == 137
    node.stop_pod(pod)
    restart(node)
    assert node.pod_status(pod).state == pb.SANDBOX_NOTREADY
    node.stop_pod(pod)


def test_an_exec_whose_daemon_is_killed_is_ended(node: Node) -> None:
    pod = node.run_pod("exec")
    container = node.start(node.create(pod, "main", "sleep", "1000"))
    client = node.daemon.client
    request = pb.ExecSyncRequest(container_id=container, cmd=["sleep", "2345"])
    call = client.runtime.ExecSync.future(request)
    deadline = time.monotonic() + 10
    while "sleep 2345" not in node.exec(container, "ps", "-o", "args").stdout.decode():
        assert time.monotonic() < deadline
    node.daemon.kill()
    assert call.exception() is not None
    node.daemon.start()
    assert "sleep 2345" not in node.exec(container, "ps", "-o", "args").stdout.decode()
    assert node.status(container).state == pb.CONTAINER_RUNNING


def test_containers_outlive_their_launcher(node: Node) -> None:
    pod = node.run_pod(node.pod_config("launcher", pid=pb.POD))
    old = node.start(node.create(pod, "old", "sh", "-c", "trap 'exit 5' TERM; echo up; sleep 1000 & wait"))
    node.wait_for_log(old, "up")
    os.kill(int((node.daemon.run / "launcher.pid").read_text().split()[0]), signal.SIGKILL)
    new = node.start(node.create(pod, "new", "sh", "-c", "exit 6"))
    assert node.wait(new).exit_code == 6
    assert node.exec(old, "echo", "here").stdout == b"here\n"
    node.stop(old, 30)
    assert node.status(old).exit_code == 5


def kill_launcher(node: Node) -> None:
    """The launcher is gone, and another has taken its place."""
    file = node.daemon.run / "launcher.pid"
    before = file.read_text()
    os.kill(int(before.split()[0]), signal.SIGKILL)
    deadline = time.monotonic() + 20
    while file.read_text() == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_exec_outlives_its_launcher(node: Node) -> None:
    pod = node.run_pod("exec-launcher")
    container = node.start(node.create(pod, "main", "sleep", "1000"))
    client = node.daemon.client
    command = ["sh", "-c", "touch /there; while [ -e /there ]; do usleep 10000; done; echo end; exit 4"]
    call = client.runtime.ExecSync.future(pb.ExecSyncRequest(container_id=container, cmd=command))
    deadline = time.monotonic() + 10
    while node.exec(container, "test", "-e", "/there").exit_code:
        assert time.monotonic() < deadline
    kill_launcher(node)
    assert node.exec(container, "rm", "/there").exit_code == 0
    result = call.result(timeout=20)
    assert (result.stdout, result.exit_code) == (b"end\n", 4)


def test_after_a_reboot_nothing_runs_and_everything_says_so(node: Node) -> None:
    pod = node.run_pod("reboot")
    ran = node.start(node.create(pod, "ran", "sleep", "1000"))
    ended = node.start(node.create(pod, "ended", "sh", "-c", "exit 3"))
    created = node.create(pod, "created", "true")
    node.wait(ended)
    node.daemon.kill()
    reboot(node.daemon)
    node.daemon.start()
    assert node.pod_status(pod).state == pb.SANDBOX_NOTREADY
    status = node.status(ran)
    assert (status.state, status.exit_code, status.reason) == (pb.CONTAINER_EXITED, 255, "Unknown")
    assert node.status(ended).exit_code == 3
    assert node.status(created).state == pb.CONTAINER_CREATED
    node.refused("FAILED_PRECONDITION", "NOTREADY", node.start, created)
    other = node.run_pod(node.pod_config("reboot", attempt=1))
    assert node.wait(node.start(node.create(other, "again", "true"))).exit_code == 0


def reboot(daemon: Daemon) -> None:
    """As far as a record can tell: the facts are of another boot. What still runs belongs to nobody then, and has to go."""
    with closing(sqlite3.connect(daemon.run / "boot.db", isolation_level=None)) as database:
        database.execute("UPDATE boot SET id = 'an earlier boot'")


def test_two_daemons_do_not_share_a_directory(node: Node) -> None:
    second = subprocess.run(node.daemon.command(), capture_output=True, text=True, timeout=30, check=False)
    assert second.returncode != 0
    assert "another daemon has it" in second.stderr
