"""Host ports, shown by packets: from outside, from the node by any of its addresses, from other pods and from the pod itself; who may have
one; and what is left when a pod goes.

The outside is a namespace at the other end of the node's uplink.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tare.config import NetworkConfig
from tare.errors import FailedPrecondition, InvalidArgument
from tare.network import firewall, nft
from tare.network.addresses import Leases
from tare.network.attach import Attachment, EmbeddedNetwork
from tare.network.hostports import Port
from tare.network.netlink import Message, Netlink, NetlinkError
from tare.network.wishes import Wishes
from tare.state.database import Database
from tests.support.netns import TIMEOUT, Namespace, on_its_own_node, sh, udp, wire

pytestmark = pytest.mark.root
BRIDGE = "br-test"
A, B, C = ("a" * 64, "b" * 64, "c" * 64)
UPLINK = {4: "192.0.2.2", 6: "2001:db8::2"}
OUTSIDE = {4: "192.0.2.1", 6: "2001:db8::1"}
BRIDGED = {4: "10.99.0.1", 6: "fd00:99::1"}
LOCAL = {4: "127.0.0.1", 6: "::1"}
ANY = {4: "0.0.0.0", 6: "::"}


class Node:
    """A node with an uplink, the world behind it, and one instance's network."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.stack = stack
        self.outside = stack.enter_context(Namespace())
        wire(self.outside, "uplink", "eth9")
        for version, length in ((4, 24), (6, 64)):
            options = " nodad" if version == 6 else ""
            sh(f"ip addr add {UPLINK[version]}/{length} dev uplink{options}")
            self.outside.sh(f"ip addr add {OUTSIDE[version]}/{length} dev eth9{options}")
        self.config = NetworkConfig(bridge=BRIDGE, subnet="10.99.0.0/24", subnet6="fd00:99::/64")
        self.database = Database(directory / "state.db")
        self.directory = directory
        self.restart()

    def restart(self) -> None:
        """The next daemon, as after kill -9."""
        self.network = EmbeddedNetwork(self.database, self.config, self.directory / "run")
        asyncio.run(self.network.setup())

    def pod(self) -> Namespace:
        """A namespace for a pod."""
        return self.stack.enter_context(Namespace())

    def attach(self, pod_id: str, pod: Namespace, *ports: Port) -> Attachment:
        wishes = Wishes(name=pod_id[:1], namespace="test", ports=ports)

        async def settled() -> Attachment:
            got = await self.network.attach(pod_id, pod.fd, pod.netlink, wishes)
            await self.network.settle()
            return got

        return asyncio.run(settled())

    def detach(self, pod_id: str) -> None:
        async def settled() -> None:
            await self.network.detach(pod_id)
            await self.network.settle()

        asyncio.run(settled())


@contextmanager
def node(directory: Path) -> Iterator[Node]:
    """The node of this thread."""
    with ExitStack() as stack:
        made = Node(directory, stack)
        yield made
        asyncio.run(made.network.teardown())


def port(host_port: int, container_port: int = 80, protocol: str = "tcp", host_ip: str = "") -> Port:
    return Port(protocol=protocol, host_port=host_port, container_port=container_port, host_ip=host_ip)


def here(make: Callable[[], socket.socket]) -> socket.socket:
    """A socket on the node."""
    return make()


