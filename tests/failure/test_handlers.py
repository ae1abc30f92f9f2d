"""Daemon, launcher and keeper killed while other runtimes make, run and take away containers: nothing is lost, doubled or left."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tests.support import leaks
from tests.support.handlers import COMMANDS, HANDLERS, NAMES, gone, kill_launcher, main_pid, running, settings
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("handk", settings=settings()) as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    if not shared.daemon.answers():
        shared.daemon.start()
    shared.remove_all()
    assert shared.settled() == []


@pytest.fixture(params=HANDLERS)
def handler(request: pytest.FixtureRequest) -> str:
    """Each handler's name."""
    return str(request.param)


def test_the_daemon_is_killed(node: Node, handler: str) -> None:
    pod, lasting = running(node, handler, "sh", "-c", "while true; do echo tick; sleep 0.05; done")
    ending = node.start(node.create(pod, "ending", "sh", "-c", "sleep 1; exit 42"))
    created = node.create(pod, "created", "sh", "-c", "exit 6")
    node.wait_for_log(lasting, "tick")
    node.daemon.kill()
    time.sleep(1.5)
    node.daemon.start()
    assert node.wait(ending).exit_code == 42
    assert node.exec(lasting, "echo", "here").stdout == b"here\n"
    assert node.wait(node.start(created)).exit_code == 6
    node.stop(lasting, 0)
    assert node.status(lasting).exit_code == 137
    for container in (lasting, ending, created):
        gone(node, container)


def test_the_launcher_is_killed(node: Node, handler: str) -> None:
    pod, container = running(node, handler, "sh", "-c", "read code; exit $code", stdin=True)
    kill_launcher(node)
    assert node.exec(container, "echo", "here").stdout == b"here\n"
    with open(node.daemon.run / "containers" / container / "stdin", "wb") as fifo:
        fifo.write(b"11\n")
    assert node.wait(container).exit_code == 11
    after = node.start(node.create(pod, node.container_config("after", "sh", "-c", "exit 12")))
    assert node.wait(after).exit_code == 12


def test_the_keeper_is_killed(node: Node) -> None:
    """What another runtime leaves behind comes to the node's init from then on, since the launcher's ancestor is gone: the kernel is asked."""
    pod, before = running(node, "runc", "sh", "-c", "read code; exit $code", stdin=True)
    keeper = leaks.processes()
    ours = [p.pid for p in keeper if p.name == "tare-keeper" and str(node.daemon.run) in p.command.split(" ")]
    assert len(ours) == 1
    os.kill(ours[0], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while "another one" not in node.daemon.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    after = node.start(node.create(pod, node.container_config("after", "sh", "-c", "sleep 0.5; exit 12")))
    with open(node.daemon.run / "containers" / before / "stdin", "wb") as fifo:
        fifo.write(b"11\n")
    told = tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) >= (6, 15)
    assert [node.wait(one).exit_code for one in (before, after)] == ([11, 12] if told else [255, 255])
    assert node.exec(node.start(node.create(pod, "more", "sleep", "1000")), "sh", "-c", "exit 3").exit_code == 3


@pytest.mark.parametrize("action", ["kill", "kill-launcher"])
@pytest.mark.parametrize("when", ["cgroup.after", "process.before", "process.after", "record.after"])
def test_a_start_that_is_cut_off_between_its_steps(node: Node, when: str, action: str) -> None:
    """The daemon or the launcher is killed; the next call, or the next daemon, brings the start to its end."""
    node.daemon.stop()
    node.daemon.start({"TARE_FAILPOINTS": f"StartContainer.{when}={action}"})
    pod = node.run_pod(next(NAMES), handler="runc")
    container = node.create(pod, "main", "sh", "-c", "echo up; exit 5")
    try:
        node.start(container)
    except CallFailed as error:
        assert error.status == "UNAVAILABLE"
        if action == "kill":
            assert node.daemon.process is not None and node.daemon.process.wait(10) == -signal.SIGKILL
            node.daemon.start()
        node.start(container)
    assert node.wait(container).exit_code == 5
    assert node.log(container) == ["up"]
    node.remove_pod(pod)
    assert node.settled() == []
    node.daemon.stop()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Path]]:
    """A node with a runtime that can be held before or after one of its commands: by a file of the name before-COMMAND or after-COMMAND
    in a directory. It says by a file of the name at-… that it is there."""
    base = tmp_path_factory.mktemp("slow")
    program = base / "runc"
    program.write_text(SLOW.format(base=base, runc=COMMANDS["runc"]))
    program.chmod(0o755)
    with busy_node("slow", settings=f'[runtime.handlers.slow]\npath = "{program}"\n') as node:
        yield node, base


