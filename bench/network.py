"""`python -m bench.network`: what a pod's network takes of RunPodSandbox, embedded beside the same pod by CNI plugins, by turns in one run.

    add        an address, masquerading, the loopback and one published port, in a namespace that is there already
    delete     until the pod is off the network; what the kernel then still does is left out, since nobody waits for it

The list is Debian's bridge, host-local and portmap. Plugins are started by this program itself, without the daemon's detour, so that what is
compared is their own time. Everything is done in a network namespace of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.compare import temporary, versions
from tare.cli.output import print_table
from tare.config import NetworkConfig
from tare.handlers.commands import Ended
from tare.network.choice import Networks
from tare.network.cni.driver import CniNetwork
from tare.network.embedded import EmbeddedNetworks
from tare.network.hostports import Port
from tare.network.wishes import Wishes
from tare.state.database import Database
from tests.support.netns import Namespace, on_its_own_node

PLUGINS = "/usr/lib/cni"
MS = 1e3
WARM_UP = 3


class Runner:
    """Starts plugins as any program would."""

    async def capture(
        self, argv: Sequence[str], *, env: Mapping[str, str], stdin: bytes, timeout: float
    ) -> tuple[Ended, str]:
        """How one ended, and its standard output."""
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*argv, env=dict(env), stdin=pipe, stdout=pipe, stderr=pipe)
        async with asyncio.timeout(timeout):
            out, error = await process.communicate(stdin)
        return Ended(process.returncode or 0, error.decode()), out.decode()


@dataclass(slots=True)
class Measured:
    """One way of giving pods their network, and what it took: seconds."""

    name: str
    networks: Networks
    port: int
    add: list[float] = field(default_factory=list)
    delete: list[float] = field(default_factory=list)

    async def pod(self, number: int, *, keep: bool) -> None:
        """One pod comes and goes."""
        pod_id = f"{number:064x}"
        with Namespace() as place:
            netns = Path(f"/proc/{os.getpid()}/fd/{place.fd}")
            port = Port(protocol="tcp", host_port=self.port, container_port=80)
            wishes = Wishes(name=f"bench{number}", namespace="bench", uid=str(number), netns=netns, ports=(port,))
            begun = time.perf_counter()
            await self.networks.attach(pod_id, place.fd, place.netlink, wishes)
            added = time.perf_counter()
            await self.networks.detach(pod_id)
            ended = time.perf_counter()
        await self.networks.embedded.settle()
        if keep:
            self.add.append(added - begun)
            self.delete.append(ended - added)


@contextmanager
def measured(base: Path) -> Iterator[list[Measured]]:
    """Both ways, on this thread's node."""
    (base / "net.d").mkdir()
    bridge = {"type": "bridge", "bridge": "cni7", "isGateway": True, "ipMasq": True}
    bridge["ipam"] = {"type": "host-local", "dataDir": str(base / "ipam"), "ranges": [[{"subnet": "10.77.0.0/16"}]]}
    plugins = [bridge, {"type": "portmap", "capabilities": {"portMappings": True}}]
    document = {"cniVersion": "1.0.0", "name": "pods", "plugins": plugins}
    (base / "net.d" / "10-bench.conflist").write_text(json.dumps(document))
    database = Database(base / "state.db")
    config = NetworkConfig(
        bridge="tarebench0",
        subnet="10.78.0.0/16",
        conf_dir=str(base / "net.d"),
        bin_dirs=(PLUGINS,),
        cache_dir=str(base / "cache"),
        gc=False,
    )
    ways = EmbeddedNetworks(database, config, base / "run"), CniNetwork(database, config, Runner())
    found = [Measured(mode, Networks(mode, *ways), port) for mode, port in (("embedded", 18001), ("cni", 18002))]
    try:
        yield found
    finally:
        asyncio.run(ways[0].teardown())
        database.close()


async def measure(found: list[Measured], count: int) -> None:
    """By turns, so that what disturbs the machine disturbs both."""
    for way in found:
        await way.networks.setup()
        await way.networks.recover(set())
    for number in range(WARM_UP + count):
        for way in found if number % 2 else reversed(found):
            await way.pod(number + 1, keep=number >= WARM_UP)
    for way in found:
        await way.networks.close()


def summary(found: list[Measured]) -> dict[str, dict[str, dict[str, float]]]:
    """Medians, minima and 90th percentiles in milliseconds, by way and by what was done."""

    def spread(values: list[float]) -> dict[str, float]:
        ordered = sorted(values)
        p90 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.9))]
        return {"p50": statistics.median(ordered) * MS, "min": ordered[0] * MS, "p90": p90 * MS}

    return {way.name: {"add_ms": spread(way.add), "delete_ms": spread(way.delete)} for way in found}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("-n", type=int, default=50, help="pods of each kind (50)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there too")
    wanted = parser.parse_args()
    missing = [name for name in ("bridge", "host-local", "portmap") if not shutil.which(f"{PLUGINS}/{name}")]
    if missing:
        print(f"not installed: {', '.join(missing)} (containernetworking-plugins)", file=sys.stderr)
        return 1

    @on_its_own_node
    def run() -> dict[str, dict[str, dict[str, float]]]:
        with temporary() as base, measured(base) as found:
            asyncio.run(measure(found, wanted.n))
            return summary(found)

    numbers = run()
    rows = []
    for what in ("add_ms", "delete_ms"):
        for kind in ("p50", "min", "p90"):
            ours, theirs = (numbers[name][what][kind] for name in ("embedded", "cni"))
            name = f"{what.removesuffix('_ms')}, {kind}"
            rows.append([name, f"{ours:.2f} ms", f"{theirs:.2f} ms", f"{theirs / ours:.1f}×"])
    print_table(["", "embedded", "plugins", "plugins / embedded"], rows)
    print("\n" + "; ".join(f"{name} {text}" for name, text in versions().items()))
    if wanted.json:
        Path(wanted.json).write_text(json.dumps({"machine": versions(), "networks": numbers}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
