"""A daemon whose pods get their network by CNI, on a node of its own: bridges and rules of plugins come and go with its network namespace."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tare.cri.v1 import api_pb2 as pb
from tests.support.daemon import Daemon
from tests.support.netns import Namespace
from tests.support.node import Node, rows

DEBIAN = "/usr/lib/cni"
WAIT_SECONDS = 20.0


class CniNode(Node):
    """A node without images. `place` is the network namespace that its daemon and all plugins are in."""

    def __init__(self, daemon: Daemon, place: Namespace, directory: Path) -> None:
        super().__init__(daemon, "")
        self.place = place
        self.configurations = directory / "net.d"
        self.programs = directory / "bin"
        self.results = directory / "cache" / "results"
        self.leases = directory / "leases"
        self.notes = directory / "log"

    def bring(
        self, *plugins: dict[str, Any], name: str = "10-test.conflist", version: str = "1.0.0", **more: Any
    ) -> None:
        """The one configuration list, with nothing beside it."""
        for path in self.configurations.glob("*"):
            path.unlink()
        value = {"cniVersion": version, "name": "pods", "plugins": plugins, **more}
        (self.configurations / name).write_text(json.dumps(value))

    def clear(self) -> None:
        """No configuration, no address in use, and nothing noted or told."""
        for path in (*self.configurations.glob("*"), *self.notes.parent.glob("log*")):
            path.unlink()
        shutil.rmtree(self.leases, ignore_errors=True)  # or its next address would go on where an earlier test's ended

    def scripted(self, kind: str = "scripted", **more: Any) -> dict[str, Any]:
        """A plugin that is `cni_plugin`."""
        path = self.programs / kind
        if not path.exists():
            shutil.copy(Path(__file__).with_name("cni_plugin.py"), path)
            path.chmod(0o755)
        return {"type": kind, "log": str(self.notes), **more}

    def tell(self, verb: str, what: str | None) -> None:
        """What scripted plugins do from now on."""
        path = Path(f"{self.notes}.{verb}")
        if what is None:
            path.unlink()
        else:
            path.write_text(what)

    def noted(self, verb: str) -> list[dict[str, Any]]:
        """How scripted plugins were called with a verb."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [note for note in map(json.loads, lines) if note["verb"] == verb]

    def ipam(self, *ranges: str) -> dict[str, Any]:
        """Addresses by host-local."""
        return {"type": "host-local", "dataDir": str(self.leases), "ranges": [[{"subnet": item}] for item in ranges]}

    def network_condition(self) -> pb.RuntimeCondition:
        """NetworkReady."""
        client = self.daemon.client
        status = client.call(client.runtime.Status, pb.StatusRequest()).status
        found: pb.RuntimeCondition = next(item for item in status.conditions if item.type == "NetworkReady")
        return found

    def network_info(self) -> dict[str, Any]:
        """What a verbose Status says of the network."""
        client = self.daemon.client
        info = client.call(client.runtime.Status, pb.StatusRequest(verbose=True)).info
        found = next(json.loads(value) for value in info.values() if '"network"' in value)
        network: dict[str, Any] = found["network"]
        return network

    def inside(self, pod: str) -> PodPlace:
        """The pod's network namespace."""
        return PodPlace(self.daemon.run / "pods" / pod / "net")

    def addresses_held(self) -> list[str]:
        """Those that host-local has given out."""
        return [path.name for path in self.leases.glob("*/*") if path.name[0].isdigit()]

    def strays(self) -> list[str]:
        """As a node's, and CNI's: records, results, addresses, links."""
        found = super().strays()
        found += [f"record {row[0]}" for row in rows(self.daemon.root / "state.db", "cni_attachments")]
        found += [f"result {path.name}" for path in self.results.glob("*")]
        found += [f"address {name}" for name in self.addresses_held()]
        found += [f"link {link['ifname']}" for link in self.place.ip("link show type veth") if link["ifname"] != "wire"]
        return found


class PodPlace(Namespace):
    """A namespace by its pin."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._sockets = []


@contextmanager
def cni_node(prefix: str, settings: str = "", bin_dirs: Sequence[str] = (DEBIAN,)) -> Iterator[CniNode]:
    """A node with no configuration yet. `settings` are further lines of [network], in which DIRECTORY is what `CniNode` has its files in."""
    with tempfile.TemporaryDirectory(prefix=f"tare-{prefix}-", dir="/var/lib") as name, Namespace() as place:
        base = Path(name)
        for directory in ("net.d", "bin"):
            (base / directory).mkdir()
        place.sh("ip link set lo up")
        dirs = json.dumps([str(base / "bin"), *bin_dirs])
        text = f'[network]\nmode = "cni"\nconf_dir = "{base}/net.d"\nbin_dirs = {dirs}\ncache_dir = "{base}/cache"\n'
        prefix_command = ("nsenter", f"--net=/proc/{os.getpid()}/fd/{place.fd}")
        with Daemon(
            base / "tare", settings=f"{text}{settings.replace('DIRECTORY', name)}\n", prefix=prefix_command
        ) as daemon:
            yield CniNode(daemon, place, base)


def until(true: Callable[[], object]) -> None:
    """Wait for a thing to become true."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
