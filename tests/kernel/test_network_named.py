"""Several networks of one instance, shown by packets: who reaches whom, what pods are kept from, and what there is when settings change.

The outside is a namespace at the other end of the node's uplink.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tare.config import NamedNetworkConfig, NetworkConfig
from tare.errors import FailedPrecondition, InvalidArgument, NotFound
from tare.network import attach
from tare.network.attach import Attachment
from tare.network.embedded import ANNOTATION, EmbeddedNetworks
from tare.network.hostports import Port
from tare.network.rtnetlink import Link
from tare.network.wishes import Wishes
from tare.state.database import Database
from tests.support.netns import TIMEOUT, Namespace, ip, on_its_own_node, sh, udp, wire

pytestmark = pytest.mark.root
A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
BLUE = NamedNetworkConfig(bridge="br-blue", subnet="10.98.0.0/24", subnet6="fd00:98::/64")
GREEN = NamedNetworkConfig(bridge="br-green", subnet="10.97.0.0/24")
CONFIG = NetworkConfig(
    bridge="br-test", subnet="10.99.0.0/24", subnet6="fd00:99::/64", networks={"blue": BLUE, "green": GREEN}
)


class Node:
    """A node with an uplink, the world behind it, and one instance's networks."""

    def __init__(self, directory: Path, stack: ExitStack, config: NetworkConfig) -> None:
        self.stack = stack
        self.outside = stack.enter_context(Namespace())
        wire(self.outside, "uplink", "eth9")
        sh("ip addr add 192.0.2.2/24 dev uplink")
        self.outside.sh("ip addr add 192.0.2.1/24 dev eth9")
        self.directory = directory
        self.database = Database(directory / "state.db")
        self.restart(config)

    def restart(self, config: NetworkConfig) -> None:
        """The next daemon, as after kill -9."""
        self.networks = EmbeddedNetworks(self.database, config, self.directory / "run")
        asyncio.run(self.networks.setup())

    def attach(self, pod_id: str, name: str = "", *ports: Port) -> tuple[Namespace, Attachment]:
        """A pod on a network of this name."""
        pod = self.stack.enter_context(Namespace())
        annotations = {ANNOTATION: name} if name else {}
        wishes = Wishes(name=pod_id[:1], namespace="test", ports=ports, annotations=annotations)
        return pod, asyncio.run(self.networks.attach(pod_id, pod.fd, pod.netlink, wishes))

    def detach(self, pod_id: str) -> None:
        asyncio.run(self.networks.detach(pod_id))
        asyncio.run(self.networks.settle())

    def state(self, name: str) -> str:
        """What `list` says of a network."""
        return next(str(item["state"]) for item in self.networks.list() if item["name"] == name)


@contextmanager
def node(directory: Path, config: NetworkConfig = CONFIG) -> Iterator[Node]:
    """The node of this thread."""
    with ExitStack() as stack:
        made = Node(directory, stack, config)
        yield made
        asyncio.run(made.networks.teardown())


def bridges() -> list[str]:
    """The node's bridges."""
    return sorted(link["ifname"] for link in ip("link show type bridge"))


def sees(server: socket.socket, client: socket.socket, address: str) -> str:
    """Send a datagram to the server's port at the address and answer it; the client's address as the server saw it."""
    client.sendto(b"ping", (address, server.getsockname()[1]))
    data, source = server.recvfrom(100)
    server.sendto(data, source)
    assert client.recvfrom(100)[1][0] == address
    return str(source[0])


def refused(pod: Namespace, address: str, number: int = 80) -> int:
    """The error with which a connection from the pod is refused at once; a packet that is dropped would let it wait."""

    def attempt() -> int:
        try:
            with socket.create_connection((address, number), timeout=TIMEOUT):
                return 0
        except TimeoutError:
            return errno.ETIMEDOUT
        except OSError as error:
            return error.errno or -1

    return pod.run(attempt)


UNREACHABLE = (errno.EHOSTUNREACH, errno.EACCES)  # as IPv4 and IPv6 translate "administratively prohibited"


@on_its_own_node
def test_a_pod_is_on_the_network_that_it_names(tmp_path: Path) -> None:
    with node(tmp_path) as on:
        assert bridges() == ["br-test"] and on.state("blue") == "made when needed"
        one, first = on.attach(A)
        two, second = on.attach(B, "blue")
        three, third = on.attach(C, "blue")
        assert (first.ips[0], second.ips, third.ips[0]) == ("10.99.0.2", ("10.98.0.2", "fd00:98::2"), "10.98.0.3")
        assert bridges() == ["br-blue", "br-test"] and on.state("blue") == "ready"
        assert sees(two.udp(), three.udp(), second.ips[0]) == third.ips[0]
        with udp("10.98.0.1") as on_node:
            assert sees(on_node, two.udp(), "10.98.0.1") == second.ips[0]
        for pod in (one, two):
            assert sees(on.outside.udp(), pod.udp(), "192.0.2.1") == "192.0.2.2"
        with pytest.raises(InvalidArgument, match=r"network red: there are only blue, default, green .*networks\.red"):
            on.attach(D, "red")


