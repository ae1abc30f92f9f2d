"""What never answers, all of it at once: other pods' calls complete while it lasts, and each call that waits for it ends and says for what.

a file system that answers nobody      a container is made from it
one from which nobody comes back       a process in it cannot be killed (state D), and its container is stopped
a registry that stalls                 an image is pulled
a logger that is stopped               a container is started, and another writes more than its pipe holds
a container that is stopped            and is to end
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tests.support import leaks
from tests.support.chaos import written
from tests.support.hang import hanging, stuck
from tests.support.node import Node, busy_node, rows
from tests.support.proxy import Asked, FaultProxy

pytestmark = pytest.mark.root
SETTINGS = "[runtime]\npods_per_logger = 1\n[images]\nprogress_timeout = 5\n"
SECONDS = 120.0
EACH = 15.0  # for a pod's whole life while others hang, on a loaded machine


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with busy_node("hang", settings=SETTINGS) as found:
        yield found


def until(holds: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def others_go_on(node: Node, name: str) -> None:
    """A pod's whole life, within the time that nobody has to wait for anybody."""
    began = time.monotonic()
    pod = node.run_pod(name)
    container = node.start(
        node.create(pod, "main", "sh", "-c", "trap 'exit 4' TERM; echo up; while :; do sleep 0.05; done")
    )
    node.wait_for_log(container, "up")
    assert node.exec(container, "echo", "here").stdout == b"here\n"
    node.stop(container, 10)
    assert node.status(container).exit_code == 4
    node.stop_pod(pod)
    node.remove_pod(pod)
    assert time.monotonic() - began < EACH


def with_volume(node: Node, name: str, source: Path, *command: str) -> pb.ContainerConfig:
    return node.container_config(
        name,
        *command,
        mounts=[pb.Mount(container_path="/far", host_path=str(source), propagation=pb.PROPAGATION_PRIVATE)],
    )


def logger_of(node: Node, container: str) -> int:
    """The PID of the logger that serves a container."""
    ((_, facts),) = rows(node.daemon.run / "boot.db", f"container_facts WHERE key = '{container}'")
    assert isinstance(facts, bytes | str)
    group = node.daemon.run / "loggers" / json.loads(facts)["group"]
    return int((group / "pid").read_text().split()[0])


def state_of(command: str) -> tuple[int, str]:
    """The process with that command line, and the letter of its state."""
    for process in leaks.processes():
        if process.command.strip() == command:
            return process.pid, Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return 0, ""


def failed(call: Future[Any], *words: str) -> None:
    """It ended in time, and says so."""
    with pytest.raises(CallFailed) as caught:
        call.result(timeout=SECONDS)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.timeout(400)
def test_each_hangs_alone(node: Node, tmp_path: Path) -> None:
    slow = node.run_pod("slow")
    mute = node.run_pod("mute")
    flood = node.start(node.create(mute, "flood", "sh", "-c", "echo up; sleep 1; seq 1 100000; exit 6"))
    node.wait_for_log(flood, "up")
    frozen = node.start(node.create(slow, "frozen", "sleep", "54321"))
    registry = node.image.partition("/")[0]
    released = Event()

    def stalls(asked: Asked) -> None:
        released.wait(SECONDS)

    with (
        ThreadPoolExecutor(8) as calls,
        FaultProxy(registry, stalls) as proxy,
        stuck(tmp_path / "stuck") as lost,
        hanging(tmp_path / "far") as far,
    ):
        asleep = node.start(node.create(slow, with_volume(node, "asleep", lost, "cat", "/far/never-answered")))
        until(lambda: state_of("cat /far/never-answered")[0], "nobody asks")
        pid = state_of("cat /far/never-answered")[0]
        logger = logger_of(node, flood)
        os.kill(logger, signal.SIGSTOP)
        os.kill(state_of("sleep 54321")[0], signal.SIGSTOP)
        try:
            late = node.create(mute, "late", "echo", "late")
            making = calls.submit(node.create, slow, with_volume(node, "far", far / "sub", "true"))
            stopping = calls.submit(node.stop, asleep, 0)
            pulling = calls.submit(node.pull, f"{proxy.url}/tests/busybox:1")
            starting = calls.submit(node.start, late)
            ending = calls.submit(node.stop, frozen, 1)
            held: list[Future[Any]] = [making, stopping, pulling, starting]
            others_go_on(node, "beside")
            assert state_of("cat /far/never-answered") == (pid, "D")
            assert not making.done() and not stopping.done() and not starting.done()
            while not all(call.done() for call in held):
                others_go_on(node, "again")
            failed(making, "look at mount sources", str(far), "the launcher has not answered")
            failed(stopping, asleep, "at step end", f"PIDs {pid} are still there")
            failed(pulling, "did not answer in time")
            failed(starting, f"write the log of container {late}", "at step logger of group", "it does not answer")
            ending.result(timeout=SECONDS)
            assert node.status(frozen).exit_code == 137
            assert node.status(flood).state == pb.CONTAINER_RUNNING  # it waits for room in its pipe
        finally:
            released.set()
            os.kill(logger, signal.SIGCONT)
    assert node.wait(asleep).exit_code in (1, 137)
    assert node.wait(flood).exit_code == 6
    log = Path(node.status(flood).log_path)
    wanted = [b"up", *(b"%d" % number for number in range(1, 100_001))]
    until(lambda: len(written(log)["stdout"]) >= len(wanted), "what it wrote is not in the log")
    assert written(log)["stdout"] == wanted
    node.remove_all()
    until(
        lambda: node.strays() == [], "the start that could not be undone is not taken back"
    )  # tried again after some seconds
