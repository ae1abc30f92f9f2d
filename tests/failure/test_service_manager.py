"""What a service manager keeps for us and hears of us: terminals, open inputs and loggers' pipes survive the death of all that is ours.

The manager is played by the test; the same under systemd itself is in `tests/vm/systemd_service.py`.
"""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tare.cri.v1 import api_pb2 as pb
from tare.handlers.manager import LOST
from tests.support import leaks
from tests.support.images import busybox_image
from tests.support.node import Node
from tests.support.registry import Registry
from tests.support.service_manager import Supervised

pytestmark = pytest.mark.root

COUNTS = ("sh", "-c", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done")
NUMBERS = itertools.count()
READS = ("sh", "-c", "while read word; do echo got $word; done; echo over")


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="tare-sm-", dir="/var/lib") as name:
        base = Path(name)
        with Registry(base / "registry") as registry, Supervised(base / "tare", watchdog=2.0) as daemon:
            registry.push(busybox_image(base / "busybox"), "tests/busybox:1")
            made = Node(daemon, f"{registry.url}/tests/busybox:1")
            made.pull()
            yield made


@pytest.fixture
def daemon(node: Node) -> Supervised:
    assert isinstance(node.daemon, Supervised)
    return node.daemon


@pytest.fixture
def three(node: Node) -> Iterator[dict[str, str]]:
    """Containers that run: one with a terminal, one whose input is held open, one with neither."""
    pod = node.run_pod(f"lasting-{next(NUMBERS)}")
    configs = {
        "terminal": node.container_config("terminal", *COUNTS, tty=True, stdin=True),
        "input": node.container_config("input", *READS, stdin=True),
        "plain": node.container_config("plain", *COUNTS),
    }
    yield {name: node.start(node.create(pod, config)) for name, config in configs.items()}
    node.remove_all()
    assert node.settled() == []


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.01)


def wanted(node: Node, three: dict[str, str]) -> set[str]:
    """What is to be kept."""
    groups = os.listdir(node.daemon.run / "loggers")
    return {f"tty/{three['terminal']}", f"fifo/{three['input']}/stdin", *(f"logger/{group}" for group in groups)}


def ours(node: Node) -> list[int]:
    """Keeper, launcher and loggers."""
    return [
        process.pid
        for process in leaks.processes()
        if str(node.daemon.run) in process.command.split(" ") and process.name.startswith("tare-")
    ]


def goes_on(node: Node, three: dict[str, str]) -> None:
    """Containers run, and what they say is whole in their logs."""
    for name in ("terminal", "plain"):
        seen = len(node.said(three[name]))
        until(lambda name=name, seen=seen: len(node.said(three[name])) > seen + 5, f"more of {name}")  # type: ignore[misc]
        lines = [int(line) for line in node.said(three[name])]
        assert lines == list(range(1, len(lines) + 1)), name
    assert "over" not in node.said(three["input"])
    for container in three.values():
        assert node.status(container).state == pb.CONTAINER_RUNNING
    assert node.exec(three["plain"], "echo", "in").stdout == b"in\n"


def test_it_hears_of_readiness_and_again_and_again_that_the_loop_turns(daemon: Supervised) -> None:
    assert "READY=1" in daemon.said
    for _ in range(3):
        daemon.await_word("WATCHDOG=1", len(daemon.said))
    assert any(word.startswith("STATUS=") and word.endswith("pods") for word in daemon.said)
    before = len(daemon.said)
    assert daemon.stop()
    daemon.await_word("STOPPING=1", before)
    daemon.start()
    daemon.await_word("READY=1", before)


def test_one_that_is_ended_because_it_hangs_tells_where(daemon: Supervised) -> None:
    process = daemon.process
    assert process is not None
    process.send_signal(signal.SIGABRT)  # as a watchdog does
    assert process.wait(30) == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in daemon.log.read_text() and "asyncio" in daemon.told()
    daemon.start()


def test_it_keeps_what_dies_with_its_last_descriptor(node: Node, daemon: Supervised, three: dict[str, str]) -> None:
    until(lambda: daemon.names() == wanted(node, three), "the keeping of all")
    assert sum(name.startswith("logger/") for name, _ in daemon.store) == 2  # both ends of the pipe
    node.stop(three["terminal"], timeout=0)
    node.stop(three["input"], timeout=0)
    until(lambda: all(name.startswith("logger/") for name in daemon.names()), "the letting go")


def test_all_of_ours_killed_together(node: Node, daemon: Supervised, three: dict[str, str]) -> None:
    until(lambda: daemon.names() == wanted(node, three), "the keeping of all")
    dead = ours(node)
    assert len(dead) >= 3
    daemon.kill()
    for pid in dead:
        os.kill(pid, signal.SIGKILL)
    daemon.start()
    assert not set(dead) & set(ours(node))
    goes_on(node, three)
    assert daemon.names() == wanted(node, three)
    for container in three.values():
        node.stop(container, timeout=0)
        # Whoever waited for it is dead, and no daemon held it by a pidfd when it was started.
        status = node.wait(container)
        assert (status.exit_code, status.reason) in ((137, "Error"), (255, "Unknown"))
    until(lambda: all(name.startswith("logger/") for name in daemon.names()), "the letting go")


def test_a_daemon_that_loses_its_keeper_makes_way_for_one_that_gets_what_is_kept(
    node: Node, daemon: Supervised, three: dict[str, str]
) -> None:
    until(lambda: daemon.names() == wanted(node, three), "the keeping of all")
    before = daemon.process
    assert before is not None
    loggers = [p.pid for p in leaks.processes() if p.pid in ours(node) and p.name in ("tare-logger", "tare-keeper")]
    for pid in loggers:
        os.kill(pid, signal.SIGKILL)
    assert before.wait(30) == LOST
    daemon.start()
    goes_on(node, three)


def test_one_that_has_let_go_of_everything_gets_it_anew(node: Node, daemon: Supervised, three: dict[str, str]) -> None:
    """As after `systemctl stop`: the keeper has lived on."""
    until(lambda: daemon.names() == wanted(node, three), "the keeping of all")
    daemon.kill()
    for _, fd in daemon.store:
        os.close(fd)
    daemon.store = []
    daemon.start()
    until(lambda: daemon.names() == wanted(node, three), "the keeping of all again")
    goes_on(node, three)
