"""Pods made and removed, ten at once, while the daemon and CNI plugins are killed: afterwards there is what was there before, of every kind.

    TARE_CHURN=1000 TARE_CHURN_SEED=7 pytest tests/failure/test_network_churn.py -s      the long run, by hand

Who asks does as a kubelet does: what failed is asked for again. The seed says who is killed when; it is printed.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tests.support.cni import DEBIAN, CniNode, cni_node
from tests.support.node import rows
from tests.support.place import PlacedNode, placed_node

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(3600 if "TARE_CHURN" in os.environ else 300)]
AT_ONCE = 10
PODS = int(os.environ.get("TARE_CHURN", "0"))  # 0: as many as there is time for in CI
SECONDS, FEWEST, MOST = 8.0, 15, 100  # of CI: no more pods come after that time, but for the fewest
SEED = int(os.environ.get("TARE_CHURN_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)
FIRST_PORT = 23000
PAUSE = (0.5, 1.5)  # seconds between two kills
PATIENCE = 120.0
AGAIN = ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED")
EMBEDDED = """\
[network]
bridge = "tarechurn0"
subnet = "10.188.0.0/24"
subnet6 = "fd00:188::/64"
[network.networks.blue]
bridge = "tarechurn1"
subnet = "10.189.0.0/24"
"""
PLUGINS = ("bridge", "host-local", "portmap", "bandwidth")


@dataclass(slots=True)
class Churn:
    """One run on a node; `again` says for which failures more a pod is asked for once more, `kill` ends something of the node's."""

    node: PlacedNode | CniNode
    kill: Callable[[random.Random], str]
    again: Callable[[CallFailed], bool] = lambda error: False
    chance: random.Random = field(default_factory=lambda: random.Random(SEED))
    killed: Counter[str] = field(default_factory=Counter)
    retried: Counter[str] = field(default_factory=Counter)

    def run(self) -> int:
        """Pods, each made, stopped and removed; killing goes on until all are gone. How many that were."""
        done, end = threading.Event(), time.monotonic() + SECONDS

        def live(number: int) -> bool:
            if not PODS and number >= FEWEST and time.monotonic() > end:
                return False
            self._live(number)
            return True

        with ThreadPoolExecutor(AT_ONCE + 1) as threads:
            killer = threads.submit(self._kill_until, done)
            try:
                count = sum(threads.map(live, range(PODS or MOST)))
            finally:
                done.set()
            killer.result()
        return count

    def _kill_until(self, done: threading.Event) -> None:
        while not done.wait(self.chance.uniform(*PAUSE)):
            self.killed[self.kill(self.chance)] += 1

    def _live(self, number: int) -> None:
        config = self.node.pod_config(
            f"churn{number}", annotations=annotations_of(number, isinstance(self.node, CniNode))
        )
        if number % 3 == 0:
            port = FIRST_PORT + number
            config.port_mappings.append(pb.PortMapping(protocol=pb.UDP, container_port=80, host_port=port))
        pod = self._insist(lambda: self._run_pod(config))
        self._insist(lambda: self.node.stop_pod(pod))
        self._insist(lambda: self.node.remove_pod(pod))

    def _run_pod(self, config: pb.PodSandboxConfig) -> str:
        """The pod's ID, also where the daemon was killed while it answered: then it is there, as who asks sees from the list."""
        try:
            return self.node.run_pod(config)
        except CallFailed as error:
            if error.status != "ALREADY_EXISTS":
                raise
        self.retried["ALREADY_EXISTS"] += 1
        name = config.metadata.name
        return next(pod.id for pod in self.node.daemon.client.pods() if pod.metadata.name == name)

    def _insist(self, call: Callable[[], str | None]) -> str:
        """Its answer, however often it must be asked for."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return call() or ""
            except CallFailed as error:
                if error.status not in AGAIN and not self.again(error):
                    raise
                assert time.monotonic() < deadline, error
                self.retried[error.status] += 1
            time.sleep(0.05)


def annotations_of(number: int, cni: bool) -> dict[str, str]:
    """Some pods have rates, and some are on another network."""
    wanted = (
        {"kubernetes.io/egress-bandwidth": "20M", "kubernetes.io/ingress-bandwidth": "10M"} if number % 4 == 0 else {}
    )
    return wanted | ({"network.tare.dev/network": "blue"} if number % 2 and not cni else {})


def kill_daemon(node: PlacedNode | CniNode) -> str:
    """SIGKILL, and the next daemon."""
    node.daemon.kill()
    node.daemon.start()
    return "daemon"


def kill_plugins(node: CniNode, chance: random.Random) -> str:
    """One plugin that runs, wherever it is; they are told by the copies that this node has of them."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        running = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_plugin(node, pid)]
        if running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(running), signal.SIGKILL)
                return "plugin"
    return "nobody"