def listener(address: str, number: int) -> socket.socket:
    """A listening socket in the namespace of this thread."""
    sock = socket.create_server((address, number), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
    sock.settimeout(TIMEOUT)
    return sock


def dialled(
    server: socket.socket, where: Callable[[Callable[[], socket.socket]], socket.socket], address: str, number: int
) -> str:
    """Connect from somewhere to the address, say something both ways; the client's address as the server saw it."""
    with where(lambda: socket.create_connection((address, number), timeout=TIMEOUT)) as client:
        connection, peer = server.accept()
        with connection:
            connection.settimeout(TIMEOUT)
            client.sendall(b"ping")
            assert connection.recv(100) == b"ping"
            connection.sendall(b"pong")
            assert client.recv(100) == b"pong"
            return str(peer[0])


def sees(server: socket.socket, client: socket.socket, address: str, number: int) -> str:
    """Send a datagram to the address and answer it; the client's address as the server saw it."""
    client.sendto(b"ping", (address, number))
    data, source = server.recvfrom(100)
    server.sendto(data + b"!", source)
    answer, sender = client.recvfrom(100)
    assert (answer, sender[0], sender[1]) == (b"ping!", address, number)
    return str(source[0])


@pytest.mark.parametrize("bridged", ["0", "1"])
@on_its_own_node
def test_every_way_to_a_port_in_both_families_over_tcp_and_udp(tmp_path: Path, bridged: str) -> None:
    """With packets that stay on the bridge shown to the packet filter, as kube-proxy wants it, and without."""
    for tool in ("ip", "ip6"):
        Path(f"/proc/sys/net/bridge/bridge-nf-call-{tool}tables").write_text(bridged)
    with node(tmp_path) as on:
        pod, other = on.pod(), on.pod()
        own = dict(zip((4, 6), on.attach(A, pod, port(8080), port(5353, 53, "udp")).ips, strict=True))
        theirs = dict(zip((4, 6), on.attach(B, other).ips, strict=True))
        assert own == {4: "10.99.0.2", 6: "fd00:99::2"}
        for version in (4, 6):
            # Who the pod sees: the caller itself where the answer comes back through the node, otherwise the node.
            ways: list[tuple[Namespace | None, str, str]] = [
                (on.outside, UPLINK[version], OUTSIDE[version]),
                (None, UPLINK[version], UPLINK[version]),
                (None, BRIDGED[version], BRIDGED[version]),
                (other, UPLINK[version], BRIDGED[version]),
                (other, BRIDGED[version], BRIDGED[version]),
                (pod, UPLINK[version], BRIDGED[version]),
                (pod, BRIDGED[version], BRIDGED[version]),
            ]
            if version == 4:
                ways.append((None, LOCAL[4], BRIDGED[4]))
            tcp = pod.keep(lambda v=version: listener(ANY[v], 80))  # type: ignore[misc]
            dgram = pod.udp(own[version], 53)
            for place, address, seen in ways:
                where = here if place is None else place.run
                assert dialled(tcp, where, address, 8080) == seen, (version, address)
                with where(lambda v=version: udp(ANY[v])) as client:  # type: ignore[misc]
                    assert sees(dgram, client, address, 5353) == seen, (version, address)
            if version == 6:
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((LOCAL[6], 8080), timeout=TIMEOUT)
            # Straight to the pod, nothing is translated.
            assert dialled(tcp, other.run, own[version], 80) == theirs[version]
            tcp.close()


def sctp_init(source: int, destination: int) -> bytes:
    """An INIT chunk in an SCTP packet (RFC 9260), with its CRC32c: this kernel may have no SCTP sockets."""
    chunk = struct.pack(">BBHIIHHI", 1, 0, 20, 1, 65536, 1, 1, 1)
    packet = struct.pack(">HHII", source, destination, 0, 0) + chunk
    crc = 0xFFFFFFFF
    for byte in packet:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return packet[:8] + struct.pack("<I", crc ^ 0xFFFFFFFF) + packet[12:]


def raw_sctp(family: int) -> socket.socket:
    """All SCTP packets that come to the namespace of this thread."""
    sock = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_SCTP)
    sock.settimeout(TIMEOUT)
    return sock


def arrives(server: socket.socket, header: int, send: Callable[[], object], source: int) -> int:
    """The port at which the packet with this source port arrives; sent again where the first is lost on the way, as SCTP would."""
    server.settimeout(0.5)
    for _ in range(10):
        send()
        with suppress(TimeoutError):
            while True:
                found, destination = struct.unpack_from(">HH", server.recv(2000), header)
                if found == source:
                    return int(destination)
    raise TimeoutError(f"nothing came from port {source}")


@on_its_own_node
def test_an_sctp_packet_finds_its_pod(tmp_path: Path) -> None:
    with node(tmp_path) as on:
        pod = on.pod()
        on.attach(A, pod, port(9999, 7, "sctp"))
        for family, address, header in ((socket.AF_INET, UPLINK[4], 20), (socket.AF_INET6, UPLINK[6], 0)):
            with ExitStack() as stack:
                inside, outside, local = (
                    stack.enter_context(place(lambda f=family: raw_sctp(f)))  # type: ignore[misc]
                    for place in (pod.run, on.outside.run, here)
                )
                for source, client in ((4000, outside), (4001, local)):
                    packet = sctp_init(source, 9999)
                    assert arrives(inside, header, lambda c=client, p=packet: c.sendto(p, (address, 0)), source) == 7  # type: ignore[misc]  # noqa: B023


