"""Pods on the embedded network, shown by packets: to each other, to and from the node, to the outside; and what is left when they go."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tare.config import NetworkConfig
from tare.errors import FailedPrecondition, InternalError, ResourceExhausted
from tare.network.attach import Attachment, EmbeddedNetwork
from tare.network.netlink import NetlinkError
from tare.state.database import Database
from tests.support.netns import TIMEOUT, Namespace, ip, on_its_own_node, sh, wire

pytestmark = pytest.mark.root
BRIDGE = "br-test"
A, B, C = ("a" * 64, "b" * 64, "c" * 64)


class Node:
    """An instance's network on this thread's node, with its state.db."""

    def __init__(self, directory: Path, subnet: str = "10.99.0.0/24", bridge: str = BRIDGE) -> None:
        self.database = Database(directory / "state.db")
        self.config = NetworkConfig(bridge=bridge, subnet=subnet)
        self.run = directory / "run"
        self.network = EmbeddedNetwork(self.database, self.config, self.run)
        asyncio.run(self.network.setup())

    def restart(self) -> None:
        """The next daemon, as after kill -9."""
        self.network = EmbeddedNetwork(self.database, self.config, self.run)
        asyncio.run(self.network.setup())

    def attach(self, pod_id: str, pod: Namespace) -> Attachment:
        return asyncio.run(self.network.attach(pod_id, pod.fd, pod.netlink))

    def detach(self, pod_id: str) -> None:
        asyncio.run(self.network.detach(pod_id))

    def settle(self) -> None:
        asyncio.run(self.network.settle())

    def leases(self) -> dict[str, str]:
        """Addresses that pods hold, with the pods."""
        return dict(self.database.execute("SELECT address, pod_id FROM leases WHERE released_at IS NULL"))


@contextmanager
def pods(count: int) -> Iterator[list[Namespace]]:
    """Namespaces for so many pods."""
    with ExitStack() as stack:
        yield [stack.enter_context(Namespace()) for _ in range(count)]


def links() -> list[str]:
    """The node's links but for the loopback."""
    return [link["ifname"] for link in ip("link show") if link["ifname"] != "lo"]


def node_udp(address: str, port: int = 0) -> socket.socket:
    """A datagram socket on the node."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(TIMEOUT)
    sock.bind((address, port))
    return sock


def sees(server: socket.socket, client: socket.socket, address: str) -> str:
    """Send a datagram to the server's port at the address and answer it; the client's address as the server saw it."""
    port = server.getsockname()[1]
    client.sendto(b"ping", (address, port))
    data, source = server.recvfrom(100)
    server.sendto(data + b"!", source)
    answer, sender = client.recvfrom(100)
    assert (answer, sender) == (b"ping!", (address, port))
    return str(source[0])


@on_its_own_node
def test_a_pod_has_its_address_its_route_and_its_loopback(tmp_path: Path) -> None:
    node = Node(tmp_path)
    with Namespace() as pod:
        got = node.attach(A, pod)
        assert got == Attachment(("10.99.0.2",), "eth0", "0a:58:0a:63:00:02", "tare" + "a" * 11, "10.99.0.1")
        lo, eth0 = pod.ip("addr show")
        assert {"UP", "LOWER_UP"} <= set(lo["flags"]) & set(eth0["flags"])
        assert (eth0["ifname"], eth0["address"]) == ("eth0", got.mac)
        (address,) = [a for a in eth0["addr_info"] if a["family"] == "inet"]
        assert (address["local"], address["prefixlen"], address["broadcast"]) == ("10.99.0.2", 24, "10.99.0.255")
        routes = {(route["dst"], route.get("gateway"), route["dev"]) for route in pod.ip("-4 route show")}
        assert routes == {("default", "10.99.0.1", "eth0"), ("10.99.0.0/24", None, "eth0")}
        (port,) = ip(f"link show dev {got.host_interface}")
        assert port["master"] == BRIDGE and port["ifalias"].endswith(A)
        assert port["linkinfo"]["info_slave_data"]["hairpin"] is True
        assert sees(pod.udp("127.0.0.1"), pod.udp(), "127.0.0.1") == "127.0.0.1"


@on_its_own_node
def test_packets_between_pods_and_the_node_both_ways(tmp_path: Path) -> None:
    node = Node(tmp_path)
    with pods(2) as (one, two):
        first, second = node.attach(A, one).ips[0], node.attach(B, two).ips[0]
        assert sees(one.udp(), two.udp(), first) == second
        assert sees(two.udp(), one.udp(), second) == first
        with node_udp("0.0.0.0") as on_node:
            assert sees(on_node, one.udp(), "10.99.0.1") == first
            assert sees(one.udp(), on_node, first) == "10.99.0.1"


@on_its_own_node
def test_packets_to_the_outside_wear_the_nodes_address_and_those_to_the_node_do_not(tmp_path: Path) -> None:
    with Namespace() as outside, Namespace() as pod:
        wire(outside, "uplink", "eth9")
        sh("ip addr add 192.0.2.2/24 dev uplink")
        sh("ip route add default via 192.0.2.1")
        outside.sh("ip addr add 192.0.2.1/24 dev eth9")
        outside.sh("ip addr add 198.51.100.7/32 dev lo")
        node = Node(tmp_path)
        (address,) = node.attach(A, pod).ips
        assert sees(outside.udp(), pod.udp(), "192.0.2.1") == "192.0.2.2"
        assert sees(outside.udp("198.51.100.7"), pod.udp(), "198.51.100.7") == "192.0.2.2"
        with node_udp("192.0.2.2") as on_node:
            assert sees(on_node, pod.udp(), "192.0.2.2") == address
        outside.sh("ip route add 10.99.0.0/24 via 192.0.2.2")
        assert sees(pod.udp(), outside.udp(), address) == "192.0.2.1"


@on_its_own_node
def test_packets_pass_as_soon_as_attach_returns(tmp_path: Path) -> None:
    """Asked for on the first pod of a bridge too, whose carrier comes with it. A lost ARP request shows as a second."""
    node = Node(tmp_path)
    with node_udp("10.99.0.1", 7) as server, pods(30) as many:
        took = []
        for number, pod in enumerate(many):
            client = pod.udp()
            node.attach(f"{number:011x}", pod)
            start = time.monotonic()
            sees(server, client, "10.99.0.1")
            took.append(time.monotonic() - start)
            if number % 2:
                for gone in (number - 1, number):
                    node.detach(f"{gone:011x}")
        assert max(took) < 0.5
        node.settle()


@on_its_own_node
def test_detach_cuts_off_at_once_and_again_is_nothing(tmp_path: Path) -> None:
    """The kernel's slow removal of the link is held up here, to show that nothing waits for it."""
    node, go = Node(tmp_path), threading.Event()
    with pods(2) as (one, two):
        (first,) = node.attach(A, one).ips
        node.attach(B, two)
        server, client = one.udp(), two.udp()
        sees(server, client, first)
        node.network._removal.submit(go.wait, TIMEOUT)
        try:
            node.detach(A)
            assert node.leases() == {"10.99.0.3": B}
            assert "tare" + "a" * 11 in links()
            client.settimeout(0.2)
            with pytest.raises(TimeoutError):
                server.settimeout(0.2)
                sees(server, client, first)
        finally:
            go.set()
        node.detach(A)
        node.detach("never was")
        node.settle()
        assert links() == [BRIDGE, "tare" + "b" * 11]
        assert node.leases() == {"10.99.0.3": B}


