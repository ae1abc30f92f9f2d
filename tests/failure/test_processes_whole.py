"""Launcher, keeper, and all that is ours at once killed under a daemon's pods: codes, reasons, logs and what can be done afterwards."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support import leaks
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root

MIB = 1 << 20
ENDS = ("sh", "-c", "n=0; until [ -e /end ]; do n=$((n+1)); echo $n; sleep 0.02; done; exit 33")
GREEDY = ("sh", "-c", "until [ -e /end ]; do sleep 0.02; done; exec tail /dev/zero")
ASLEEP = ("sleep", "1000")
TELLS = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2]) >= (6, 15)
NUMBERS = iter(range(1000))


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("procs") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    yield shared
    shared.remove_all()
    assert shared.settled() == []


def ours(node: Node, *names: str) -> list[int]:
    """PIDs of keeper ("tare-keeper"), launcher, loggers."""
    found = [p for p in leaks.processes() if str(node.daemon.run) in p.command.split(" ")]
    return [process.pid for process in found if process.name in names]


def kill(*pids: int) -> None:
    """SIGKILL for all, and wait for their end."""
    fds = [os.pidfd_open(pid) for pid in pids]
    for fd in fds:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    for fd in fds:
        assert select.select([fd], [], [], 30)[0]
        os.close(fd)


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.02)


def three(node: Node) -> dict[str, str]:
    """Containers of one pod: one to end with 33, one to be killed for its memory, one to be stopped."""
    pod = node.run_pod(f"pod-{next(NUMBERS)}")
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=16 * MIB, memory_swap_limit_in_bytes=16 * MIB)
    configs = {
        "ends": node.container_config("ends", *ENDS),
        "greedy": node.container_config("greedy", *GREEDY, resources=limits),
        "asleep": node.container_config("asleep", *ASLEEP),
    }
    return {name: node.start(node.create(pod, config)) for name, config in configs.items()}


def end_well(node: Node, containers: dict[str, str], *, known: bool = True) -> None:
    """All that can be asked for works, and ends are as they were."""
    for container in containers.values():
        assert node.status(container).state == pb.CONTAINER_RUNNING
        assert node.exec(container, "echo", "in").stdout == b"in\n"
    writes_on(node, containers["ends"])
    for name in ("ends", "greedy"):
        assert node.exec(containers[name], "touch", "/end").exit_code in (0, 137)  # it may end before touch does
    ends, greedy = node.wait(containers["ends"]), node.wait(containers["greedy"])
    assert (ends.exit_code, ends.reason) == ((33, "Error") if known else (255, "Unknown"))
    assert greedy.reason == "OOMKilled" and greedy.exit_code == (137 if known else 255)
    lines = [int(line) for line in node.said(containers["ends"])]
    assert lines == list(range(1, len(lines) + 1))
    node.stop(containers["asleep"], timeout=0)
    asleep = node.wait(containers["asleep"])
    assert (asleep.exit_code, asleep.reason) == ((137, "Error") if known else (255, "Unknown"))
    for container in containers.values():
        node.remove(container)


def writes_on(node: Node, container: str) -> None:
    before = len(node.said(container))
    until(lambda: len(node.said(container)) > before + 5, "more of its output")


def test_the_launcher_is_killed_under_pods(node: Node) -> None:
    """Theirs are the keeper's then; execs that have begun go on, one that is being made fails or does; pods of before and after are alike."""
    before, [old] = three(node), ours(node, "tare-launcher")
    codes: list[int] = []

    def execute(seconds: str) -> None:
        codes.append(node.exec(before["asleep"], "sh", "-c", f"echo begun; sleep {seconds}; exit 7").exit_code)

    threads = [threading.Thread(target=execute, args=("2",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: sum(p.command == "sleep 2" for p in leaks.processes()) == 2, "the execs")
    kill(old)
    for thread in threads:
        thread.join()
    assert codes == [7, 7]
    until(lambda: ours(node, "tare-launcher") not in ([], [old]), "another launcher")
    after = three(node)
    end_well(node, before)
    end_well(node, after)


def test_the_keeper_is_killed_under_pods(node: Node) -> None:
    before, [old] = three(node), ours(node, "tare-keeper")
    kill(old)
    until(lambda: ours(node, "tare-keeper") not in ([], [old]), "another keeper")
    after = three(node)
    end_well(node, before)
    end_well(node, after)


def test_all_of_ours_are_killed_together(node: Node) -> None:
    """Nobody waits for the containers any more but the kernel, which remembers for who holds a pidfd, from 6.15 on."""
    before = three(node)
    main = node.daemon.process
    assert main is not None
    kill(main.pid, *ours(node, "tare-keeper", "tare-launcher", "tare-logger"))
    node.daemon.kill()
    node.daemon.start()
    after = three(node)
    end_well(node, before, known=TELLS)
    end_well(node, after)


def test_one_that_ends_while_nobody_is_there(node: Node) -> None:
    """Its code is unknown, and said to be; what it wrote is in its log as far as it was read."""
    container = node.start(node.create(node.run_pod(f"pod-{next(NUMBERS)}"), "main", *ENDS))
    writes_on(node, container)
    [pid] = [p.pid for p in leaks.processes() if p.name == "sh" and container in cgroups(p.pid)]
    main = node.daemon.process
    assert main is not None
    kill(main.pid, *ours(node, "tare-keeper", "tare-launcher", "tare-logger"))
    Path(f"/proc/{pid}/root/end").touch()
    until(lambda: not Path(f"/proc/{pid}").exists(), "its end")  # unreaped, it would tell its code itself
    node.daemon.kill()
    node.daemon.start()
    status = node.wait(container)
    assert (status.exit_code, status.reason) == (255, "Unknown")
    lines = [int(line) for line in node.said(container)]
    assert lines == list(range(1, len(lines) + 1))


def cgroups(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return ""