@on_its_own_node
def test_a_host_ip_is_the_only_one_on_which_the_port_is(tmp_path: Path) -> None:
    with node(tmp_path) as on:
        one, two, three = on.pod(), on.pod(), on.pod()
        on.attach(
            A, one, port(80, 80, "tcp", UPLINK[4]), port(81, 80, "tcp", "127.0.0.1"), port(80, 80, "tcp", UPLINK[6])
        )
        on.attach(B, two, port(80, 80, "tcp", BRIDGED[4]))
        on.attach(C, three, port(82, 80, "tcp", "::"))
        servers = [pod.keep(lambda: listener("0.0.0.0", 80)) for pod in (one, two)]
        v6 = [pod.keep(lambda: listener("::", 80)) for pod in (three,)]
        assert dialled(servers[0], on.outside.run, UPLINK[4], 80) == OUTSIDE[4]
        assert dialled(servers[1], here, BRIDGED[4], 80) == BRIDGED[4]
        assert dialled(servers[0], here, "127.0.0.1", 81) == BRIDGED[4]
        assert dialled(v6[0], on.outside.run, UPLINK[6], 82) == OUTSIDE[6]
        for address, number in ((UPLINK[4], 81), (UPLINK[4], 82), (LOCAL[4], 80), (LOCAL[6], 80), (BRIDGED[6], 80)):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, number), timeout=TIMEOUT)


@on_its_own_node
def test_a_port_that_is_taken_is_refused_with_its_holders_name_and_leaves_nothing(tmp_path: Path) -> None:
    with node(tmp_path) as on:
        one, two = on.pod(), on.pod()
        on.attach(A, one, port(8080), port(53, 53, "udp", UPLINK[4]))
        rules = sh("nft list ruleset")
        for wanted in (port(8080), port(8080, 80, "tcp", "::"), port(8080, 81, "tcp", "0.0.0.0"), port(53, 1, "udp")):
            with pytest.raises(
                FailedPrecondition, match=rf"publish host port .* for pod test/b: pod test/a \({A}\) has it"
            ):
                on.attach(B, two, port(9000), wanted)
        with listener(UPLINK[4], 22), pytest.raises(FailedPrecondition, match="22/tcp: a process of the node has it"):
            on.attach(B, two, port(22))
        with udp("::", 4789), pytest.raises(FailedPrecondition, match="4789/udp: a process of the node has it"):
            on.attach(B, two, port(4789, 1, "udp", "::"))
        with pytest.raises(InvalidArgument, match="the container's port is missing"):
            on.attach(B, two, port(22, 0))
        with pytest.raises(InvalidArgument, match="routes nothing between ::1 and a pod"):
            on.attach(B, two, port(22, 22, "tcp", "::1"))
        with pytest.raises(InvalidArgument, match="the pod asks for it twice"):
            on.attach(B, two, port(22, 1), port(22, 2))
        assert sh("nft list ruleset") == rules
        assert [link["ifname"] for link in two.ip("link show")] == ["lo"]
        on.attach(B, two, port(8080, 80, "udp"), port(53, 53, "udp", BRIDGED[4]), port(9000), port(9000))
        on.detach(A)
        on.attach(A, on.pod(), port(8080))


@on_its_own_node
def test_a_connection_that_ended_does_not_hold_the_port(tmp_path: Path) -> None:
    with node(tmp_path) as on, listener(UPLINK[4], 7000) as server:
        with on.outside.run(lambda: socket.create_connection((UPLINK[4], 7000), timeout=TIMEOUT)) as client:
            server.accept()[0].close()
            assert client.recv(1) == b""
        server.close()  # in TIME_WAIT now
        on.attach(A, on.pod(), port(7000))


@on_its_own_node
def test_the_ports_go_with_the_pod_and_come_back_after_a_crash(tmp_path: Path) -> None:
    with node(tmp_path) as on:
        empty = sh("nft list ruleset")
        one, two = on.pod(), on.pod()
        on.attach(A, one, port(8080), port(81, 80, "tcp", UPLINK[6]))
        on.attach(B, two, port(8081))
        rules = sh("nft list ruleset")
        sh("nft add table inet other")
        on.restart()
        assert sh("nft list ruleset").replace("table inet other {\n}\n", "") == rules
        sh("nft flush ruleset")
        on.restart()
        assert sh("nft list ruleset") == rules
        server = two.keep(lambda: listener("0.0.0.0", 80))
        assert dialled(server, on.outside.run, UPLINK[4], 8081) == OUTSIDE[4]
        on.restart()
        asyncio.run(on.network.recover({B}))
        assert "8080" not in sh("nft list ruleset") and "8081" in sh("nft list ruleset")
        on.detach(B)
        on.detach(B)
        assert sh("nft list ruleset") == empty
        assert on.database.execute("SELECT * FROM ports") == []


