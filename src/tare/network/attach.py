"""The embedded network: a pod gets an address, and a veth whose other end is on the instance's bridge.

    pod's netns                            node's netns
    ┌─────────────────────────┐            ┌───────────────────────────────────────────────────────────┐
    │ lo   127.0.0.1          │            │  tare0  10.85.0.1/16 ── ip_forward ── uplink              │
    │ eth0 10.85.0.2/16 ──────┼── veth ────┼─ tare0123456789a (port, hairpin)      masquerade, unless  │
    │ default via 10.85.0.1   │            │                                       within 10.85.0.0/16 │
    └─────────────────────────┘            └───────────────────────────────────────────────────────────┘

Nothing here enters a namespace: the peer is made inside by descriptor, and configured on a netlink socket that lives there.
What another part does: making and pinning the namespace (runtime), sysctls of the pod (launcher), other drivers.

Attaching takes a millisecond and is done where it is called. Detaching unplugs the link (0.2 ms), after which no packet
passes and the address is free, and leaves its removal, for which the kernel takes 20 ms and more, to a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from errno import ENODEV
from pathlib import Path

from tare.config import NetworkConfig
from tare.errors import FailedPrecondition, InternalError, InvalidArgument, TareError, describe
from tare.network import bridge, rtnetlink, subnets, sysctl
from tare.network.addresses import Leases, companion, gateway
from tare.network.netlink import Netlink, NetlinkError
from tare.network.publishing import Publisher
from tare.network.rtnetlink import Interface, Link, Network
from tare.network.wishes import Wishes
from tare.state.database import Database

log = logging.getLogger(__name__)
INTERFACE = "eth0"
MTU_RANGE = range(576, 65536)


@dataclass(frozen=True, slots=True)
class Attachment:
    """A pod on its network. `host_interface` is the node's end of the veth; addresses are without prefix length."""

    ips: tuple[str, ...]
    interface: str
    mac: str
    host_interface: str
    gateway: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """What state.db keeps of a bridge by its name: the subnets of the last start, and those that the cluster has given to this node ("": none)."""

    subnet: str
    given: str = ""
    subnet6: str = ""
    given6: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """What attaching needs of a network that is set up. `index` is the bridge's."""

    index: int
    subnet: ipaddress.IPv4Network
    subnet6: ipaddress.IPv6Network | None
    mtu: int

    def addresses(self, lease: ipaddress.IPv4Address) -> list[Interface]:
        """A pod's addresses, with their prefix length: the leased one, and IPv6's that goes with it."""
        own: list[Interface] = [ipaddress.IPv4Interface((lease, self.subnet.prefixlen))]
        if self.subnet6 is not None:
            own.append(ipaddress.IPv6Interface((companion(self.subnet6, self.subnet, lease), self.subnet6.prefixlen)))
        return own

    def gateways(self) -> list[Interface]:
        """The bridge's addresses."""
        return self.addresses(gateway(self.subnet).ip)


