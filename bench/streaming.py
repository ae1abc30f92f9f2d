"""`python -m bench.streaming`: exec and port-forward of Tare beside containerd, through the same SPDY client, in one run.

    exec of true     ExecSync, how long it takes and what it costs
    in               bytes through exec's stdin to `wc -c`
    out              bytes of `head -c` through exec
    forward          bytes of `head -c` behind `nc`, through port-forward

Seconds of the wall and of the CPU (of all that the runtime and its container ran, by cgroup); the client's own are in the first alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress

from bench.compare import benches, temporary, versions
from bench.measure import Bench
from tare.cli.client import CallFailed
from tare.cli.output import print_table
from tare.cri.v1 import api_pb2
from tests.support.spdy_client import SpdyClient

V4 = "v4.channel.k8s.io"
PIECE = 64 << 10
PORT = 9000
START_SECONDS = 5.0


class Counting(SpdyClient):
    """A client that counts what comes, and keeps the little that is not on a counted stream."""

    counted: frozenset[int] = frozenset()

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type] # as they came
        self.counts: dict[int, int] = defaultdict(int)

    def step(self, seconds: float = 60.0) -> bool:
        """See SpdyClient."""
        more = super().step(seconds)
        for stream in self.counted & self.data.keys():
            self.counts[stream] += len(self.data.pop(stream))
        return more


def session(bench: Bench, container: str, *command: str, stdin: bool) -> tuple[Counting, dict[str, int]]:
    """An exec with its streams open."""
    request = api_pb2.ExecRequest(container_id=container, cmd=command, stdin=stdin, stdout=True)
    url = bench.call("runtime", "Exec", request).url  # type: ignore[attr-defined]
    client = Counting.connect(url, [V4])
    names = ("error", *(["stdin"] if stdin else []), "stdout")
    streams = {name: client.open({"streamType": name}) for name in names}
    return client, streams  # type: ignore[return-value] # `connect` makes its own class


def into(bench: Bench, container: str, size: int) -> None:
    """Bytes into a command."""
    client, streams = session(bench, container, "wc", "-c", stdin=True)
    piece = bytes(PIECE)
    for _ in range(size // PIECE):
        client.send(streams["stdin"], piece)
    client.send(streams["stdin"], b"", fin=True)
    client.run()
    told = int(client.data[streams["stdout"]])
    if told != size:
        raise RuntimeError(f"{bench.peer.name}: {told} of {size} bytes went in")


def out_of(bench: Bench, container: str, size: int) -> None:
    """Bytes out of a command."""
    client, streams = session(bench, container, "head", "-c", str(size), "/dev/zero", stdin=False)
    client.counted = frozenset({streams["stdout"]})
    client.run()
    if client.counts[streams["stdout"]] != size:
        raise RuntimeError(f"{bench.peer.name}: {client.counts[streams['stdout']]} of {size} bytes came out")


def forwarded(bench: Bench, pod: str, size: int) -> None:
    """Bytes out of a port, whose server is a command in the container."""
    url = bench.call("runtime", "PortForward", api_pb2.PortForwardRequest(pod_sandbox_id=pod)).url  # type: ignore[attr-defined]
    client = Counting.connect(url, ["portforward.k8s.io"])
    deadline = time.monotonic() + START_SECONDS
    for number in range(1000):  # until the server listens
        head = {"port": str(PORT), "requestID": str(number)}
        error, data = client.open({"streamType": "error", **head}), client.open({"streamType": "data", **head})
        client.counted = frozenset({data})  # type: ignore[attr-defined] # it is a Counting
        client.send(error, b"", fin=True)
        while data not in client.ended | client.resets.keys():
            if not client.step():
                raise RuntimeError(f"{bench.peer.name}: the session has ended")
        client.send(data, b"", fin=True)  # not before: containerd ends a connection when one way of it ends
        if client.counts[data]:  # type: ignore[attr-defined] # it is a Counting
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"{bench.peer.name}: {bytes(client.data[error]).decode()}")
        time.sleep(0.02)
    client.close()
    if client.counts[data] != size:  # type: ignore[attr-defined] # it is a Counting
        raise RuntimeError(f"{bench.peer.name}: {client.counts[data]} of {size} bytes were forwarded")  # type: ignore[attr-defined]


def serve(bench: Bench, container: str, size: int) -> threading.Thread:
    """`nc` in the container, for one connection."""
    command = ["nc", "-l", "-p", str(PORT), "-e", "head", "-c", str(size), "/dev/zero"]

    def run() -> None:
        with suppress(CallFailed):  # its timeout: what it served is counted elsewhere
            bench.call("runtime", "ExecSync", api_pb2.ExecSyncRequest(container_id=container, cmd=command, timeout=120))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def timed(bench: Bench, work: Callable[[], None]) -> tuple[float, float]:
    """(seconds of the wall, of the CPU) that something takes."""
    cpu, begin = bench.peer.group.cpu_seconds(), time.perf_counter()
    work()
    return time.perf_counter() - begin, bench.peer.group.cpu_seconds() - cpu


def measure(bench: Bench, size: int, turns: int, execs: int) -> dict[str, float]:
    """Every number of one runtime, medians of `turns`."""
    pod, container = bench.start(keep=False)
    found: dict[str, list[float]] = defaultdict(list)

    def keep(name: str, work: Callable[[], None]) -> None:
        wall, cpu = timed(bench, work)
        found[f"{name}, s"].append(wall)
        found[f"{name}, CPU s"].append(cpu)

    for _ in range(turns):
        keep("in", lambda: into(bench, container, size))
        keep("out", lambda: out_of(bench, container, size))
        server = serve(bench, container, size)
        keep("forward", lambda: forwarded(bench, pod, size))
        server.join()
    bench.stop(pod, container, keep=False)
    bench.execute(execs)
    numbers = {
        "ExecSync of true, ms": statistics.median(bench.samples.execs) * 1e3,
        "ExecSync of true, CPU ms": bench.samples.cpu_exec / execs * 1e3,
    }
    return numbers | {name: statistics.median(values) for name, values in found.items()}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.streaming", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-s", "--size", type=int, default=1024, metavar="MIB", help="bytes of each transfer (1024 MiB)")
    parser.add_argument("-n", "--turns", type=int, default=3, help="transfers of each kind (3)")
    parser.add_argument("-e", "--execs", type=int, default=30, help="commands run with ExecSync (30)")
    parser.add_argument("--only", choices=["tare", "containerd"], help="one runtime alone")
    wanted = parser.parse_args()
    with temporary() as base, benches(base, wanted.only, True) as found:
        numbers = {bench.peer.name: measure(bench, wanted.size << 20, wanted.turns, wanted.execs) for bench in found}
    names = list(numbers)
    rows = []
    for number in numbers[names[0]]:
        values = [numbers[name][number] for name in names]
        rows.append([number, *(f"{value:.2f}" for value in values), *(f"{v / values[0]:.1f}×" for v in values[1:])])
    print_table(["", *names, *(f"{name} / {names[0]}" for name in names[1:])], rows)
    print("\n" + "; ".join(f"{name} {text}" for name, text in {"MiB": str(wanted.size), **versions()}.items()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
