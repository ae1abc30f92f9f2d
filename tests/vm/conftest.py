"""Guests begin when the tests have been collected, and run beside all others: emulation takes a core, which most tests leave free.

One guest at a time, in the order of GUESTS; the tests in `test_guests` wait for them, and come last. None outlives the session.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
GUEST_SECONDS = 900
END_SECONDS = 60
NICE = 5
GUESTS: dict[str, tuple[str, ...]] = {"v2": (), "systemd": ("--systemd",)}


class Guests:
    """Those that were asked for. `result` waits for one: its exit code, and all that it said."""

    def __init__(self, names: Sequence[str]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="tare-guests-")
        self._names = names
        self._codes: dict[str, int] = {}
        self._done = {name: threading.Event() for name in names}
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="guests")
        self._thread.start()

    def _run(self) -> None:
        for name in self._names:
            if not self._stopping.is_set():
                self._codes[name] = self._run_one(name)
            self._done[name].set()

    def _run_one(self, name: str) -> int:
        command = [sys.executable, "-m", "scripts.vm", f"--timeout={GUEST_SECONDS}", *GUESTS[name]]
        with self._output(name).open("wb") as output:
            self._process = subprocess.Popen(
                ["nice", "-n", str(NICE), *command],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return self._process.wait()  # with no descriptor more than before: tests count them

    def _output(self, name: str) -> Path:
        return Path(self._directory.name) / name

    def result(self, name: str) -> tuple[int, str]:
        """Once it has ended."""
        self._done[name].wait()
        return self._codes[name], self._output(name).read_text(errors="replace")

    def end(self) -> None:
        """Take down, in its own way, what still runs."""
        self._stopping.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
        self._thread.join(END_SECONDS)
        self._directory.cleanup()


RUNNING = pytest.StashKey[Guests]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Guests' tests come last."""
    items.sort(key=lambda item: item.path.parent == Path(__file__).parent)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin, where there is something to begin for."""
    asked = [name for name in GUESTS if any(item.nodeid.endswith(f"test_in_a_guest[{name}]") for item in session.items)]
    if asked and not session.config.option.collectonly:
        session.config.stash[RUNNING] = Guests(asked)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """However the session ends."""
    guests = session.config.stash.get(RUNNING, None)
    if guests is not None:
        guests.end()


@pytest.fixture
def guests(request: pytest.FixtureRequest) -> Guests:
    """Those of this session."""
    return request.config.stash[RUNNING]