@contextlib.contextmanager
def node() -> Iterator[Netlink]:
    """A conversation with the kernel about this thread's network namespace."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        yield Netlink(sock)


class EmbeddedNetwork:
    """The network of one instance. `database` is state.db; `run` tells instances on one node apart."""

    def __init__(self, database: Database, config: NetworkConfig, run: Path) -> None:
        self._config = config
        self._run = run.resolve()
        self._bridge = subnets.bridge_name(config.bridge, self._run)
        self._leases = Leases(database)
        self._remembered = database.table("networks", Remembered)
        remembered = self._remembered.get(self._bridge)
        self._given = (remembered.given, remembered.given6) if remembered is not None else ("", "")
        self._removal = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tare-links")
        self._publisher = Publisher(database, self._bridge, self._removal.submit)
        self._ready: Ready | None = None
        if config.mtu and config.mtu not in MTU_RANGE:
            raise InvalidArgument(
                f"[network] mtu = {config.mtu}",
                cause=f"it is neither 0 (the uplink's) nor {MTU_RANGE[0]} to {MTU_RANGE[-1]}",
            )

    async def setup(self) -> None:
        """Make the bridge, forwarding and the masquerade table; what is there already stays. Raises TareError."""
        with node() as netlink:
            self._set_up(netlink)

    async def use_ranges(self, ranges: Sequence[str]) -> None:
        """Give new pods addresses from the first IPv4 range and the first IPv6 range of these, which are remembered. The settings go before them.

        Raises InvalidArgument for a range that is no use, FailedPrecondition where the settings name another, pods still hold addresses
        of the one before, or something else uses it.
        """
        given = subnets.given(ranges, self._config.subnet, self._config.subnet6)
        before, self._given = self._given, given
        try:
            with node() as netlink:
                if before != given or self._ready is None:
                    self._set_up(netlink)
        except BaseException:
            self._given = before
            raise

    def status(self) -> str | None:
        """None when pods can be attached, or why they cannot. What is missing is made, if it can be."""
        try:
            with node() as netlink:
                self._usable(netlink)
            self._publisher.repair()
        except TareError as error:
            return str(error)
        return None

    async def attach(self, pod_id: str, netns: int, netlink: socket.socket, wishes: Wishes | None = None) -> Attachment:
        """Put the pod on the network; if that fails nothing is left.

        `netns` is a descriptor of the pod's namespace, `netlink` an AF_NETLINK socket (NETLINK_ROUTE) made inside it; both stay
        the caller's. Raises ResourceExhausted without a free address, FailedPrecondition where the pod is attached already or a port
        that it wants is taken, InvalidArgument for a port that makes no sense, and whatever `setup` raises.
        """
        with node() as host:
            network = self._usable(host)
            self._publisher.repair()  # one question, of 0.1 ms
            address = self._leases.take(network.subnet, pod_id)
            try:
                taken = []
                if wishes is not None and wishes.ports:
                    ips = [item.ip for item in network.addresses(address)]
                    taken = self._publisher.publish(wishes.ports, ips, pod_id, f"{wishes.namespace}/{wishes.name}")
                attachment = self._connect(host, Netlink(netlink), pod_id, netns, network, address)
                if wishes is not None and (wishes.ingress or wishes.egress):
                    self._limit(host, Netlink(netlink), attachment, wishes)
                self._publisher.forget_before(host, taken)
                return attachment
            except BaseException:
                try:
                    self._disconnect(host, pod_id)
                except TareError as error:
                    log.warning("undo attaching pod %s: %s", pod_id, describe(error))
                raise

    async def detach(self, pod_id: str) -> None:
        """Take the pod off the network, whether it was attached, half attached, or its namespace is gone. Idempotent."""
        with node() as host:
            self._disconnect(host, pod_id)

    async def recover(self, pods: set[str]) -> None:
        """Remove the links, and release the ports and the leases, of pods other than these. Works before `setup` too."""
        with node() as netlink:
            links = self._pod_links(netlink)
            self._unplug(netlink, [link for pod_id, link in links if pod_id not in pods])
        self._publisher.keep(pods)
        for pod_id in self._leases.pods() - pods:
            self._leases.release(pod_id)

    async def teardown(self) -> None:
        """Remove the bridge, what hangs on it and the table; leases and forwarding stay. Idempotent."""
        self._ready = None
        with node() as netlink:
            self._unplug(netlink, [link for _, link in self._pod_links(netlink)])
            link = bridge.find_link(netlink, self._bridge)
        if link is not None and link.alias == bridge.mark(self._run):
            self._removal.submit(remove_link, link)
        self._publisher.remove()
        await self.settle()

    async def look(self) -> None:
        """What `status` tells is looked at when it is asked."""

    async def close(self) -> None:
        """What was begun is finished."""
        await self.settle()

    def describe(self) -> Mapping[str, object]:
        """For who asks what the daemon knows of itself."""
        return {"mode": "embedded", "bridge": self._bridge, "subnet": str(self._ready.subnet) if self._ready else None}

    async def settle(self) -> None:
        """Wait until the links that were unplugged so far are removed, and flows to ports that moved are forgotten."""
        await asyncio.wrap_future(self._removal.submit(int))

    def _set_up(self, netlink: Netlink) -> Ready:
        self._ready = None
        host = bridge.look(netlink)
        remembered = self._remembered.get(self._bridge)
        before = ipaddress.IPv4Network(remembered.subnet) if remembered else None
        before6 = ipaddress.IPv6Network(remembered.subnet6) if remembered and remembered.subnet6 else None
        in_use = before is not None and bool(self._leases.held(str(before)))
        ranges = bridge.occupied(host, self._bridge)
        given, given6 = self._given
        subnet = subnets.choose_subnet(self._config.subnet or given, self._run, before, ranges, in_use)
        subnet6 = subnets.choose_subnet6(self._config.subnet6 or given6, subnet, before6, ranges, in_use)
        ready = Ready(0, subnet, subnet6, self._config.mtu or bridge.uplink_mtu(host))
        stale = Ready(0, before, before6, 0).gateways() if before is not None else []
        wanted = bridge.Bridge(self._bridge, self._run, tuple(ready.gateways()), ready.mtu)
        index = bridge.ensure(netlink, host, wanted, stale)
        self._remembered.put(
            self._bridge,
            Remembered(subnet=str(subnet), given=given, subnet6=str(subnet6) if subnet6 else "", given6=given6),
        )
        sysctl.ensure("1", "net", "ipv4", "ip_forward")
        if subnet6 is not None:
            bridge.forward_ipv6(host)
        nets: list[Network] = [subnet] if subnet6 is None else [subnet, subnet6]
        self._publisher.set_up(tuple(nets))
        self._ready = replace(ready, index=index)
        return self._ready

    def _usable(self, netlink: Netlink) -> Ready:
        """The network as it was set up, or set up again where its bridge is gone or down."""
        if self._ready is not None:
            link = bridge.find_link(netlink, self._bridge)
            if link is not None and link.index == self._ready.index and link.up:
                return self._ready
        return self._set_up(netlink)

    def _connect(
        self, host: Netlink, pod: Netlink, pod_id: str, netns: int, network: Ready, address: ipaddress.IPv4Address
    ) -> Attachment:
        name, mac, via = bridge.pod_link_name(pod_id), bridge.mac_of(address), [item.ip for item in network.gateways()]
        own = network.addresses(address)
        if bridge.find_link(host, name) is not None:
            # Looked for first, because the kernel goes on with a batch after an error and would change that other link.
            raise FailedPrecondition(f"attach pod {pod_id}", cause=f"a link {name} exists already")
        # The host's end comes up first: the kernel lets a link that is not running yet wait up to a second for its carrier.
        host.run(
            [
                rtnetlink.add_veth(name, mtu=network.mtu, peer=INTERFACE, peer_mac=mac, netns=netns),
                rtnetlink.set_link(name, alias=bridge.pod_mark(self._run, pod_id)),
                rtnetlink.set_link(name, up=True, master=network.index, ipv6=False),
                rtnetlink.set_bridge_port(name, hairpin=True),
            ]
        )
        inside = bridge.find_link(pod, INTERFACE)
        if inside is None or inside.address != mac:
            raise InternalError(f"attach pod {pod_id}", cause="the netlink socket is not of the pod's namespace")
        pod.run(
            [
                rtnetlink.set_link("lo", up=True),
                *(rtnetlink.add_address(inside.index, item) for item in own),
                rtnetlink.set_link(INTERFACE, up=True),
                *(rtnetlink.add_default_route(inside.index, item) for item in via),
            ]
        )
        # The carrier reaches the bridge's port, the bridge and their queues when a kernel thread gets to it; to be asked about a link
        # makes the kernel do it now (since 6.8). Otherwise the pod's first ARP request may be lost, and the next is a second later.
        host.ask(rtnetlink.get_link(name), rtnetlink.get_link(self._bridge))
        # IPv6 is as slow to listen for who asks after its addresses (a work queue joins the group), so each is told of the other.
        for there, mine in zip(via, own, strict=True):
            if mine.version == 6:
                host.run([rtnetlink.add_neighbour(network.index, mine.ip, mac)])
                pod.run([rtnetlink.add_neighbour(inside.index, there, bridge.mac_of(via[0]))])
        return Attachment(tuple(str(item.ip) for item in own), INTERFACE, mac, name, str(via[0]))

    def _limit(self, host: Netlink, pod: Netlink, attachment: Attachment, wishes: Wishes) -> None:
        """Hold both ends of the link to their rates: what the node's end sends is what comes to the pod."""
        name = attachment.host_interface
        for netlink, end, bits in ((host, name, wishes.ingress), (pod, INTERFACE, wishes.egress)):
            link = bridge.find_link(netlink, end) if bits else None
            if link is not None:
                netlink.run([rtnetlink.limit_rate(link.index, end, max(bits // 8, 1))])

    def _disconnect(self, host: Netlink, pod_id: str) -> None:
        """Withdraw the pod's ports, unplug its link, release its lease, in this order: the address is free when nothing answers to it."""
        gone = self._publisher.withdraw(pod_id)
        link = bridge.find_link(host, bridge.pod_link_name(pod_id))
        if link is not None and bridge.pod_of(self._run, link) == pod_id:
            self._unplug(host, [link])
        self._leases.release(pod_id)
        self._publisher.forget_after(gone)

    def _pod_links(self, netlink: Netlink) -> list[tuple[str, Link]]:
        """The links of this instance's pods, each with its pod's ID."""
        links = map(rtnetlink.read_link, netlink.ask(rtnetlink.list_links("veth")))
        owned = ((bridge.pod_of(self._run, link), link) for link in links)
        return [(pod_id, link) for pod_id, link in owned if pod_id is not None]

    def _unplug(self, netlink: Netlink, links: list[Link]) -> None:
        """Cut the links off at once and have them removed by and by; one may vanish meanwhile, with its pod's namespace."""
        for link in links:
            try:
                netlink.run([rtnetlink.set_link(link.name, up=False, master=0)])
            except NetlinkError as error:
                if error.errno != ENODEV:
                    raise
            self._removal.submit(remove_link, link)


def remove_link(link: Link) -> None:
    """Remove a link, in a thread of its own; one that stays is found by its alias at the next start."""
    try:
        with node() as netlink:
            netlink.run([rtnetlink.delete_link(link.index, link.name)])
    except (TareError, OSError) as error:
        if not (isinstance(error, NetlinkError) and error.errno == ENODEV):
            log.warning("%s", describe(error))