@on_its_own_node
def test_detach_when_the_namespace_is_gone(tmp_path: Path) -> None:
    node = Node(tmp_path)
    with Namespace() as pod:
        node.attach(A, pod)
    node.detach(A)
    node.detach(A)
    node.settle()
    assert (links(), node.leases()) == ([BRIDGE], {})


@on_its_own_node
def test_an_address_rests_before_it_comes_again(tmp_path: Path) -> None:
    node = Node(tmp_path, "10.99.0.0/29")
    got = []
    for number in range(12):
        with Namespace() as pod:
            got.append(node.attach(f"{number:011x}", pod).ips[0])
            node.detach(f"{number:011x}")
    assert got == [f"10.99.0.{2 + number % 5}" for number in range(12)]
    node.settle()


@on_its_own_node
def test_an_exhausted_range_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path, "10.99.0.0/30")
    with pods(2) as (one, two):
        node.attach(A, one)
        with pytest.raises(ResourceExhausted, match=r"10\.99\.0\.0/30.*\[network\] subnet"):
            node.attach(B, two)
        assert links() == [BRIDGE, "tare" + "a" * 11]
        assert [link["ifname"] for link in two.ip("link show")] == ["lo"]
        node.detach(A)
        assert node.attach(B, two).ips == ("10.99.0.2",)


@on_its_own_node
def test_attaching_again_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    node = Node(tmp_path)
    with pods(2) as (one, two):
        (first,) = node.attach(A, one).ips
        with pytest.raises(FailedPrecondition, match="it holds one already"):
            node.attach(A, two)
        node.attach(B, two)
        assert sees(one.udp(), two.udp(), first) == "10.99.0.3"


@on_its_own_node
def test_a_namespace_that_has_an_eth0_leaves_nothing_behind(tmp_path: Path) -> None:
    node = Node(tmp_path)
    with Namespace() as pod:
        pod.sh("ip link add eth0 type bridge")
        with pytest.raises(NetlinkError, match="make veth tareaaaaaaaaaaa with eth0 in the pod: File exists"):
            node.attach(A, pod)
        node.settle()
        assert (links(), node.leases()) == ([BRIDGE], {})
        assert [link["ifname"] for link in pod.ip("link show")] == ["lo", "eth0"]


