"""`python -m bench.start`: a container's start through the daemon beside `run` of `true` by runc and crun, by turns in one run.

    RunPodSandbox … StartContainer    calls over CRI, from the request to the answer: when StartContainer answers, the program runs
    pod with a running container      the three together
    runc run, crun run                the command from its start to its end, with a bundle of `spec`, busybox as its root

Ratios are to StartContainer, of each one's fastest quarter. crun refuses machines with cgroup v1 and v2 side by side, and says so here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path

from bench.compare import benches, temporary, versions
from bench.measure import STEPS, Bench
from bench.oci import Measured, usable
from tare.cli.output import print_table
from tests.support.oci import Bundle

STARTED = "StartContainer"
TOGETHER = "pod with a running container"


def bundle(base: Path) -> Path:
    """What the command lines run, in whose directory they are."""
    made = Bundle(base / "bundle")
    made.write("/bin/true")
    return made.path


def runtimes(where: Path, wanted: list[str]) -> list[Measured]:
    """Those of the command lines that run it here; what the others say is told."""
    found = {name: usable(name, where) for name in wanted}
    for name, said in found.items():
        if isinstance(said, str):
            print(f"not measured: {name} {said}", file=sys.stderr)
    return [each for each in found.values() if isinstance(each, Measured)]


def measure(bench: Bench, others: list[Measured], count: int) -> None:
    """By turns, so that what disturbs the machine disturbs all."""
    for turn in range(count):
        bench.lifecycle()
        for other in others[turn % len(others) :] + others[: turn % len(others)] if others else ():
            other.run(turn)


def rows(bench: Bench, others: list[Measured]) -> list[list[str]]:
    """A line for each: milliseconds, and how much of StartContainer's time that is."""
    samples = {name: [1000 * value for value in bench.samples.steps[name]] for name in STEPS[:3]}
    samples[TOGETHER] = [1000 * value for value in bench.samples.start]
    samples |= {f"{other.name} run": other.wall for other in others}
    first = quarter(samples[STARTED])
    return [
        [name, f"{quarter(values):.1f} ms", f"{statistics.median(values):.1f} ms", f"{quarter(values) / first:.2f}"]
        for name, values in samples.items()
    ]


def quarter(values: list[float]) -> float:
    """The mean of the fastest quarter: what the machine does when nothing else is in the way."""
    return statistics.fmean(sorted(values)[: max(1, len(values) // 4)])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("-n", type=int, default=40, help="containers of each (40)")
    parser.add_argument("--beside", nargs="*", default=["runc", "crun"], help="command lines (runc crun)")
    wanted = parser.parse_args()
    with temporary() as base, benches(base, "tare", True) as found:
        where = bundle(base)
        os.chdir(where)
        others = runtimes(where, wanted.beside)
        measure(found[0], others, wanted.n)
        os.chdir("/")
        print_table(["", "fastest quarter", "median", f"of {STARTED}"], rows(found[0], others))
    print("\n" + "; ".join(f"{name} {text}" for name, text in versions().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
