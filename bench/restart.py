"""`python -m bench.restart`: how long a runtime whose daemon was killed takes to answer again, with pods running and with many known.

    ready with … running      SIGKILL for the daemon, the same command line anew, until ListPodSandbox tells of all pods
    ready with … known        the same with so many pods more that have been stopped and not removed

By turns of the runtimes, in one run; times are medians. Loaded machines measure themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from bench.compare import benches, interrupted, temporary, versions
from bench.measure import Bench
from tare.cli.client import CallFailed, Client
from tare.cli.output import print_table
from tare.cri.v1 import api_pb2

PATIENCE = 120.0
POLL = 0.005


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.restart", description=__doc__.partition("\n")[0])
    parser.add_argument("-n", "--running", type=int, default=50, help="pods that run (50)")
    parser.add_argument("-k", "--known", type=int, default=500, help="pods that are known in the end (500)")
    parser.add_argument("-t", "--turns", type=int, default=5, help="restarts of each (5)")
    parser.add_argument("--only", choices=["tare", "containerd"], help="one runtime alone")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there too")
    return parser.parse_args()


def ready(bench: Bench, pods: int) -> float:
    """Seconds from the start of the next daemon until it tells of so many pods."""
    bench.peer.kill()
    begin = time.perf_counter()
    bench.peer.begin()
    while time.perf_counter() - begin < PATIENCE:
        if not accepts(
            bench.peer.address
        ):  # a gRPC client that is refused would wait for a second before it tries again
            time.sleep(POLL)
            continue
        with suppress(CallFailed), Client(bench.peer.address) as client:
            found = client.call(client.runtime.ListPodSandbox, api_pb2.ListPodSandboxRequest(), timeout=PATIENCE)
            if len(found.items) == pods:
                return time.perf_counter() - begin
        time.sleep(POLL)
    raise RuntimeError(f"{bench.peer.name} does not tell of {pods} pods")


def accepts(address: str) -> bool:
    """Whether somebody listens there."""
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(address) == 0


def make(bench: Bench, running: int) -> None:
    """Pods with a container each."""
    for _ in range(running):
        bench.start(keep=False)


def know(bench: Bench, more: int) -> None:
    """Pods that have been stopped."""
    for _ in range(more):
        pod_id, _ = bench.start(keep=False)
        bench.call("runtime", "StopPodSandbox", api_pb2.StopPodSandboxRequest(pod_sandbox_id=pod_id))


def main() -> int:
    """Measure and print."""
    wanted = arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with temporary() as base, benches(base, wanted.only, True) as found:
        ours = [bench for bench in found if not bench.peer.handler]
        stages: dict[str, tuple[Callable[[Bench, int], None], int]] = {
            f"ready with {wanted.running} running": (make, wanted.running)
        }
        if wanted.known > wanted.running:
            stages[f"ready with {wanted.known} known"] = (know, wanted.known - wanted.running)
        pods = 0
        for name, (prepare, count) in stages.items():
            pods += count
            for bench in ours:
                prepare(bench, count)
            for _ in range(wanted.turns):
                for bench in ours:
                    times[name][bench.peer.name].append(ready(bench, pods))
    names = [bench.peer.name for bench in ours]
    rows = [
        [name, *(f"{statistics.median(by_name[runtime]) * 1000:.0f} ms" for runtime in names)]
        for name, by_name in times.items()
    ]
    print_table(["", *names], rows)
    print("\n" + "; ".join(f"{name} {text}" for name, text in versions().items()))
    if wanted.json:
        Path(wanted.json).write_text(json.dumps({"machine": versions(), "seconds": times}, indent=2) + "\n")
    return os.EX_OK


if __name__ == "__main__":
    raise SystemExit(main())
