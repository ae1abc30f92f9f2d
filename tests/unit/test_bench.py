"""The benchmark's arithmetic, and its smallest of programs."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from bench.images import pause_program
from bench.measure import Samples
from bench.report import per_pod, rows, spread, summary


def samples(factor: float) -> Samples:
    found = Samples(start=[factor * n / 1000 for n in (1, 2, 3)], execs=[factor / 1000], cpu_lifecycle=factor * 0.03)
    found.memory_empty = {"daemon": 40 << 20}
    found.memory_full = {"daemon": 40 << 20, "shim": int(factor * (10 << 20)), "workload": 5 << 20}
    found.pods = 10
    return found


def test_a_spread_is_in_milliseconds() -> None:
    assert spread([0.003, 0.001, 0.002]) == {"p50": 2.0, "min": 1.0, "p90": 3.0}
    assert spread([]) == {"p50": 0.0, "min": 0.0, "p90": 0.0}


def test_memory_for_each_pod_leaves_the_workload_out() -> None:
    assert per_pod(samples(1)) == {"daemon": 0, "shim": 1 << 20, "workload": 1 << 19}
    assert summary(samples(1))["memory_per_pod_total"] == 1 << 20
    assert summary(samples(1))["cpu_per_lifecycle_ms"] == 10.0


def test_ratios_say_how_many_times_more_the_peer_takes() -> None:
    table = {row[0]: row[1:] for row in rows({"tare": summary(samples(1)), "containerd": summary(samples(6))})}
    assert table["pod with a running container, p50"] == ["2.00 ms", "12.00 ms", "6.0×"]
    assert table["memory for one more idle pod"] == ["1.00 MB", "6.00 MB", "6.0×"]
    assert table["stop and remove, p50"] == ["0.00 ms", "0.00 ms", "-"]
    assert table["  shim: without pods, and for each"] == ["0.0 + 1.000 MB", "0.0 + 6.000 MB", ""]


def test_the_pause_program_waits_until_it_is_told_to_end(tmp_path: Path) -> None:
    path = tmp_path / "pause"
    path.write_bytes(pause_program(os.uname().machine))
    path.chmod(0o755)
    with subprocess.Popen([path]) as process:
        process.terminate()
        assert process.wait(10) == -signal.SIGTERM
    with subprocess.Popen([path]) as process:
        try:
            state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            assert state in "SR"
        finally:
            process.kill()
