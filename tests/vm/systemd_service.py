"""`tare install-service` and the daemon under systemd, in a guest that systemd runs: restarts, kills, its watchdog, what it keeps for us.

Named by the guest's selection alone: elsewhere there is no systemd to ask.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tare.cli.service import UNITS
from tare.cri.v1 import api_pb2 as pb
from tests.support import leaks
from tests.support.daemon import Daemon
from tests.support.images import busybox_image
from tests.support.node import Node
from tests.support.registry import Registry

pytestmark = pytest.mark.root

UNIT = "tare-under-test"
TARE = str(Path(sys.executable).parent / "tare")
COUNTS = ("sh", "-c", "n=0; while :; do n=$((n+1)); echo $n; sleep 0.2; done")
READS = ("sh", "-c", "while read word; do echo got $word; done; echo over")
WATCHDOG = 15
PATIENCE = 280.0


class Served(Daemon):
    """A daemon that is a service of the guest's systemd."""

    def start(self, environment: object = None) -> None:
        self.base.mkdir(mode=0o700, parents=True, exist_ok=True)
        (self.base / "config.toml").write_text(self.settings)
        paths = (f"--config={self.base}/config.toml", f"--root={self.root}", f"--run={self.run}")
        tare("install-service", f"--name={UNIT}", *paths, f"--watchdog={WATCHDOG}", "--now")
        self.served = True

    def stop(self) -> bool:
        tare("install-service", f"--name={UNIT}", "--uninstall")
        return True


def tare(*words: str) -> str:
    try:
        result = subprocess.run([TARE, *words], capture_output=True, text=True, timeout=PATIENCE, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(journal()) from error
    assert result.returncode == 0, result.stderr + journal()
    return result.stdout


def journal() -> str:
    """What the daemon has said, where there is a journal to ask."""
    command = ["journalctl", "--unit", UNIT, "--no-pager", "--lines=100"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def systemctl(*words: str) -> str:
    return subprocess.run(["systemctl", *words], check=True, capture_output=True, text=True, timeout=PATIENCE).stdout


def shown(name: str) -> str:
    return systemctl("show", UNIT, f"--property={name}").partition("=")[2].strip()


def main_pid() -> int:
    return int(shown("MainPID"))


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen\n{journal()}"
        time.sleep(0.1)


def started_again(node: Node, old: int, restarts: int) -> None:
    """Until systemd has started another daemon by itself, and that answers."""
    until(lambda: int(shown("NRestarts")) == restarts and shown("ActiveState") == "active", "another start")
    assert main_pid() not in (0, old)
    assert node.daemon.answers()


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with tempfile.TemporaryDirectory(prefix="tare-service-", dir="/var/lib") as name:
        base = Path(name)
        with Registry(base / "registry") as registry, Served(base / "tare") as daemon:
            registry.push(busybox_image(base / "busybox"), "tests/busybox:1")
            made = Node(daemon, f"{registry.url}/tests/busybox:1")
            made.pull()
            yield made
        assert not (UNITS / f"{UNIT}.service").exists()
        assert shown("LoadState") == "not-found"


@pytest.fixture(scope="module")
def three(node: Node) -> dict[str, str]:
    """Containers that run through all of the tests: one with a terminal, one whose input is held open, one with neither."""
    pod = node.run_pod("lasting")
    configs = {
        "terminal": node.container_config("terminal", *COUNTS, tty=True, stdin=True),
        "input": node.container_config("input", *READS, stdin=True),
        "plain": node.container_config("plain", *COUNTS),
    }
    return {name: node.start(node.create(pod, config)) for name, config in configs.items()}


def pids(node: Node, three: dict[str, str]) -> list[int]:
    found = []
    for container in three.values():
        answer = node.daemon.client.call(
            node.daemon.client.runtime.ContainerStatus, pb.ContainerStatusRequest(container_id=container, verbose=True)
        )
        assert answer.status.state == pb.CONTAINER_RUNNING
        found.append(int(answer.info["pid"]) if "pid" in answer.info else 0)
    return found


def all_goes_on(node: Node, three: dict[str, str]) -> None:
    """Containers run, what they say is whole in their logs and comes to be there, and there can be more of them."""
    for name in ("terminal", "plain"):
        seen = len(node.said(three[name]))
        until(lambda name=name, seen=seen: len(node.said(three[name])) > seen + 2, f"more from {name}")  # type: ignore[misc]
        lines = [int(line) for line in node.said(three[name])]
        assert lines == list(range(1, len(lines) + 1)), name
    assert node.status(three["input"]).state == pb.CONTAINER_RUNNING
    assert "over" not in node.said(three["input"])
    assert node.exec(three["plain"], "echo", "in").stdout == b"in\n"


def processes(node: Node) -> dict[str, list[int]]:
    """Keeper, launcher and loggers of this instance."""
    found: dict[str, list[int]] = {}
    for process in leaks.processes():
        if str(node.daemon.run) in process.command.split(" ") and process.name.startswith("tare-"):
            found.setdefault(process.name, []).append(process.pid)
    return found


def test_the_service_is_as_the_unit_says(node: Node) -> None:
    wanted = {
        "Type": "notify",
        "KillMode": "process",
        "Delegate": "yes",
        "NotifyAccess": "all",
        "WatchdogUSec": f"{WATCHDOG}s",
        "Restart": "always",
        "FileDescriptorStoreMax": "512",
        "UnitFileState": "enabled",
        "ActiveState": "active",
    }
    assert {name: shown(name) for name in wanted} == wanted
    assert "pods" in shown("StatusText")
    assert subprocess.run(["systemd-analyze", "verify", str(UNITS / f"{UNIT}.service")], check=False).returncode == 0


def test_a_restart_keeps_pods_and_processes(node: Node, three: dict[str, str]) -> None:
    before, helpers, old = pids(node, three), processes(node), main_pid()
    until(
        lambda: int(shown("NFileDescriptorStore")) >= 4, "the terminal, the inputs and the logger's pipe in the store"
    )
    systemctl("restart", UNIT)
    assert main_pid() != old and pids(node, three) == before and processes(node) == helpers
    assert int(shown("NFileDescriptorStore")) >= 4
    all_goes_on(node, three)


def test_all_of_ours_killed_together(node: Node, three: dict[str, str]) -> None:
    """Terminals, inputs and the loggers' pipes are in systemd's store: nothing hangs up, no line is lost."""
    before, old, restarts = pids(node, three), main_pid(), int(shown("NRestarts"))
    ours = [pid for found in processes(node).values() for pid in found]
    assert len(ours) >= 3
    for pid in (old, *ours):
        os.kill(pid, signal.SIGKILL)
    started_again(node, old, restarts + 1)
    assert pids(node, three) == before
    assert not set(ours) & {pid for found in processes(node).values() for pid in found}
    all_goes_on(node, three)


def test_a_daemon_that_hangs_is_started_again(node: Node, three: dict[str, str]) -> None:
    old, restarts = main_pid(), int(shown("NRestarts"))
    os.kill(old, signal.SIGSTOP)
    started_again(node, old, restarts + 1)
    all_goes_on(node, three)


def test_pods_end_and_the_store_is_emptied(node: Node, three: dict[str, str]) -> None:
    for container in three.values():
        node.stop(container, timeout=0)
        status = node.wait(container)
        # Who waited for them was killed: the kernel knows from 6.15 on.
        assert (status.exit_code, status.reason) in ((137, "Error"), (255, "Unknown"))
    node.remove_all()
    assert node.settled() == []
    until(lambda: int(shown("NFileDescriptorStore")) <= 2, "an empty store, but for the logger's pipe")