def is_plugin(node: CniNode, pid: int) -> bool:
    """Whether a process runs one of the node's programs."""
    try:
        return os.readlink(f"/proc/{pid}/exe").startswith(f"{node.programs}/")
    except OSError:
        return False


def there(node: PlacedNode | CniNode) -> dict[str, list[str]]:
    """Everything that pods have on a node, by kind."""
    run, mine = node.daemon.run, str(node.daemon.base)
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if mine in line]
    leases = [str(row) for row in rows(node.daemon.root / "state.db", "leases WHERE released_at IS NULL")]
    return {
        "links": sorted(link["ifname"] for link in node.place.ip("link show")),
        "rules": sorted(re.sub(r"packets \d+ bytes \d+", "", node.place.sh("nft list ruleset")).splitlines()),
        "mounts": sorted(mounts),
        "namespaces": sorted(str(path) for path in (run / "pods").glob("*/net")) + held_namespaces(node),
        "leases": leases + (node.addresses_held() if isinstance(node, CniNode) else []),
        "ports": [str(row) for row in rows(node.daemon.root / "state.db", "ports")],
        "others": node.strays(),
    }


def held_namespaces(node: PlacedNode | CniNode) -> list[str]:
    """Descriptors by which a process of the instance would keep a pod's network alive."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(node.daemon.run) not in (process / "cmdline").read_text():
                continue
            links = [os.readlink(fd) for fd in (process / "fd").iterdir()]
        except OSError:
            continue  # it has ended
        found += [f"{process.name}: {link}" for link in links if link.startswith("net:")]
    return found


def settled(node: PlacedNode | CniNode, true: Callable[[dict[str, list[str]]], bool]) -> dict[str, list[str]]:
    """What there is, once what takes its time is done: the kernel's removal of links, and DEL that is tried again."""
    deadline = time.monotonic() + PATIENCE / 2
    while not true(found := there(node)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def churned(churn: Churn) -> None:
    """Pods come and go; what is there afterwards was there before. One comes and goes first: bridges and tables are made by the first."""
    churn._live(0)
    churn._live(1)
    kinds = ("leases", "ports", "others", "namespaces", "mounts")
    before = settled(churn.node, lambda found: not any(found[kind] for kind in kinds))
    assert [found for kind in kinds for found in before[kind]] == []
    pods = churn.run()
    after = settled(churn.node, lambda found: found == before)
    counts = ", ".join(f"{len(found)} {kind}" for kind, found in after.items())
    print(
        f"\nseed {SEED}: {pods} pods; killed {dict(churn.killed)}, asked again {dict(churn.retried)}; there is {counts}"
    )
    assert churn.killed.keys() - {"nobody"}, "nothing was killed"
    assert after == before, churn.node.daemon.told()


@pytest.fixture
def embedded() -> Iterator[PlacedNode]:
    with placed_node("churn", EMBEDDED) as node:
        yield node


@pytest.fixture
def cni() -> Iterator[CniNode]:
    with cni_node("churnc", bin_dirs=()) as node:
        for name in PLUGINS:
            shutil.copy(f"{DEBIAN}/{name}", node.programs / name)
        # Without ipMasq: the plugin knows what to take away of its rules by the link, and forgets them if it is killed after removing that.
        bridge = {
            "type": "bridge",
            "bridge": "cni9",
            "isGateway": True,
            "ipam": node.ipam("10.79.0.0/24"),
        }
        node.bring(
            bridge,
            {"type": "portmap", "capabilities": {"portMappings": True}},
            {"type": "bandwidth", "capabilities": {"bandwidth": True}},
        )
        yield node


def test_the_embedded_network_under_kills_of_the_daemon(embedded: PlacedNode) -> None:
    churned(Churn(embedded, lambda chance: kill_daemon(embedded)))


def test_plugins_under_kills_of_the_daemon_and_of_themselves(cni: CniNode) -> None:
    def kill(chance: random.Random) -> str:
        return kill_plugins(cni, chance) if chance.random() < 0.7 else kill_daemon(cni)

    churned(Churn(cni, kill, lambda error: "plugin" in str(error)))
