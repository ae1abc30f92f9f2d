"""Pods with IPv4 and IPv6, shown by packets: to each other, to and from the node, to the outside; and what it takes on the node."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from tare.config import NetworkConfig
from tare.errors import FailedPrecondition
from tare.network.attach import EmbeddedNetwork
from tare.state.database import Database
from tests.support.netns import Namespace, ip, on_its_own_node, sh, udp, wire

pytestmark = pytest.mark.root
BRIDGE = "br-test"
A, B = "a" * 64, "b" * 64
CONF = Path("/proc/sys/net/ipv6/conf")


def network(directory: Path, subnet6: str = "fd00:99::/64") -> EmbeddedNetwork:
    """The network of an instance, set up."""
    config = NetworkConfig(bridge=BRIDGE, subnet="10.99.0.0/24", subnet6=subnet6)
    net = EmbeddedNetwork(Database(directory / "state.db"), config, directory / "run")
    asyncio.run(net.setup())
    return net


def attach(net: EmbeddedNetwork, pod_id: str, pod: Namespace) -> tuple[str, ...]:
    """The pod's addresses."""
    return asyncio.run(net.attach(pod_id, pod.fd, pod.netlink)).ips


def bridge_addresses() -> list[str]:
    """The bridge's addresses but for the link-local one."""
    (link,) = ip(f"addr show dev {BRIDGE}")
    return [f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["scope"] == "global"]


def sees(server: socket.socket, client: socket.socket, address: str) -> str:
    """Send a datagram to the server's port at the address and answer it; the client's address as the server saw it."""
    client.sendto(b"ping", (address, server.getsockname()[1]))
    data, source = server.recvfrom(100)
    server.sendto(data, source)
    assert client.recvfrom(100)[1][0] == address
    return str(source[0])


@on_its_own_node
def test_packets_every_way_and_the_nodes_address_outside(tmp_path: Path) -> None:
    with Namespace() as outside, Namespace() as one, Namespace() as two:
        wire(outside, "uplink", "eth9")
        sh("ip addr add 2001:db8::2/64 dev uplink nodad")
        outside.sh("ip addr add 2001:db8::1/64 dev eth9 nodad")
        net = network(tmp_path)
        first, second = attach(net, A, one), attach(net, B, two)
        assert (first, second) == (("10.99.0.2", "fd00:99::2"), ("10.99.0.3", "fd00:99::3"))
        routes = {(route["dst"], route.get("gateway")) for route in one.ip("-6 route show")}
        assert {("default", "fd00:99::1"), ("fd00:99::/64", None)} <= routes
        assert sees(one.udp("::"), two.udp("::"), first[1]) == second[1]
        assert sees(one.udp("0.0.0.0"), two.udp("0.0.0.0"), first[0]) == second[0]
        with udp("::") as on_node:
            assert sees(on_node, one.udp("::"), "fd00:99::1") == first[1]
            assert sees(one.udp("::"), on_node, first[1]) == "fd00:99::1"
        assert sees(outside.udp("::"), one.udp("::"), "2001:db8::1") == "2001:db8::2"
        for pod_id in (A, B):
            asyncio.run(net.detach(pod_id))
        asyncio.run(net.teardown())


@on_its_own_node
def test_a_node_that_learns_its_default_route_from_a_router_goes_on_listening_to_it(tmp_path: Path) -> None:
    """The kernel ignores routers on a node that forwards, unless it is told otherwise."""
    with Namespace() as outside:
        wire(outside, "uplink", "eth9")
        sh("ip link add other type bridge")
        sh("ip addr add 2001:db8::2/64 dev uplink nodad")
        sh("ip -6 route add default via 2001:db8::1 dev uplink")
        net = network(tmp_path)
        assert (CONF / "all/forwarding").read_text() == "1\n"
        got = {name: (CONF / name / "accept_ra").read_text().strip() for name in ("uplink", "other", BRIDGE)}
        assert got == {"uplink": "2", "other": "1", BRIDGE: "0"}
        asyncio.run(net.teardown())


@on_its_own_node
def test_without_a_subnet_there_is_no_ipv6_and_nothing_is_forwarded(tmp_path: Path) -> None:
    with Namespace() as pod:
        net = network(tmp_path, "")
        assert attach(net, A, pod) == ("10.99.0.2",)
        assert (CONF / "all/forwarding").read_text() == "0\n"
        assert bridge_addresses() == ["10.99.0.1/24"]
        assert "ip6" not in sh("nft list ruleset")
        asyncio.run(net.teardown())


@on_its_own_node
def test_the_subnet_changes_only_without_pods_and_the_bridge_follows(tmp_path: Path) -> None:
    with Namespace() as pod:
        net = network(tmp_path)
        attach(net, A, pod)
        with pytest.raises(FailedPrecondition, match="pods still hold addresses of fd00:99::/64"):
            network(tmp_path, "fd00:98::/64")
        asyncio.run(net.detach(A))
        asyncio.run(net.settle())
    network(tmp_path, "fd00:98::/64")
    assert bridge_addresses() == ["10.99.0.1/24", "fd00:98::1/64"]
    network(tmp_path, "")
    assert bridge_addresses() == ["10.99.0.1/24"]
    sh("sysctl -qw net.ipv6.conf.default.disable_ipv6=1")
    asyncio.run(network(tmp_path).teardown())
    net = network(tmp_path)
    assert bridge_addresses() == ["10.99.0.1/24", "fd00:99::1/64"]
    asyncio.run(net.teardown())


@on_its_own_node
def test_the_cluster_may_give_both_ranges_which_the_next_daemon_remembers(tmp_path: Path) -> None:
    config = NetworkConfig(bridge=BRIDGE)
    for start in range(2):
        net = EmbeddedNetwork(Database(tmp_path / "state.db"), config, tmp_path / "run")
        asyncio.run(net.setup())
        if not start:
            asyncio.run(net.use_ranges(["10.77.3.0/24", "fd00:77::/64"]))
        assert bridge_addresses() == ["10.77.3.1/24", "fd00:77::1/64"]
        with Namespace() as pod:
            assert attach(net, A, pod)[1].startswith("fd00:77::")
            asyncio.run(net.detach(A))
    asyncio.run(net.teardown())
