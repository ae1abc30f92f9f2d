"""What a kubelet asks for all day long: Tare beside containerd, each with the same number of idle pods.

    .venv/bin/python -m bench.lists [-p PODS] [-n TURNS] [-s SECONDS] [-c CROWD] [--only NAME] [--json FILE]

    lists             ListContainers, ListPodSandbox, ListContainerStats, ListPodSandboxStats, by turns of the runtimes
    CPU at rest       of all processes of the runtime and of the idle pods, by cgroup, while nobody asks for anything
    exit to event     from the moment at which the kernel tells of the end of a container's process until a subscriber of
                      GetContainerEvents knows
    a crowd           ListContainers with so many ended containers, which are put on Tare's record for that

Debian 12's containerd tells no events, and has no crowd.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import select
import signal
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from bench.compare import benches, interrupted, temporary, versions
from bench.measure import Bench
from tare.cli.client import CallFailed
from tare.cli.output import print_table
from tare.cri.v1 import api_pb2
from tests.support.crowd import crowded

CALLS = {
    "ListContainers": api_pb2.ListContainersRequest(),
    "ListPodSandbox": api_pb2.ListPodSandboxRequest(),
    "ListContainerStats": api_pb2.ListContainerStatsRequest(),
    "ListPodSandboxStats": api_pb2.ListPodSandboxStatsRequest(),
}
SETTLE_SECONDS = 3.0
EVENT_SECONDS = 10.0
ENDS = 15
SWITCH_SECONDS = 1e-4  # two threads here see the end and its event: neither is to wait for the other
CROWD_TURNS = 7


@dataclass
class Samples:
    """Seconds for each call, CPU seconds a second at rest, seconds from an end to its event, seconds for a list of the crowd."""

    calls: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    rest: float | None = None
    events: list[float] = field(default_factory=list)
    crowd: list[float] = field(default_factory=list)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.lists", description=__doc__.partition("\n")[0])
    parser.add_argument("-p", "--pods", type=int, default=50, help="idle pods of each runtime (50)")
    parser.add_argument("-n", "--turns", type=int, default=40, help="calls of each kind (40)")
    parser.add_argument("-s", "--seconds", type=float, default=30.0, help="how long the rest is watched (30)")
    parser.add_argument("-c", "--crowd", type=int, default=5000, help="ended containers on record (5000)")
    parser.add_argument("--only", choices=["tare", "containerd"], help="one runtime alone")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there too")
    return parser.parse_args()


def ask(found: list[Bench], samples: dict[str, Samples], turns: int) -> None:
    """Every call, by turns; the first two of each are not counted."""
    for turn in range(turns + 2):
        for method, request in CALLS.items():
            for bench in found if turn % 2 else reversed(found):
                began = time.perf_counter()
                bench.call("runtime", method, request)
                if turn >= 2:
                    samples[bench.peer.name].calls[method].append(time.perf_counter() - began)


def rest(found: list[Bench], samples: dict[str, Samples], seconds: float) -> None:
    """CPU time while nobody asks for anything."""
    time.sleep(SETTLE_SECONDS)
    before = [bench.peer.group.cpu_seconds() for bench in found]
    time.sleep(seconds)
    for bench, earlier in zip(found, before, strict=True):
        samples[bench.peer.name].rest = (bench.peer.group.cpu_seconds() - earlier) / seconds


@contextmanager
def following(bench: Bench) -> Iterator[queue.SimpleQueue[tuple[float, Any]]]:
    """Events as they come, with when. Raises CallFailed where the runtime tells none."""
    came: queue.SimpleQueue[tuple[float, Any]] = queue.SimpleQueue()
    call = bench.peer.client.runtime.GetContainerEvents(api_pb2.GetEventsRequest())

    def read() -> None:
        try:
            for event in call:
                came.put((time.perf_counter(), event))
        except grpc.RpcError as error:
            came.put((time.perf_counter(), error))

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield came
    finally:
        call.cancel()
        thread.join()


def killed(pid: int) -> float:
    """Kill a process; when the kernel said that it has ended."""
    pidfd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [])
        return time.perf_counter()
    finally:
        os.close(pidfd)


def ends(bench: Bench, samples: Samples) -> None:
    """How long it takes from an end to its event. Nothing is measured of a runtime that tells none."""
    sys.setswitchinterval(SWITCH_SECONDS)
    with following(bench) as came:
        for _ in range(ENDS):
            pod_id, container_id = bench.start(keep=False)
            request = api_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
            answer: Any = bench.call("runtime", "ContainerStatus", request)
            began = killed(json.loads(answer.info["info"])["pid"])
            while True:
                at, event = came.get(timeout=EVENT_SECONDS)
                if isinstance(event, grpc.RpcError):
                    print(f"not measured: events of {bench.peer.name}: {event.code().name}", file=sys.stderr)
                    bench.stop(pod_id, container_id, keep=False)
                    return
                if (event.container_id, event.container_event_type) == (
                    container_id,
                    api_pb2.CONTAINER_STOPPED_EVENT,
                ):
                    break
            samples.events.append(at - began)
            bench.stop(pod_id, container_id, keep=False)


def crowd(bench: Bench, samples: Samples, count: int) -> None:
    """ListContainers with so many ended ones; for a runtime whose records can be written for it."""
    if bench.peer.daemon is None or not count:
        return
    pod_id, container_id = bench.start(keep=False)
    bench.call("runtime", "StopContainer", api_pb2.StopContainerRequest(container_id=container_id))
    with crowded(bench.peer.daemon, container_id, count):
        for _ in range(CROWD_TURNS):
            began = time.perf_counter()
            listed: Any = bench.call("runtime", "ListContainers", CALLS["ListContainers"])
            samples.crowd.append(time.perf_counter() - began)
            if len(listed.containers) <= count:
                raise RuntimeError(f"{len(listed.containers)} containers were listed of more than {count}")
    bench.stop(pod_id, container_id, keep=False)


def measure(found: list[Bench], wanted: argparse.Namespace) -> dict[str, Samples]:
    """Everything, of every runtime."""
    samples = {bench.peer.name: Samples() for bench in found}
    pods = [(bench, bench.start(keep=False)) for _ in range(wanted.pods) for bench in found]
    ask(found, samples, wanted.turns)
    rest(found, samples, wanted.seconds)
    for bench in found:
        ends(bench, samples[bench.peer.name])
    for bench, made in pods:
        bench.stop(*made, keep=False)
    for bench in found:
        crowd(bench, samples[bench.peer.name], wanted.crowd)
    return samples


def numbers(samples: Samples) -> dict[str, float | None]:
    """Milliseconds: medians and the least."""
    found: dict[str, float | None] = {}
    rows = {**samples.calls, "exit to event": samples.events, "ListContainers of a crowd": samples.crowd}
    for name, taken in rows.items():
        found[f"{name}, p50, ms"] = statistics.median(taken) * 1e3 if taken else None
        found[f"{name}, min, ms"] = min(taken) * 1e3 if taken else None
    found["CPU at rest, ms a second"] = samples.rest * 1e3 if samples.rest is not None else None
    return found


def table(measured: dict[str, dict[str, float | None]]) -> list[list[str]]:
    """A row for each number, a column for each runtime, and how many times more the others take than the first."""
    names = list(measured)
    found = []
    for row in measured[names[0]]:
        values = [measured[name][row] for name in names]
        first = values[0]
        ratios = [f"{value / first:.1f}×" if value is not None and first else "-" for value in values[1:]]
        found.append([row, *("-" if value is None else f"{value:.3f}" for value in values), *ratios])
    return found


def main() -> int:
    """Measure and print."""
    wanted = arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupted)
    with temporary() as base, benches(base, wanted.only, masquerade=True) as found:
        try:
            measured = {name: numbers(samples) for name, samples in measure(found, wanted).items()}
        except CallFailed as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
    names = list(measured)
    print_table(["", *names, *(f"{name} / {names[0]}" for name in names[1:])], table(measured))
    machine = versions()
    print("\n" + "; ".join(f"{name} {text}" for name, text in machine.items()))
    if wanted.json:
        Path(wanted.json).write_text(json.dumps({"machine": machine, "runtimes": measured}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