@on_its_own_node
def test_pods_of_different_networks_reach_each_other_by_published_ports_alone(tmp_path: Path) -> None:
    with node(tmp_path) as on:
        one, first = on.attach(A, "", Port(protocol="tcp", host_port=8080, container_port=80))
        two, second = on.attach(B, "blue")
        server = one.keep(lambda: socket.create_server(("0.0.0.0", 80)))
        back = two.keep(lambda: socket.create_server(("::", 80), family=socket.AF_INET6))
        assert server and back
        for pod, other in ((two, first), (one, second)):
            for address in other.ips:
                assert refused(pod, address) in UNREACHABLE, address
        for address in ("192.0.2.2", "10.99.0.1", "10.98.0.1"):
            assert refused(two, address, 8080) == 0, address
        with on.outside.run(lambda: socket.create_connection(("192.0.2.2", 8080), timeout=TIMEOUT)):
            pass


@on_its_own_node
def test_a_pod_is_taken_off_the_network_that_it_is_on(tmp_path: Path) -> None:
    """Ports, link and lease go, also where a new daemon does it, and others' stay."""
    with node(tmp_path) as on:
        port = Port(protocol="tcp", host_port=8080, container_port=80)
        on.attach(A)
        on.attach(B, "blue", port)
        on.restart(CONFIG)
        assert "10.98.0.2 . 80" in sh("nft list table inet tare-br-blue")
        on.detach(B)
        assert "10.98.0.2 . 80" not in sh("nft list table inet tare-br-blue")
        assert [link["ifname"] for link in ip("link show type veth")][1:] == ["tare" + "a" * 11]
        on.attach(C, "green", port)
        asyncio.run(on.networks.recover({A}))
        asyncio.run(on.networks.settle())
        assert [link["ifname"] for link in ip("link show type veth")][1:] == ["tare" + "a" * 11]
        assert {item["name"]: len(item["pods"]) for item in on.networks.list()} == {"default": 1, "blue": 0, "green": 0}


@on_its_own_node
def test_a_network_that_the_settings_name_no_more_stays_for_its_pods_and_goes_with_them(tmp_path: Path) -> None:
    with node(tmp_path) as on:
        one, first = on.attach(A, "blue")
        two, second = on.attach(B, "blue")
        on.attach(D, "green")
        on.detach(D)
        on.restart(NetworkConfig(bridge="br-test", subnet="10.99.0.0/24", subnet6="fd00:99::/64"))
        assert on.state("blue") == "former" and bridges() == ["br-blue", "br-test"]
        assert sees(one.udp(), two.udp(), first.ips[0]) == second.ips[0]
        three, _ = on.attach(C)
        assert refused(three, first.ips[0]) in UNREACHABLE
        with pytest.raises(InvalidArgument, match="there are only default"):
            on.attach(D, "blue")
        sh("ip link delete br-blue")
        on.restart(NetworkConfig(bridge="br-test", subnet="10.99.0.0/24", subnet6="fd00:99::/64"))
        assert sees(one.udp(), two.udp(), first.ips[0]) == second.ips[0]
        on.detach(A)
        assert bridges() == ["br-blue", "br-test"]
        on.detach(B)
        assert bridges() == ["br-test"] and [item["name"] for item in on.networks.list()] == ["default"]
        assert sh("nft list tables") == "table inet tare-br-test\n"


@on_its_own_node
def test_pods_are_kept_from_the_node_also_when_the_settings_name_their_network_no_more(tmp_path: Path) -> None:
    shut = replace(CONFIG, networks={"blue": replace(BLUE, isolation=("node",))})
    with node(tmp_path, shut) as on:
        one, _ = on.attach(A, "blue")
        server = socket.create_server(("192.0.2.2", 80))
        with server:
            assert refused(one, "192.0.2.2") == errno.EHOSTUNREACH
            on.restart(replace(CONFIG, networks={}))
            assert refused(one, "192.0.2.2") == errno.EHOSTUNREACH
            on.restart(CONFIG)
            assert refused(one, "192.0.2.2") == 0