@on_its_own_node
def test_rules_that_something_flushed_do_not_hold_up_a_pod(tmp_path: Path) -> None:
    with node(tmp_path) as on:
        pod = on.pod()
        on.attach(A, pod, port(8080))
        sh("nft flush ruleset")
        on.attach(B, on.pod(), port(8081))
        server = pod.keep(lambda: listener("0.0.0.0", 80))
        assert dialled(server, on.outside.run, UPLINK[4], 8080) == OUTSIDE[4]
        sh("nft flush ruleset")
        assert on.network.status() is None
        assert dialled(server, on.outside.run, UPLINK[4], 8080) == OUTSIDE[4]
        sh("nft flush ruleset")
        on.detach(A)
        assert "8081" in sh("nft list ruleset") and "8080" not in sh("nft list ruleset")


@pytest.mark.parametrize("version", [4, 6])
@on_its_own_node
def test_a_udp_client_that_never_pauses_follows_the_port_to_its_new_pod(tmp_path: Path, version: int) -> None:
    """Its flow, and only its, is forgotten: by the kernel's own account it would last as long as it sends."""
    with node(tmp_path) as on, udp(UPLINK[version], 9) as before:
        one, two, bystander = on.pod(), on.pod(), on.pod()
        client = on.outside.udp(OUTSIDE[version], 4000)
        client.sendto(b"to the node", (UPLINK[version], 53))  # nobody has the port; the flow is tracked all the same
        with pytest.raises(ConnectionRefusedError):
            client.connect((UPLINK[version], 53))
            client.send(b"once more")
            client.recv(100)
        mine = on.attach(C, bystander).ips
        elsewhere = bystander.udp(mine[version == 6], 4001)
        outside_server = on.outside.udp(OUTSIDE[version], 53)
        seen_before = flow_source(outside_server, elsewhere, OUTSIDE[version])
        for pod_id, pod in ((A, one), (B, two)):
            ips = on.attach(pod_id, pod, port(53, 5300, "udp"))
            server = pod.udp(ips.ips[version == 6], 5300)
            client.send(b"ping")
            assert server.recvfrom(100)[0] == b"ping"
            on.detach(pod_id)
        before.settimeout(0.1)
        assert flow_source(outside_server, elsewhere, OUTSIDE[version]) == seen_before


def flow_source(server: socket.socket, client: socket.socket, address: str) -> tuple[str, int]:
    """Address and port with which a client's datagrams reach a server outside: chosen anew if the flow was forgotten."""
    client.sendto(b"ping", (address, 53))
    source = server.recvfrom(100)[1]
    return source[0], source[1]


@on_its_own_node
def test_pods_reach_no_loopback_of_the_node(tmp_path: Path) -> None:
    """CVE-2020-8558: with route_localnet, which a port on 127.0.0.1 needs, the node would take such packets."""
    with node(tmp_path) as on:
        pod = on.pod()
        on.attach(A, pod, port(8080))
        assert Path(f"/proc/sys/net/ipv4/conf/{BRIDGE}/route_localnet").read_text() == "1\n"
        pod.sh("ip addr del 127.0.0.1/8 dev lo")
        pod.sh("ip route add 127.0.0.0/8 via 10.99.0.1 dev eth0 onlink")
        Path("/proc/sys/net/ipv4/conf/all/rp_filter").write_text("0")
        with udp("127.0.0.1", 7777) as victim:
            client = pod.udp("10.99.0.2")
            pod.run(lambda: Path("/proc/sys/net/ipv4/conf/eth0/route_localnet").write_text("1"))
            client.sendto(b"hello", ("127.0.0.1", 7777))
            victim.settimeout(0.3)
            with pytest.raises(TimeoutError):
                victim.recv(100)
            # The packet does come that far: without the guard it is received.
            guard = f"tare-{BRIDGE}"
            sh(f"nft flush chain inet {guard} guard")
            client.sendto(b"hello", ("127.0.0.1", 7777))
            assert victim.recv(100) == b"hello"


