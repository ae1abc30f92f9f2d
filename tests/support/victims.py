"""Who is killed at a point of an operation: the step is held there (failpoint `hold`), and goes on, if anybody is left, when they are dead.

daemon ─ before a step ─► run/held ─► all of them are stopped, so that none sees another die ─► SIGKILL ─► run/held goes
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pkgutil
import signal
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import tare
from tare.state.operations import Operation
from tests.support import leaks
from tests.support.daemon import Daemon

NAMES = {"launcher": "tare-launcher", "logger": "tare-logger", "keeper": "tare-keeper"}
ALONE = (("daemon",), ("launcher",))
OTHERS = (
    ("logger",),
    ("keeper",),
    ("daemon", "launcher"),
    ("daemon", "logger"),
    ("keeper", "launcher"),
    ("daemon", "keeper", "launcher", "logger"),
)
OF_A_TRIP = frozenset(
    {
        "PullImage",
        "RunPodSandbox",
        "CreateContainer",
        "StartContainer",
        "UpdateContainerResources",
        "UpdatePodSandboxResources",
        "Exec",
        "StopContainer",
        "StopPodSandbox",
        "RemoveContainer",
        "RemovePodSandbox",
        "RemoveImage",
        "CollectImages",
    }
)
"""What happens on the way of a pod from the pull of its image to the removal of that."""
CHECKPOINTS = ("CheckpointContainer", "CheckpointPod", "RestorePod", "RestoreContainer", "StartRestored")
ELSEWHERE = ("LoadImage", "Repair")
EVERY = 7  # of the points of CHECKPOINTS one in so many is tried
DEATH_SECONDS = 20.0
NOT_IMPORTED = ("tare.__main__", "tare.launch")  # what runs when it is imported; what is no part of the daemon


def operations() -> dict[str, Operation[Any]]:
    """Every operation there is in the package, by its name."""
    found: dict[str, Operation[Any]] = {}
    for module in pkgutil.walk_packages(tare.__path__, "tare."):
        if module.name.startswith(NOT_IMPORTED):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, Operation):
                assert found.setdefault(value.name, value) is value, f"two operations are called {value.name}"
    return found


def points(operation: Operation[Any]) -> list[str]:
    """Every place of an operation at which something can happen."""
    return [f"{operation.name}.{step.name}.{when}" for step in operation.steps for when in ("before", "after")]


def ours(daemon: Daemon, victim: str) -> list[int]:
    """The instance's processes of a kind."""
    if victim == "daemon":
        return [daemon.process.pid] if daemon.process is not None else []
    run = str(daemon.run)
    return [p.pid for p in leaks.processes() if p.name == NAMES[victim] and run in p.command.split(" ")]


def kill(daemon: Daemon, victims: Sequence[str]) -> list[int]:
    """All of these die at once. Who they were; the daemon is left to be waited for."""
    with contextlib.ExitStack() as held:
        found = []
        for pid in [pid for victim in victims for pid in ours(daemon, victim)]:
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                held.callback(os.close, pidfd)
                found.append((pid, pidfd))
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for _, pidfd in found:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, number)
    return [pid for pid, _ in found]


class Ambush:
    """Waits in a thread for the daemon to come to its point, and kills whoever is to die there. `killed`: who did, once it happened."""

    def __init__(self, daemon: Daemon, victims: Sequence[str]) -> None:
        self._daemon = daemon
        self._victims = victims
        self._flag = daemon.run / "held"
        self._over = threading.Event()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._wait)
        self.killed: list[int] | None = None

    def _wait(self) -> None:
        while not self._over.wait(0.005):
            if self._flag.exists():
                self.killed = kill(self._daemon, self._victims)
                deadline = time.monotonic() + DEATH_SECONDS
                while any(map(alive, self.killed)) and time.monotonic() < deadline:
                    time.sleep(0.005)
                self._flag.unlink()
                self._done.set()
                return

    def wait(self) -> None:
        """Until they are dead."""
        assert self._done.wait(DEATH_SECONDS)

    def __enter__(self) -> Ambush:
        self._flag.unlink(missing_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        self._flag.unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def in_turn(chosen: Iterable[Operation[Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """Each step once, before or after it, with one of the others: neighbours have different ones, and each comes before and after steps."""
    steps = [points(operation)[at : at + 2] for operation in chosen for at in range(0, 2 * len(operation.steps), 2)]
    return [(both[(index + index // len(OTHERS)) % 2], OTHERS[index % len(OTHERS)]) for index, both in enumerate(steps)]


def table() -> str:
    """The operations and their steps, what becomes of each that is cut off, and who dies at its points where all tests run, for the documentation."""
    lines = ["| operation | steps | cut off, it is | killed before and after each step |", "| --- | --- | --- | --- |"]
    for name, operation in sorted(operations().items()):
        steps = ", ".join(step.name for step in operation.steps)
        undone = any(step.undo is not None for step in operation.steps)
        then = "gone on with" if operation.finish else "taken back" if undone else "asked for again"
        who = "the daemon; the launcher; one of the others in turn"
        if name in CHECKPOINTS:
            who = f"one of all in turn, at one point in {EVERY}"
        elif name in ELSEWHERE:
            who = "one of all in turn"
        lines.append(f"| {name} | {steps} | {then} | {who} |")
    return "\n".join(lines) + "\n"
