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


def test_a_start_is_measured_beside_the_command_lines() -> None:
    command = [sys.executable, "-m", "bench.start", "-n", "2", "--beside", "runc"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = {line.partition("  ")[0]: line.split()[-1] for line in result.stdout.splitlines() if line}
    assert lines["StartContainer"] == "1.00" and float(lines["runc run"]) > 0
    assert float(lines["pod with a running container"]) > 1


def test_lists_events_and_rest_are_measured(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    options = ["--only", "tare", "-p", "2", "-n", "2", "-s", "1", "-c", "200", "--json", str(numbers)]
    command = [sys.executable, "-m", "bench.lists", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(numbers.read_text())["runtimes"]["tare"]
    assert len(found) == 13 and all(value > 0 for value in found.values()), found


def test_the_network_is_at_most_4_ms_and_5_times_faster_than_plugins(tmp_path: Path) -> None:
    """By the fastest of some pods: what the machine does meanwhile is not the network's."""
    numbers = tmp_path / "numbers.json"
    command = [sys.executable, "-m", "bench.network", "-n", "12", "--json", str(numbers)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(numbers.read_text())["networks"]
    embedded, plugins = found["embedded"], found["cni"]
    assert embedded["add_ms"]["min"] <= 4
    for what in ("add_ms", "delete_ms"):
        assert embedded[what]["min"] * 5 <= plugins[what]["min"], found