@on_its_own_node
def test_a_neighbour_on_the_wire_reaches_no_port_that_is_on_the_loopback_alone(tmp_path: Path) -> None:
    """Nor one that is on every address, by that one: it would be translated before the kernel looks whether it is a martian."""
    with node(tmp_path) as on:
        pod = on.pod()
        on.attach(A, pod, port(8080, 80, "udp", "127.0.0.1"), port(8081, 81, "udp"))
        servers = {number: pod.udp("0.0.0.0", number) for number in (80, 81)}
        with udp("127.0.0.1") as client:
            client.sendto(b"mine", ("127.0.0.1", 8080))
            assert servers[80].recv(100) == b"mine"
        # The neighbour has the frame sent to the node whatever its address.
        on.outside.sh("ip addr del 127.0.0.1/8 dev lo")
        on.outside.sh(f"ip route add 127.0.0.0/8 via {UPLINK[4]} dev eth9 onlink")
        on.outside.run(lambda: Path("/proc/sys/net/ipv4/conf/eth9/route_localnet").write_text("1"))
        client = on.outside.udp(OUTSIDE[4])
        for number in (8080, 8081):
            client.sendto(b"theirs", ("127.0.0.1", number))
        client.sendto(b"known", (UPLINK[4], 8081))
        assert servers[81].recv(100) == b"known"
        servers[80].settimeout(0.3)
        with pytest.raises(TimeoutError):
            servers[80].recv(100)
        # They do come that far: without the rule they are received.
        found = sh(f"nft -a list chain inet tare-{BRIDGE} prerouting")
        rule = next(line for line in found.splitlines() if "127.0.0.0/8 accept" in line)
        sh(f"nft delete rule inet tare-{BRIDGE} prerouting handle {rule.split()[-1]}")
        client.sendto(b"theirs", ("127.0.0.1", 8080))
        assert servers[80].recv(100) == b"theirs"


class Refusing:
    """In the place of `nft.run`: what it is asked while `refuses`, the kernel refuses."""

    def __init__(self) -> None:
        self.refuses = True
        self._run = nft.run

    def __call__(self, netlink: Netlink, messages: Sequence[Message]) -> None:
        if self.refuses:
            raise NetlinkError(messages[-1].doing, errno.ENOBUFS)
        self._run(netlink, messages)


@on_its_own_node
def test_an_address_is_not_free_while_the_kernel_may_lead_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the kernel refuses: what has not been withdrawn stays on record, and what is in doubt is made anew."""
    with node(tmp_path) as on:
        on.attach(A, on.pod(), port(8080))
        with monkeypatch.context() as patch:
            refusing = Refusing()
            patch.setattr(nft, "run", refusing)
            for _ in range(2):
                with pytest.raises(NetlinkError):
                    on.detach(A)
                assert "8080" in sh("nft list ruleset")
                assert A in Leases(on.database).pods()
            with pytest.raises(NetlinkError):
                on.attach(B, on.pod(), port(8081))
            assert on.network.status() is not None
            refusing.refuses = False
            on.detach(A)
            assert "8080" not in sh("nft list ruleset")
            on.detach(B)
            assert Leases(on.database).pods() == set()
            assert on.network.status() is None


@pytest.mark.parametrize("chain", ["guard", "hostports", "postrouting"])
@on_its_own_node
def test_a_chain_that_something_flushed_is_made_anew(tmp_path: Path, chain: str) -> None:
    with node(tmp_path) as on:
        on.attach(A, on.pod(), port(8080))
        rules = sh("nft list ruleset")
        sh(f"nft flush chain inet tare-{BRIDGE} {chain}")
        assert sh("nft list ruleset") != rules
        assert on.network.status() is None
        assert sh("nft list ruleset") == rules
        sh(f"nft flush chain inet tare-{BRIDGE} {chain}")
        on.attach(B, on.pod())
        assert sh("nft list ruleset") == rules


@on_its_own_node
def test_a_pod_without_ports_costs_no_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with node(tmp_path) as on:
        asked: list[object] = []
        with monkeypatch.context() as patch:
            patch.setattr(nft, "run", lambda *asking: asked.append(asking))
            on.attach(A, on.pod())
            on.detach(A)
        assert asked == []


@on_its_own_node
def test_many_ports_fit_in_the_table(tmp_path: Path) -> None:
    """More than one message holds, and than a socket's buffer does by default; each of them is there."""
    redirects = tuple(
        firewall.Redirect(
            protocol="udp", host=None, port=number, target=ipaddress.IPv4Address("10.99.0.2"), target_port=number
        )
        for number in range(1, 8001)
    )
    subnet = ipaddress.IPv4Network("10.99.0.0/24")
    nft.apply(firewall.replace(firewall.Table("tare-many", BRIDGE, (subnet,), redirects)))
    assert sh("nft list map inet tare-many any4").count("udp . ") == 8000
    nft.apply(firewall.withdraw("tare-many", redirects[:7999]))
    assert sh("nft list map inet tare-many any4").count("udp . ") == 1
