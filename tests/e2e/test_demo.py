"""The README's first command: the demo tells its story, and leaves nothing when it is interrupted."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "scripts.demo"]


def test_the_demo_shows_everything_it_promises() -> None:
    result = subprocess.run(COMMAND, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for promised in ("localhost says: Hello from nginx", "Exit code 0", "reason OOMKilled", "PID", "asked for /: 200"):
        assert promised in result.stdout
    assert "Nothing is left" in result.stdout


@pytest.mark.parametrize("chapter", ["1.", "2.", "4."])
def test_interrupted_in_any_chapter_it_leaves_nothing(chapter: str) -> None:
    process = subprocess.Popen(COMMAND, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(chapter):
            process.send_signal(signal.SIGINT)
            break
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, out + errors
    assert "Nothing is left" in out
