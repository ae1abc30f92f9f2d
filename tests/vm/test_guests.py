"""What needs another machine than this one: guests with pure control groups v2, under a plain init and under systemd.

Each guest runs its own selection of tests (`scripts/vm/selection.py`), and says which of them failed; one by itself: `./dev test-vm`.
Both run at the same time, after all other tests: emulation takes a core each.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

pytestmark = [pytest.mark.root, pytest.mark.slow]

REPOSITORY = Path(__file__).resolve().parents[2]
GUEST_SECONDS = 900
GUESTS = {"v2": (), "systemd": ("--systemd",)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A guest that runs, and what has come out of it so far."""

    process: subprocess.Popen[bytes]
    output: IO[bytes]

    def told(self) -> str:
        """Everything."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace")


@pytest.fixture(scope="module", name="runs")
def _runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[dict[str, Run]]:
    """Those that are asked for, all at once; none outlives the module."""
    directory = tmp_path_factory.mktemp("guests")
    asked = [name for name in GUESTS if any(item.nodeid.endswith(f"[{name}]") for item in request.session.items)]
    with ExitStack() as stack:
        runs = {}
        for name in asked:
            output = stack.enter_context((directory / name).open("w+b"))
            command = [sys.executable, "-m", "scripts.vm", f"--timeout={GUEST_SECONDS}", *GUESTS[name]]
            process = subprocess.Popen(
                command, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
            stack.callback(end, process)
            runs[name] = Run(process=process, output=output)
        yield runs


def end(process: subprocess.Popen[bytes]) -> None:
    """Take the guest down, in its own way, if it still runs."""
    process.terminate()
    process.wait(60)


@pytest.mark.timeout(GUEST_SECONDS + 120)
@pytest.mark.parametrize("name", GUESTS)
def test_in_a_guest(name: str, runs: dict[str, Run]) -> None:
    run = runs[name]
    code = run.process.wait()
    told = run.told()
    print(told)
    failed = [line for line in told.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert (code, failed) == (0, []), told[-2000:]
