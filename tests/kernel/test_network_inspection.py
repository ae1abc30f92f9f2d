"""The path of a pod's packets as it is told, held against what iproute2 and nft say; and what is not as it was made, each thing by itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tare.config import NetworkConfig
from tare.network import inspection
from tare.network.attach import EmbeddedNetwork
from tare.network.hostports import Port
from tare.network.wishes import Wishes
from tare.state.database import Database
from tests.support.netns import Namespace, ip, on_its_own_node, sh

pytestmark = pytest.mark.root
A = "a" * 64
LINK = "tare" + "a" * 11


@dataclass(frozen=True, slots=True)
class Attached:
    """A pod with a published port and rates."""

    network: EmbeddedNetwork
    pod: Namespace

    def path(self) -> dict[str, Any]:
        """What is told of it."""
        return asyncio.run(inspection.path(self.network, A, f"/proc/self/fd/{self.pod.fd}"))


@contextmanager
def attached(directory: Path) -> Iterator[Attached]:
    """On a node of this thread's."""
    config = NetworkConfig(bridge="br-test", subnet="10.99.0.0/24", subnet6="fd00:99::/64", isolation=("node",))
    network = EmbeddedNetwork(Database(directory / "state.db"), config, directory / "run")
    asyncio.run(network.setup())
    ports = (
        Port(protocol="tcp", host_port=8080, container_port=80),
        Port(protocol="udp", host_port=53, container_port=5),
    )
    wishes = Wishes(name="web", namespace="tests", ports=ports, ingress=8_000_000, egress=16_000_000)
    with Namespace() as pod:
        asyncio.run(network.attach(A, pod.fd, pod.netlink, wishes))
        yield Attached(network, pod)
    asyncio.run(network.teardown())


@on_its_own_node
def test_the_path_is_what_iproute2_and_nft_see(tmp_path: Path) -> None:
    with attached(tmp_path) as it:
        found = it.path()
        assert found["troubles"] == []
        assert (found["name"], found["bridge"], found["lease"]) == ("default", "br-test", "10.99.0.2")
        assert found["subnets"] == ["10.99.0.0/24", "fd00:99::/64"]
        loopback, eth0 = found["interfaces"]
        (seen,) = it.pod.ip("addr show dev eth0")
        assert (eth0["name"], eth0["index"], eth0["mac"], eth0["mtu"], eth0["up"]) == (
            "eth0",
            seen["ifindex"],
            seen["address"],
            seen["mtu"],
            True,
        )
        assert eth0["addresses"] == [f"{a['local']}/{a['prefixlen']}" for a in seen["addr_info"]]
        (ours,) = ip(f"link show dev {LINK}")
        peer = eth0["peer"]
        assert (peer["name"], peer["index"], peer["mac"], peer["bridge"]) == (
            LINK,
            ours["ifindex"],
            ours["address"],
            "br-test",
        )
        assert loopback["addresses"] == ["127.0.0.1/8", "::1/128"] and "peer" not in loopback
        told = sorted((route["destination"], route["gateway"], route["interface"]) for route in found["routes"])
        seen4, seen6 = it.pod.ip("route show"), it.pod.ip("-6 route show")
        for routes, everything in ((seen4, "0.0.0.0/0"), (seen6, "::/0")):
            for route in routes:
                destination = everything if route["dst"] == "default" else route["dst"]
                told.remove((destination, route.get("gateway", ""), route["dev"]))
        assert told == []
        assert [
            (p["protocol"], p["hostIP"], p["hostPort"], p["podIP"], p["containerPort"]) for p in found["ports"]
        ] == [
            ("tcp", "0.0.0.0", 8080, "10.99.0.2", 80),
            ("tcp", "::", 8080, "fd00:99::2", 80),
            ("udp", "0.0.0.0", 53, "10.99.0.2", 5),
            ("udp", "::", 53, "fd00:99::2", 5),
        ]
        count = sum("rule" in item for item in json.loads(sh("nft -j list table inet tare-br-test"))["nftables"])
        assert found["rules"] == {"table": "inet tare-br-test", "count": count, "isolation": ["node"]}
        assert found["rates"] == {"ingress": 8_000_000, "egress": 16_000_000}


@pytest.mark.parametrize(
    ("harm", "trouble"),
    [
        (lambda pod: sh(f"ip link set {LINK} down"), f"link {LINK} is down"),
        (lambda pod: sh(f"ip link set {LINK} nomaster"), f"link {LINK} is not on bridge br-test"),
        (lambda pod: sh("ip link set br-test down"), "bridge br-test is down"),
        (lambda pod: sh("ip link delete br-test"), "bridge br-test is gone"),
        (lambda pod: sh(f"ip link delete {LINK}"), f"link {LINK} is gone from the node"),
        (lambda pod: pod.sh("ip link delete eth0"), "eth0 is gone from the pod"),
        (lambda pod: pod.sh("ip link set eth0 down"), "eth0 is down in the pod"),
        (lambda pod: pod.sh("ip addr del 10.99.0.2/24 dev eth0"), "eth0 has not the address 10.99.0.2/24"),
        (lambda pod: pod.sh("ip addr del fd00:99::2/64 dev eth0"), "eth0 has not the address fd00:99::2/64"),
        (lambda pod: pod.sh("ip route del default"), "there is no default route by 10.99.0.1"),
        (
            lambda pod: pod.sh("ip link set eth0 address 02:00:00:00:00:01"),
            "eth0 has the hardware address 02:00:00:00:00:01, not 0a:58:0a:63:00:02",
        ),
        (lambda pod: sh("nft flush ruleset"), "nftables table tare-br-test has no rules"),
        (
            lambda pod: sh("nft delete element inet tare-br-test any4 { tcp . 8080 }"),
            "host port 8080/tcp leads nowhere: it is not in the table",
        ),
    ],
)
@on_its_own_node
def test_what_is_not_as_it_was_made(tmp_path: Path, harm: Callable[[Namespace], object], trouble: str) -> None:
    with attached(tmp_path) as it:
        harm(it.pod)
        assert trouble in it.path()["troubles"]


@on_its_own_node
def test_a_namespace_that_is_gone_is_a_trouble_and_no_error(tmp_path: Path) -> None:
    with attached(tmp_path) as it:
        found = asyncio.run(inspection.path(it.network, A, f"{tmp_path}/gone"))
        assert found["namespaceNumber"] == 0 and "cannot be entered" in found["troubles"][0]
        asyncio.run(it.network.detach(A))
        assert "it holds no address" in asyncio.run(inspection.path(it.network, A, ""))["troubles"]
