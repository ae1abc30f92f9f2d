"""The benchmark measures Tare alone, in small: so that it still runs when somebody needs its numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.root, pytest.mark.slow]
ROOT = Path(__file__).parents[2]


def test_every_number_is_measured(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    options = ["--only", "tare", "-n", "2", "-e", "2", "-i", "2", "--json", str(numbers)]
    command = [sys.executable, "-m", "bench.compare", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(numbers.read_text())["runtimes"]["tare"]
    assert found["samples"] == 2
    assert found["start_ms"]["min"] > 0
    assert found["exec_ms"]["min"] > 0
    assert found["stop_ms"]["min"] > 0
    assert found["cpu_per_lifecycle_ms"] > 0
    assert {"daemon", "keeper", "launcher", "logger", "workload"} <= set(found["memory_with_pods"])


def test_streams_are_measured() -> None:
    options = ["--only", "tare", "-s", "4", "-n", "1", "-e", "2"]
    command = [sys.executable, "-m", "bench.streaming", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for number in ("ExecSync of true, ms", "in, s", "out, s", "forward, CPU s"):
        assert number in result.stdout
