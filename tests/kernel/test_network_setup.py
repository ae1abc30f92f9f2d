"""Setting the embedded network up, beside what a node may have already, and taking it down."""

from __future__ import annotations

import asyncio
import ctypes
import socket
import time
from pathlib import Path

import pytest

from tare.config import NetworkConfig
from tare.errors import FailedPrecondition, InvalidArgument, TareError
from tare.network.attach import EmbeddedNetwork
from tare.state.database import Database
from tests.support.netns import Namespace, checked, in_thread, ip, libc, on_its_own_node, sh, wire

pytestmark = pytest.mark.root
BRIDGE = "br-test"
IP_MTU_DISCOVER, IP_PMTUDISC_DO = 10, 2  # not in Python's socket
HEADERS = 28  # bytes of IPv4's and UDP's
CONFIG = NetworkConfig(bridge=BRIDGE, subnet="10.99.0.0/24")


def network(directory: Path, config: NetworkConfig = CONFIG, database: Database | None = None) -> EmbeddedNetwork:
    """The network of an instance whose directories are under `directory`."""
    return EmbeddedNetwork(database or Database(directory / "state.db"), config, directory / "run")


def bridge_addresses(bridge: str = BRIDGE) -> list[str]:
    """IPv4 addresses of a bridge, with prefix length."""
    (link,) = ip(f"addr show dev {bridge}")
    return [f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["family"] == "inet"]


def names() -> list[str]:
    """Links of the node."""
    return [link["ifname"] for link in ip("link show")]


@on_its_own_node
def test_setup_makes_all_that_is_needed_and_twice_is_the_same_as_once(tmp_path: Path) -> None:
    net = network(tmp_path)
    asyncio.run(net.setup())
    (link,) = ip(f"link show dev {BRIDGE}")
    state = (link["ifindex"], link["address"], bridge_addresses(), sh("nft list ruleset"), names())
    assert bridge_addresses() == ["10.99.0.1/24"]
    assert link["ifalias"] == f"tare:{tmp_path}/run"
    assert "UP" in link["flags"]
    assert Path("/proc/sys/net/ipv4/ip_forward").read_text() == "1\n"
    assert Path(f"/proc/sys/net/ipv6/conf/{BRIDGE}/accept_ra").read_text() == "0\n"
    assert net.status() is None
    asyncio.run(net.setup())
    asyncio.run(network(tmp_path).setup())
    (link,) = ip(f"link show dev {BRIDGE}")
    assert (link["ifindex"], link["address"], bridge_addresses(), sh("nft list ruleset"), names()) == state


@on_its_own_node
def test_teardown_leaves_nothing_and_twice_is_the_same_as_once(tmp_path: Path) -> None:
    net = network(tmp_path)
    with Namespace() as pod:
        asyncio.run(net.setup())
        asyncio.run(net.attach("1" * 64, pod.fd, pod.netlink))
        asyncio.run(net.teardown())
        asyncio.run(net.teardown())
        assert names() == ["lo"]
        assert [link["ifname"] for link in pod.ip("link show")] == ["lo"]
    assert sh("nft list ruleset") == ""


@on_its_own_node
def test_the_mtu_is_the_uplinks_unless_told(tmp_path: Path) -> None:
    with Namespace() as outside, Namespace() as pod:
        wire(outside, "uplink", "eth9")
        sh("ip link set uplink mtu 1380")
        sh("ip addr add 192.0.2.2/24 dev uplink")
        sh("ip route add default via 192.0.2.1")
        net = network(tmp_path)
        asyncio.run(net.setup())
        asyncio.run(net.attach("1" * 64, pod.fd, pod.netlink))
        assert pod.ip("link show dev eth0")[0]["mtu"] == ip(f"link show dev {BRIDGE}")[0]["mtu"] == 1380
        told = network(tmp_path, NetworkConfig(bridge=BRIDGE, subnet="10.99.0.0/24", mtu=1280))
        asyncio.run(told.setup())
        assert ip(f"link show dev {BRIDGE}")[0]["mtu"] == 1280