SLOW = """#!/bin/sh
for word; do case $word in create|start|delete|exec) command=$word; break;; esac; done
hold() {{
    if [ -e {base}/$1-$command ]; then
        touch {base}/at-$1-$command
        while [ -e {base}/$1-$command ]; do sleep 0.01; done
    fi
}}
hold before
{runc} "$@" || exit
hold after
"""


@pytest.mark.parametrize("action", ["daemon", "launcher", "both"])
@pytest.mark.parametrize("point", ["before-create", "after-create", "before-start", "after-start"])
def test_killed_in_the_middle_of_a_command(slow: tuple[Node, Path], point: str, action: str) -> None:
    """Whatever the runtime was doing is undone or taken over: the container runs once, and ends with its code."""
    node, base = slow
    pod = node.run_pod(next(NAMES), handler="slow")
    container = node.create(pod, "main", "sh", "-c", "echo up; sleep 0.3; exit 5")
    (base / point).touch()
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(node.start, container)
        wait_for(base / f"at-{point}")
        if action in ("launcher", "both"):
            kill_launcher(node)
        if action in ("daemon", "both"):
            node.daemon.kill()
        (base / point).unlink()
        (base / f"at-{point}").unlink()
        try:
            call.result()
        except CallFailed as error:
            assert action != "launcher" and error.status == "UNAVAILABLE"
    if action != "launcher":
        node.daemon.start()
        if node.status(container).state == pb.CONTAINER_CREATED:
            node.start(container)
    assert node.wait(container).exit_code == 5
    assert node.log(container) == ["up"]
    node.remove_pod(pod)
    assert node.settled() == []


@pytest.mark.parametrize("action", ["daemon", "launcher"])
@pytest.mark.parametrize("point", ["before-delete", "after-delete"])
def test_killed_while_a_container_is_taken_away(slow: tuple[Node, Path], point: str, action: str) -> None:
    node, base = slow
    pod = node.run_pod(next(NAMES), handler="slow")
    (base / point).touch()
    container = node.start(node.create(pod, "main", "sh", "-c", "echo up; exit 5"))
    wait_for(base / f"at-{point}")
    assert node.wait(container).exit_code == 5
    if action == "launcher":
        kill_launcher(node)
    else:
        node.daemon.kill()
    (base / point).unlink()
    (base / f"at-{point}").unlink()
    if action == "daemon":
        node.daemon.start()
    gone(node, container)
    assert (node.status(container).exit_code, node.log(container)) == (5, ["up"])
    node.remove_pod(pod)
    assert node.settled() == []


def test_an_exec_whose_daemon_is_killed(slow: tuple[Node, Path]) -> None:
    """Nobody waits for it any more: it ends, with what it started."""
    node, _ = slow
    pod = node.run_pod(next(NAMES), handler="slow")
    container = node.start(node.create(pod, "main", "sleep", "1000"))
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(node.exec, container, "sh", "-c", "touch /began; sleep 3000 & sleep 4000")
        while node.exec(container, "test", "-e", "/began").exit_code:
            time.sleep(0.01)
        node.daemon.kill()
        with pytest.raises(CallFailed):
            call.result()
    node.daemon.start()
    assert not re.search("sleep [34]000", node.exec(container, "ps", "-o", "args").stdout.decode())
    assert not [name for name in os.listdir(node.daemon.run / "tasks") if name != task(node, container)]
    node.remove_pod(pod)
    assert node.settled() == []


def task(node: Node, container: str) -> str:
    """The name of the marker of a container's main process."""
    pid = main_pid(node, container)
    return next(name for name in os.listdir(node.daemon.run / "tasks") if name.startswith(f"{pid}."))


def wait_for(path: Path) -> None:
    """Until there is such a file."""
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