@on_its_own_node
def test_a_pod_that_comes_while_its_network_is_taken_away_finds_it_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with node(tmp_path) as on, Namespace() as pod:
        on.attach(A, "blue")
        on.detach(A)
        held, remove_link = threading.Event(), attach.remove_link

        def slow(link: Link) -> None:
            held.wait(TIMEOUT)
            remove_link(link)

        async def scenario() -> None:
            removal = asyncio.ensure_future(on.networks.remove("blue"))
            await asyncio.sleep(0)
            wishes = Wishes(annotations={ANNOTATION: "blue"})
            attaching = asyncio.ensure_future(on.networks.attach(B, pod.fd, pod.netlink, wishes))
            for _ in range(5):
                await asyncio.sleep(0)
            held.set()
            await asyncio.gather(removal, attaching)

        monkeypatch.setattr(attach, "remove_link", slow)
        asyncio.run(scenario())
        (link,) = ip("link show dev tare" + "b" * 11)
        assert link["master"] == "br-blue"


@on_its_own_node
def test_networks_choose_bridges_and_ranges_that_are_apart(tmp_path: Path) -> None:
    names = {name: NamedNetworkConfig() for name in ("red", "blue", "green")}
    with node(tmp_path, NetworkConfig(networks=names)) as on:
        addresses = [on.attach(str(number) * 64, name)[1].ips[0] for number, name in enumerate(["", *names])]
        found = {item["name"]: (item["bridge"], item["subnets"][0]) for item in on.networks.list()}
        assert len(set(found.values())) == len({bridge for bridge, _ in found.values()}) == 4
        assert len({address.rpartition(".")[0] for address in addresses}) == 4
        on.restart(NetworkConfig(networks=names))
        assert {item["name"]: (item["bridge"], item["subnets"][0]) for item in on.networks.list()} == found


@on_its_own_node
def test_a_range_of_the_clusters_that_is_another_networks_is_refused(tmp_path: Path) -> None:
    wide = NamedNetworkConfig(bridge="br-wide", subnet="10.244.0.0/16")
    with node(tmp_path, NetworkConfig(bridge="br-test", networks={"wide": wide})) as on:
        with pytest.raises(FailedPrecondition, match=r"10\.244\.0\.0/16 is that of network wide .*range of its own"):
            asyncio.run(on.networks.use_ranges(["10.244.7.0/24"]))
        asyncio.run(on.networks.use_ranges(["10.243.7.0/24"]))
        assert on.attach(A)[1].ips == ("10.243.7.2",)


@pytest.mark.parametrize(
    ("blue", "words"),
    [
        (NamedNetworkConfig(bridge="br-test"), r"\[network.networks.blue\] bridge = 'br-test': \[network\] has it"),
        (
            NamedNetworkConfig(subnet="10.99.0.128/25"),
            "it overlaps subnet 10.99.0.0/24 of .network. .*range of its own",
        ),
        (NamedNetworkConfig(subnet6="fd00:99::/96"), "it overlaps subnet6 fd00:99::/64 of .network."),
        (NamedNetworkConfig(mtu=99), r"\[network.networks.blue\] mtu = 99"),
    ],
)
def test_networks_that_cannot_be_side_by_side(tmp_path: Path, blue: NamedNetworkConfig, words: str) -> None:
    config = NetworkConfig(bridge="br-test", subnet="10.99.0.0/24", subnet6="fd00:99::/64", networks={"blue": blue})
    with pytest.raises(InvalidArgument, match=words):
        EmbeddedNetworks(Database(tmp_path / "state.db"), config, tmp_path / "run")


@on_its_own_node
def test_a_network_is_removed_when_no_pod_is_on_it_and_comes_back_when_one_asks(tmp_path: Path) -> None:
    with node(tmp_path) as on:
        on.attach(A, "blue")
        with pytest.raises(FailedPrecondition, match="remove network blue: 1 pods are on it: aaaaaaaaaaaaa"):
            asyncio.run(on.networks.remove("blue"))
        on.detach(A)
        with pytest.raises(NotFound, match="tare network ls"):
            asyncio.run(on.networks.remove("red"))
        asyncio.run(on.networks.remove("blue"))
        asyncio.run(on.networks.remove("br-test"))
        assert (bridges(), sh("nft list ruleset")) == ([], "")
        assert on.networks.status() is None, "the node is ready all the same: what is missing comes with the next pod"
        assert bridges() == []
        assert on.attach(B)[1].ips[0] == "10.99.0.2" and bridges() == ["br-test"]
        on.attach(C, "blue")
        assert bridges() == ["br-blue", "br-test"]