@on_its_own_node
def test_packets_as_large_as_the_mtu_pass_and_a_narrower_path_is_told(tmp_path: Path) -> None:
    """Nothing may be fragmented: what the pod's link does not carry is refused there, what a later one does not, by the node's word."""
    with Namespace() as outside, Namespace() as far, Namespace() as pod:
        wire(outside, "uplink", "eth9")
        wire(far, "narrow", "eth9")
        sh("ip link set uplink mtu 1400")
        sh("ip link set narrow mtu 1300")
        for other, here, there in (
            (outside, "192.0.2.2/24 dev uplink", "192.0.2.1"),
            (far, "198.51.100.2/24 dev narrow", "198.51.100.1"),
        ):
            sh(f"ip addr add {here}")
            other.sh(f"ip addr add {there}/24 dev eth9")
        sh("ip route add default via 192.0.2.1")
        net = network(tmp_path)
        asyncio.run(net.setup())
        asyncio.run(net.attach("1" * 64, pod.fd, pod.netlink))
        client = pod.udp()
        client.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        for other, address, mtu in ((outside, "192.0.2.1", 1400), (far, "198.51.100.1", 1300)):
            server = other.udp(address)
            port = server.getsockname()[1]
            client.sendto(bytes(mtu - HEADERS), (address, port))
            assert len(server.recv(2000)) == mtu - HEADERS
            with pytest.raises(OSError, match="Message too long"):
                for _ in range(10):  # the first one may go, for the node to answer that it is too long
                    client.sendto(bytes(mtu - HEADERS + 1), (address, port))
                    time.sleep(0.05)
        asyncio.run(net.teardown())


@on_its_own_node
def test_an_instance_elsewhere_chooses_a_bridge_and_a_free_subnet_and_keeps_them(tmp_path: Path) -> None:
    asyncio.run(network(tmp_path / "a", NetworkConfig()).setup())
    asyncio.run(network(tmp_path / "b", NetworkConfig()).setup())
    bridges = [name for name in names() if name.startswith("tare-")]
    chosen = {bridge: bridge_addresses(bridge) for bridge in bridges}
    assert len(bridges) == 2 and all(len(name) <= 15 for name in bridges)
    assert chosen[bridges[0]] != chosen[bridges[1]]
    assert all(address.endswith("/20") for addresses in chosen.values() for address in addresses)
    for bridge in bridges:  # as after a reboot
        sh(f"ip link delete {bridge}")
    asyncio.run(network(tmp_path / "b", NetworkConfig()).setup())
    asyncio.run(network(tmp_path / "a", NetworkConfig()).setup())
    assert {bridge: bridge_addresses(bridge) for bridge in bridges} == chosen


@on_its_own_node
def test_a_chosen_subnet_that_something_else_took_meanwhile_is_chosen_anew(tmp_path: Path) -> None:
    net = network(tmp_path, NetworkConfig(bridge=BRIDGE))
    asyncio.run(net.setup())
    (before,) = bridge_addresses()
    sh(f"ip addr add {before} dev lo")
    asyncio.run(net.setup())
    (after,) = bridge_addresses()
    assert after != before
    assert after in sh(f"ip addr show dev {BRIDGE}")
    assert before.replace(".1/", ".0/") not in sh("nft list ruleset")


@on_its_own_node
def test_a_subnet_that_the_node_uses_is_refused(tmp_path: Path) -> None:
    sh("ip link add taken type bridge")
    sh("ip addr add 10.99.0.77/25 dev taken")
    net = network(tmp_path)
    with pytest.raises(
        FailedPrecondition, match=r"use 10.99.0.0/24 for pods: 10.99.0.77/32 is in use.* on taken"
    ) as caught:
        asyncio.run(net.setup())
    assert caught.value.hint == "name another: [network] subnet"
    assert net.status() == str(caught.value)
    assert names() == ["lo", "taken"] and sh("nft list ruleset") == ""
    sh("ip link delete taken")
    assert net.status() is None


@on_its_own_node
def test_a_wider_route_of_the_node_does_not_forbid_a_subnet_that_was_configured(tmp_path: Path) -> None:
    sh("ip link add wide type bridge")
    sh("ip addr add 10.1.0.1/8 dev wide")
    sh("ip link set wide up")
    asyncio.run(network(tmp_path).setup())
    assert bridge_addresses() == ["10.99.0.1/24"]


