"""`python -m bench.compare`: Tare beside containerd with runc, through the same CRI client, in one run.

    pod with a running container     RunPodSandbox + CreateContainer + StartContainer, by turns of the runtimes
    exec                             ExecSync of `true`
    stop and remove                  StopContainer (kill) + StopPodSandbox + RemovePodSandbox
    CPU                              of everything that the runtime and its container ran, by cgroup
    memory                           PSS of the runtime's processes, by role: how much more for each idle pod

Both do the same for a pod: an address on a bridge and masquerading, the same image, limits, hidden paths and seccomp's default.
Images come from a registry that is started here; nothing is fetched. What is made is taken away on every path.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from bench import images, peers, report
from bench.measure import Bench
from tare.cli.client import CallFailed
from tare.cli.output import print_table
from tests.support.registry import serving

WARM_UP = 2


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument(
        "-n", "--lifecycles", type=int, default=25, help="pods started and stopped of each runtime (25)"
    )
    parser.add_argument("-e", "--execs", type=int, default=30, help="commands run in a container (30)")
    parser.add_argument("-i", "--idle", type=int, default=20, help="idle pods for the measure of memory (20)")
    parser.add_argument("--only", choices=["tare", "containerd"], help="one runtime alone")
    parser.add_argument(
        "--no-masquerade", action="store_true", help="containerd's pods do not reach outside; Tare's still do"
    )
    parser.add_argument("--json", metavar="FILE", help="write all numbers there too")
    return parser.parse_args()


@contextlib.contextmanager
def temporary() -> Iterator[Path]:
    """A directory on the disk that containers are made on, with a short path, as sockets need."""
    base = Path(tempfile.mkdtemp(prefix="tare-bench-", dir="/var/lib"))
    try:
        yield base
    finally:
        shutil.rmtree(base)


@contextlib.contextmanager
def benches(base: Path, only: str | None, masquerade: bool) -> Iterator[list[Bench]]:
    """Both runtimes up, with their images pulled."""
    with contextlib.ExitStack() as stack:
        layouts = images.make(base / "layouts")
        registry = stack.enter_context(serving(base / "registry", layouts)).url
        image = f"{registry}/{images.BUSYBOX}"
        found = []
        if only != "containerd":
            found.append(Bench(stack.enter_context(peers.tare(base)), image))
        if only != "tare":
            containerd = stack.enter_context(peers.containerd(base, registry, masquerade))
            found.append(Bench(containerd, image))
            if shutil.which("crun"):
                found.append(Bench(replace(containerd, name="containerd+crun", handler="crun"), image))
        for bench in found:
            bench.pull(image)
        yield [bench for bench in found if works(bench)]


def works(bench: Bench) -> bool:
    """Warm a runtime up; crun is left out where it cannot run on this machine's cgroups. Raises CallFailed for the others."""
    try:
        for _ in range(WARM_UP):
            bench.lifecycle(keep=False)
    except CallFailed as error:
        if bench.peer.handler == "":
            raise
        print(f"not measured: {bench.peer.name}: {str(error)[:200]}", file=sys.stderr)
        peers.remove_pods(bench.peer.client)
        return False
    return True


def measure(found: list[Bench], wanted: argparse.Namespace) -> None:
    """By turns, so that what disturbs the machine disturbs all."""
    for turn in range(wanted.lifecycles):
        for bench in found if turn % 2 else reversed(found):
            bench.lifecycle()
    for bench in found:
        bench.execute(wanted.execs)
    for bench in found:
        bench.idle(wanted.idle)


def versions() -> dict[str, str]:
    """What was compared, and where."""
    programs = (("containerd", "--version"), ("runc", "--version"), ("crun", "--version"))
    found = {"kernel": os.uname().release, "CPUs": str(os.cpu_count()), "load": f"{os.getloadavg()[0]:.1f}"}
    for name, option in programs:
        if shutil.which(name):
            result = subprocess.run([name, option], capture_output=True, text=True, check=False)
            words = result.stdout.partition("\n")[0].split()
            found[name] = words[2] if len(words) > 2 else "unknown"
    return found


def interrupted(number: int, frame: object) -> NoReturn:
    """SIGTERM and SIGHUP leave by way of every `finally`, as Ctrl-C does."""
    raise SystemExit(128 + number)


def main() -> int:
    """Measure and print."""
    wanted = arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    with temporary() as base, benches(base, wanted.only, not wanted.no_masquerade) as found:
        measure(found, wanted)
        summaries = {bench.peer.name: report.summary(bench.samples) for bench in found}
    names = list(summaries)
    print_table(["", *names, *(f"{name} / {names[0]}" for name in names[1:])], report.rows(summaries))
    machine = versions()
    print("\n" + "; ".join(f"{name} {text}" for name, text in machine.items()))
    if wanted.json:
        document = {"machine": machine, "runtimes": summaries}
        Path(wanted.json).write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