@on_its_own_node
def test_the_nodes_settings_are_given_back_where_nobody_else_may_need_them(tmp_path: Path) -> None:
    forward, forward6 = Path("/proc/sys/net/ipv4/ip_forward"), Path("/proc/sys/net/ipv6/conf/all/forwarding")
    for setting in (forward, forward6):
        setting.write_text("0")  # a new namespace may have what the machine has
    before = (forward.read_text(), forward6.read_text())
    with node(tmp_path) as on:
        on.attach(A, "blue")
        assert (forward.read_text(), forward6.read_text()) == ("1\n", "1\n")
        removed, settings, kept = asyncio.run(on.networks.prune(forwarding=True))
        assert ([network.name for network in removed], settings, kept) == (["default"], [], "pods are on blue")
        on.detach(A)
        on.restart(CONFIG)
        sh("ip link add docker0 type bridge")
        removed, settings, kept = asyncio.run(on.networks.prune(forwarding=True))
        assert (len(removed), settings, kept) == (2, [], "other bridges may need it: docker0")
        assert forward.read_text() == "1\n"
        sh("ip link delete docker0")
        assert asyncio.run(on.networks.prune(forwarding=False))[1:] == ([], "")
        _, settings, kept = asyncio.run(on.networks.prune(forwarding=True))
        assert (sorted(settings), kept) == (["net/ipv4/ip_forward=0", "net/ipv6/conf/all/forwarding=0"], "")
        assert (forward.read_text(), forward6.read_text()) == before
        forward.write_text("1")  # by somebody else, before the next daemon: not Tare's to set back
        on.restart(CONFIG)
        assert "net/ipv4/ip_forward=0" not in asyncio.run(on.networks.prune(forwarding=True))[1]
        assert (bridges(), sh("nft list ruleset")) == ([], "")


@on_its_own_node
def test_pods_are_kept_from_what_the_node_alone_should_reach(tmp_path: Path) -> None:
    """Metadata of a cloud at 169.254.169.254 behind the uplink, a resolver of the node's at 169.254.20.10, its own addresses, its fe80 one."""
    config = NetworkConfig(
        bridge="br-test",
        subnet="10.99.0.0/24",
        subnet6="fd00:99::/64",
        isolation=("link-local",),
        networks={"blue": BLUE, "shut": NamedNetworkConfig(subnet="10.96.0.0/24", isolation=("link-local", "node"))},
    )
    with node(tmp_path, config) as on:
        on.outside.sh("ip addr add 169.254.169.254/32 dev eth9")
        sh("ip route add 169.254.169.254/32 via 192.0.2.1")
        sh("ip addr add 169.254.20.10/32 dev lo")
        metadata = on.outside.keep(lambda: socket.create_server(("0.0.0.0", 80)))
        kept, own = on.attach(A, "", Port(protocol="tcp", host_port=8080, container_port=80))
        shut, its = on.attach(B, "shut")
        free, _ = on.attach(C, "blue")
        server = kept.keep(lambda: socket.create_server(("0.0.0.0", 80)))
        pods = shut.keep(lambda: socket.create_server(("0.0.0.0", 80)))
        link_local = next(a["local"] for a in ip("addr show dev br-test")[0]["addr_info"] if a["scope"] == "link")
        with socket.create_server(("::", 80), family=socket.AF_INET6, dualstack_ipv6=True):
            assert metadata and server and pods
            for address in ("169.254.169.254", "169.254.20.10"):
                assert [refused(pod, address) for pod in (kept, shut, free)] == [errno.EHOSTUNREACH] * 2 + [0]
            assert refused(kept, f"{link_local}%eth0") in UNREACHABLE
            assert [refused(kept, address) for address in ("10.99.0.1", "192.0.2.2", "192.0.2.1", "fd00:99::1")] == [
                0
            ] * 4
            assert [refused(shut, address) for address in ("10.96.0.1", "192.0.2.2")] == [errno.EHOSTUNREACH] * 2
            assert refused(shut, "192.0.2.1") == 0, "the outside is reached"
            assert refused(shut, "192.0.2.2", 8080) == 0, "and what is published"
            for address in (own.ips[0], its.ips[0]):  # a kubelet's probe
                with socket.create_connection((address, 80), timeout=TIMEOUT):
                    pass


@on_its_own_node
def test_a_network_that_cannot_be_there_is_told_and_hinders_no_other(tmp_path: Path) -> None:
    with node(tmp_path) as on:
        on.attach(A, "blue")
        sh("ip link delete br-blue")
        sh("ip link add br-blue type bridge")
        assert on.networks.status() is None
        assert on.state("blue") == "broken"
        (told,) = (item["trouble"] for item in on.networks.list() if item["name"] == "blue")
        assert "something else made it" in str(told)
        with pytest.raises(FailedPrecondition, match="something else made it"):
            on.attach(B, "blue")
        on.attach(C)
        sh("ip link delete br-blue")
        assert on.networks.status() is None and on.state("blue") == "ready"
        on.attach(B, "blue")
