"""`python -m bench.oci`: `tare oci run` of `true` beside runc and crun, by turns in one run, as ratios of each one's fastest quarter.

The bundle is what `spec` makes, with busybox as its root. crun refuses machines with cgroup v1 and v2 side by side; there it is
tried with `--cgroup-manager=disabled` too, and what it says is part of the output.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.oci import Bundle, command

CANDIDATES = ("tare", "runc", "crun")


@dataclass(slots=True)
class Measured:
    """One runtime's runs: wall clock and CPU time of the command with its children, in milliseconds."""

    name: str
    argv: list[str]
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def run(self, number: int) -> None:
        """Run one container to its end."""
        argv = [*self.argv, "run", f"bench-{os.getpid()}-{number}"]
        begun = time.perf_counter()
        pid = os.posix_spawn(argv[0], argv, os.environ)
        _, status, used = os.wait4(pid, 0)
        self.wall.append((time.perf_counter() - begun) * 1000)
        self.cpu.append((used.ru_utime + used.ru_stime) * 1000)
        if status:
            raise SystemExit(f"{self.name} ended with {os.waitstatus_to_exitcode(status)}")

    def quarter(self, values: list[float]) -> float:
        """The mean of the fastest quarter: what the machine does when nothing else is in the way."""
        return statistics.fmean(sorted(values)[: max(1, len(values) // 4)])


def usable(name: str, bundle: Path) -> Measured | str:
    """A runtime that runs the bundle here, or what it says instead."""
    if name != "tare" and shutil.which(name) is None:
        return "is not installed"
    said = ""
    for more in ([], ["--cgroup-manager=disabled"] if name == "crun" else []):
        argv = [*command(name), *more]
        done = subprocess.run(
            [*argv, "run", f"probe-{os.getpid()}"], cwd=bundle, capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return Measured(" ".join([name, *more]), argv)
        said = f"ends with {done.returncode}: {done.stderr.strip().splitlines()[-1] if done.stderr else 'nothing said'}"
        if name != "crun":
            break
    return said + (" (also with --cgroup-manager=disabled)" if name == "crun" else "")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("-n", type=int, default=60, help="containers of each runtime (60)")
    count = parser.parse_args().n
    with tempfile.TemporaryDirectory(prefix="tare-bench-") as directory:
        bundle = Bundle(Path(directory) / "bundle")
        bundle.write("/bin/true")
        os.chdir(bundle.path)
        found = {name: usable(name, bundle.path) for name in CANDIDATES}
        runtimes = [each for each in found.values() if isinstance(each, Measured)]
        if not runtimes:
            raise SystemExit(f"nothing runs here: {found}")
        for number in range(count):
            for runtime in runtimes[number % len(runtimes) :] + runtimes[: number % len(runtimes)]:
                runtime.run(number)
        os.chdir("/")
    first = runtimes[0]
    load = os.getloadavg()[0]
    print(
        f"{'':34} {'fastest quarter':>16} {'median':>8} {'ratio':>6} {'CPU':>8} {'ratio':>6}   (load average {load:.1f})"
    )
    for runtime in runtimes:
        wall, cpu = runtime.quarter(runtime.wall), runtime.quarter(runtime.cpu)
        ratio, second = wall / first.quarter(first.wall), cpu / first.quarter(first.cpu)
        middle = statistics.median(runtime.wall)
        print(f"{runtime.name:34} {wall:13.1f} ms {middle:5.1f} ms {ratio:6.2f} {cpu:5.1f} ms {second:6.2f}")
    for name, said in found.items():
        if isinstance(said, str):
            print(f"{name:34} {said}")


if __name__ == "__main__":
    main()