@on_its_own_node
def test_a_pod_in_a_user_namespace_of_its_own(tmp_path: Path) -> None:
    node = Node(tmp_path)
    command = ["unshare", "--user", "--net", "sh", "-c", "echo inside; read end"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "inside\n"
        with Namespace(process.pid) as pod, node_udp("10.99.0.1") as on_node:
            (address,) = node.attach(A, pod).ips
            assert sees(on_node, pod.udp(), "10.99.0.1") == address
            node.detach(A)
        process.stdin.close()
    node.settle()
    assert (links(), node.leases()) == ([BRIDGE], {})


@on_its_own_node
def test_a_socket_of_another_namespace_is_noticed_before_anything_is_changed_there(tmp_path: Path) -> None:
    node = Node(tmp_path)
    with pods(2) as (pod, other):
        other.sh("ip link add eth0 type bridge")
        before = other.sh("ip addr show")
        with pytest.raises(InternalError, match="not of the pod's namespace"):
            asyncio.run(node.network.attach(A, pod.fd, other.netlink))
        node.settle()
        assert other.sh("ip addr show") == before
        assert (links(), node.leases()) == ([BRIDGE], {})
        assert [link["ifname"] for link in pod.ip("link show")] == ["lo"]


@on_its_own_node
def test_a_descriptor_that_is_no_namespace_leaves_nothing_behind(tmp_path: Path) -> None:
    node = Node(tmp_path)
    with Namespace() as pod, open("/dev/null") as null:
        with pytest.raises(NetlinkError, match="make veth"):
            asyncio.run(node.network.attach(A, null.fileno(), pod.netlink))
        node.settle()
        assert (links(), node.leases()) == ([BRIDGE], {})


@on_its_own_node
def test_a_link_of_someone_else_by_the_pods_name_is_left_alone(tmp_path: Path) -> None:
    node = Node(tmp_path)
    sh("ip link add tareaaaaaaaaaaa type bridge")
    before = sh("ip -details link show dev tareaaaaaaaaaaa")
    with Namespace() as pod:
        with pytest.raises(FailedPrecondition, match="a link tareaaaaaaaaaaa exists already"):
            node.attach(A, pod)
        node.detach(A)
        asyncio.run(node.network.recover(set()))
        node.settle()
    assert sh("ip -details link show dev tareaaaaaaaaaaa") == before
    assert node.leases() == {}


@on_its_own_node
def test_recover_removes_what_belongs_to_no_pod_and_nothing_else(tmp_path: Path) -> None:
    node = Node(tmp_path)
    with pods(3) as (one, two, three):
        (first,) = node.attach(A, one).ips
        node.attach(B, two)
        (third,) = node.attach(C, three).ips
        sh("ip link add veth0 type veth peer name veth1")
        sh(f"ip link set veth0 master {BRIDGE}")
        node.restart()
        asyncio.run(node.network.recover({A, C, "one that has no network"}))
        assert node.leases() == {first: A, third: C}
        node.settle()
        assert sorted(links()) == sorted([BRIDGE, "tare" + "a" * 11, "tare" + "c" * 11, "veth0", "veth1"])
        assert sees(one.udp(), three.udp(), first) == third


@on_its_own_node
def test_recover_after_a_reboot_frees_the_leases_of_the_dead_even_before_setup(tmp_path: Path) -> None:
    node = Node(tmp_path, "10.99.0.0/29")
    for boot in range(20):
        with pods(3) as several:
            for number, pod in enumerate(several):
                node.attach(f"{boot:x}{number}" + "d" * 62, pod)
            sh(f"ip link delete {BRIDGE}")
        node.network = EmbeddedNetwork(node.database, node.config, node.run)
        asyncio.run(node.network.recover(set()))
        assert node.leases() == {}
    asyncio.run(node.network.teardown())


@on_its_own_node
def test_two_instances_side_by_side(tmp_path: Path) -> None:
    left, right = Node(tmp_path / "l", "10.98.0.0/24", "br-l"), Node(tmp_path / "r", "10.99.0.0/24", "br-r")
    with pods(2) as (one, two):
        (first,) = left.attach(A, one).ips
        (second,) = right.attach(B, two).ips
        asyncio.run(left.network.recover({A}))
        asyncio.run(right.network.recover({B}))
        right.detach(A)
        assert sees(one.udp(), two.udp(), first) == "10.98.0.1"  # the node's address on that side: masqueraded
        asyncio.run(left.network.teardown())
        right.restart()
        assert sorted(links()) == ["br-r", "tare" + "b" * 11]
        assert sh("nft list tables") == "table inet tare-br-r\n"
        with node_udp("10.99.0.1") as on_node:
            assert sees(on_node, two.udp(), "10.99.0.1") == second
