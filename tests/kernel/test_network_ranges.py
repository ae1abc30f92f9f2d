"""The range of pods' addresses that a cluster gives to a node: taken, remembered, and refused where it cannot be."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tare.config import NetworkConfig
from tare.errors import FailedPrecondition, InvalidArgument, TareError
from tare.network.attach import EmbeddedNetwork
from tare.state.database import Database
from tests.support.netns import Namespace, ip, on_its_own_node, sh

pytestmark = pytest.mark.root
BRIDGE = "br-test"
POD = "1" * 64


def network(directory: Path, subnet: str = "") -> EmbeddedNetwork:
    """The network of an instance, set up."""
    config = NetworkConfig(bridge=BRIDGE, subnet=subnet)
    net = EmbeddedNetwork(Database(directory / "state.db"), config, directory / "run")
    asyncio.run(net.setup())
    return net


def use(net: EmbeddedNetwork, *ranges: str) -> None:
    """Give the network these."""
    asyncio.run(net.use_ranges(ranges))


def refused(net: EmbeddedNetwork, kind: type[TareError], words: str, *ranges: str) -> None:
    """They must be refused, and change nothing."""
    before = addresses()
    with pytest.raises(kind, match=words):
        use(net, *ranges)
    assert addresses() == before
    assert net.status() is None


def addresses() -> list[str]:
    """IPv4 addresses of the bridge, with prefix length."""
    (link,) = ip(f"addr show dev {BRIDGE}")
    return [f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["family"] == "inet"]


@on_its_own_node
def test_pods_get_addresses_of_the_range_and_the_next_daemon_remembers_it(tmp_path: Path) -> None:
    net = network(tmp_path)
    use(net, "10.77.3.0/24")
    assert addresses() == ["10.77.3.1/24"]
    assert "10.77.3.0/24" in sh("nft list ruleset")
    for current in (net, network(tmp_path)):
        assert addresses() == ["10.77.3.1/24"]
        with Namespace() as pod:
            attachment = asyncio.run(current.attach(POD, pod.fd, pod.netlink))
            assert attachment.ips[0].startswith("10.77.3.")
            asyncio.run(current.detach(POD))


@on_its_own_node
def test_the_ipv4_range_is_taken_of_both_families(tmp_path: Path) -> None:
    net = network(tmp_path)
    use(net, "fd00:1::/64", "10.77.4.0/24")
    assert addresses() == ["10.77.4.1/24"]
    refused(net, InvalidArgument, "IPv4", "fd00:1::/64")
    refused(net, InvalidArgument, "127.0.0.0/8", "127.0.0.0/8")


@on_its_own_node
def test_the_same_range_again_changes_nothing_also_under_pods(tmp_path: Path) -> None:
    net = network(tmp_path)
    use(net, "10.77.5.0/24")
    with Namespace() as pod:
        asyncio.run(net.attach(POD, pod.fd, pod.netlink))
        use(net, "10.77.5.0/24")
        refused(net, FailedPrecondition, "still hold addresses", "10.77.6.0/24")
        asyncio.run(net.detach(POD))
    use(net, "10.77.6.0/24")
    assert addresses() == ["10.77.6.1/24"]


@on_its_own_node
def test_a_range_that_something_else_uses_is_refused(tmp_path: Path) -> None:
    net = network(tmp_path)
    sh("ip addr add 10.77.7.9/24 dev lo")
    refused(net, FailedPrecondition, "in use", "10.77.7.0/24")


@on_its_own_node
def test_the_settings_go_before_the_cluster(tmp_path: Path) -> None:
    net = network(tmp_path, "10.99.0.0/24")
    use(net, "10.99.0.0/24")
    refused(net, FailedPrecondition, "the settings have pods in 10.99.0.0/24", "10.77.8.0/24")