@on_its_own_node
@pytest.mark.parametrize(
    ("commands", "cause"),
    [
        (["ip link add br-test type bridge"], "something else made it"),
        (["ip link add br-test type veth peer name other"], "it is not a bridge but veth"),
        (["ip link add br-test type bridge", "ip link set br-test alias tare:/run/x"], "the instance at /run/x"),
    ],
)
def test_a_link_of_that_name_that_is_not_ours_is_refused_and_left_alone(
    tmp_path: Path, commands: list[str], cause: str
) -> None:
    for command in commands:
        sh(command)
    before = sh("ip -details addr show")
    net = network(tmp_path)
    with pytest.raises(FailedPrecondition, match=cause) as caught:
        asyncio.run(net.setup())
    assert "ip link delete br-test" in str(caught.value)
    asyncio.run(net.teardown())
    assert sh("ip -details addr show") == before
    assert sh("nft list ruleset") == ""


@on_its_own_node
def test_an_address_that_something_else_gave_our_bridge_is_refused(tmp_path: Path) -> None:
    net = network(tmp_path)
    asyncio.run(net.setup())
    sh(f"ip addr add 10.50.0.1/24 dev {BRIDGE}")
    with pytest.raises(FailedPrecondition, match=r"10\.50\.0\.1/24.*ip address delete 10\.50\.0\.1/24 dev br-test"):
        asyncio.run(net.setup())
    assert bridge_addresses() == ["10.99.0.1/24", "10.50.0.1/24"]


@on_its_own_node
def test_the_subnet_changes_with_the_configuration_once_no_pod_holds_an_address(tmp_path: Path) -> None:
    database = Database(tmp_path / "state.db")
    moved = NetworkConfig(bridge=BRIDGE, subnet="10.77.0.0/24")
    with Namespace() as pod:
        before, after = network(tmp_path, database=database), network(tmp_path, moved, database)
        asyncio.run(before.setup())
        asyncio.run(before.attach("1" * 64, pod.fd, pod.netlink))
        with pytest.raises(FailedPrecondition, match=r"pods still hold addresses of 10\.99\.0\.0/24"):
            asyncio.run(after.setup())
        assert bridge_addresses() == ["10.99.0.1/24"]
        asyncio.run(before.detach("1" * 64))
        asyncio.run(after.setup())
        assert bridge_addresses() == ["10.77.0.1/24"]
        assert "10.99" not in sh("nft list ruleset")
        asyncio.run(after.settle())


@on_its_own_node
def test_a_bridge_that_was_deleted_comes_back_and_the_pods_links_with_it(tmp_path: Path) -> None:
    net = network(tmp_path)
    with Namespace() as pod, Namespace() as other:
        asyncio.run(net.setup())
        first = asyncio.run(net.attach("1" * 64, pod.fd, pod.netlink))
        sh(f"ip link delete {BRIDGE}")
        second = asyncio.run(net.attach("2" * 64, other.fd, other.netlink))
        assert net.status() is None
        server, client = pod.udp(first.ips[0], 7), other.udp()
        client.sendto(b"hello", (first.ips[0], 7))
        assert server.recvfrom(100)[1][0] == second.ips[0]
        asyncio.run(net.teardown())


@on_its_own_node
@pytest.mark.parametrize("mtu", [-1, 100, 65536])
def test_an_absurd_mtu_is_refused(tmp_path: Path, mtu: int) -> None:
    with pytest.raises(InvalidArgument, match="mtu"):
        network(tmp_path, NetworkConfig(mtu=mtu))


@on_its_own_node
def test_without_the_right_to_change_links_the_error_says_so(tmp_path: Path) -> None:
    net = network(tmp_path)

    def unprivileged() -> None:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        checked(libc.capset(header, (ctypes.c_uint32 * 6)()))  # of this thread only
        asyncio.run(net.setup())

    with pytest.raises(TareError, match="make bridge br-test: Operation not permitted"):
        in_thread(unprivileged)
