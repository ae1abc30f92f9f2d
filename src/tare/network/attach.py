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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from errno import ENODEV
from pathlib import Path

from tare.config import NetworkConfig
from tare.errors import FailedPrecondition, InternalError, InvalidArgument, TareError, describe
from tare.network import bridge, nft, rtnetlink, subnets, sysctl
from tare.network.addresses import Leases, gateway
from tare.network.netlink import Netlink, NetlinkError
from tare.network.rtnetlink import Link
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
    """What state.db keeps of a bridge by its name: the subnet of the last start, and the one that the cluster has given to this node."""

    subnet: str
    given: str = ""


@dataclass(frozen=True, slots=True)
class Ready:
    """What attaching needs of a network that is set up. `index` is the bridge's."""

    index: int
    subnet: ipaddress.IPv4Network
    mtu: int


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
        self._table = f"tare-{self._bridge}"
        self._leases = Leases(database)
        self._remembered = database.table("networks", Remembered)
        remembered = self._remembered.get(self._bridge)
        self._given = remembered.given if remembered is not None else ""
        self._removal = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tare-links")
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
        """Give new pods addresses from the first IPv4 range of these, which is remembered. The settings' subnet goes before it.

        Raises InvalidArgument for a range that is no use, FailedPrecondition where the settings name another, pods still hold addresses
        of the one before, or something else uses it.
        """
        doing = f"use pod CIDR {','.join(ranges)}"
        given = next((item for item in ranges if ipaddress.ip_network(item).version == 4), None)
        if given is None:
            raise InvalidArgument(doing, cause="the embedded network needs an IPv4 range")
        subnet = str(subnets.parse_subnet(given, doing))
        if self._config.subnet:
            if subnets.parse_subnet(self._config.subnet) != ipaddress.IPv4Network(subnet):
                cause = f"the settings have pods in {self._config.subnet}"
                raise FailedPrecondition(doing, cause=cause, hint="take [network] subnet out of them")
            return
        before, self._given = self._given, subnet
        try:
            with node() as netlink:
                if before != subnet or self._ready is None:
                    self._set_up(netlink)
        except BaseException:
            self._given = before
            raise

    def status(self) -> str | None:
        """None when pods can be attached, or why they cannot. What is missing is made, if it can be."""
        try:
            with node() as netlink:
                self._usable(netlink)
        except TareError as error:
            return str(error)
        return None

    async def attach(self, pod_id: str, netns: int, netlink: socket.socket) -> Attachment:
        """Put the pod on the network; if that fails nothing is left.

        `netns` is a descriptor of the pod's namespace, `netlink` an AF_NETLINK socket (NETLINK_ROUTE) made inside it; both stay
        the caller's. Raises ResourceExhausted without a free address, FailedPrecondition where the pod is attached already,
        and whatever `setup` raises.
        """
        with node() as host:
            network = self._usable(host)
            address = self._leases.take(network.subnet, pod_id)
            try:
                return self._connect(host, Netlink(netlink), pod_id, netns, network, address)
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
        """Remove the links and release the leases of pods other than these. Works before `setup` too."""
        with node() as netlink:
            links = self._pod_links(netlink)
            self._unplug(netlink, [link for pod_id, link in links if pod_id not in pods])
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
        nft.apply(nft.remove(self._table))
        await self.settle()

    async def settle(self) -> None:
        """Wait until the links that were unplugged so far are removed."""
        await asyncio.wrap_future(self._removal.submit(int))

    def _set_up(self, netlink: Netlink) -> Ready:
        self._ready = None
        host = bridge.look(netlink)
        remembered = self._remembered.get(self._bridge)
        before = ipaddress.IPv4Network(remembered.subnet) if remembered else None
        in_use = before is not None and bool(self._leases.held(str(before)))
        ranges = bridge.occupied(host, self._bridge)
        subnet = subnets.choose_subnet(self._config.subnet or self._given, self._run, before, ranges, in_use)
        wanted = bridge.Bridge(self._bridge, self._run, gateway(subnet), self._config.mtu or bridge.uplink_mtu(host))
        index = bridge.ensure(netlink, host, wanted, gateway(before) if before else None)
        self._remembered.put(self._bridge, Remembered(subnet=str(subnet), given=self._given))
        sysctl.ensure("1", "net", "ipv4", "ip_forward")
        nft.apply(nft.replace(nft.Table(self._table, subnet)))
        self._ready = Ready(index, subnet, wanted.mtu)
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
        name, mac, via = bridge.pod_link_name(pod_id), bridge.mac_of(address), gateway(network.subnet).ip
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
                rtnetlink.add_address(inside.index, ipaddress.IPv4Interface((address, network.subnet.prefixlen))),
                rtnetlink.set_link(INTERFACE, up=True),
                rtnetlink.add_default_route(inside.index, via),
            ]
        )
        # The carrier reaches the bridge's port, the bridge and their queues when a kernel thread gets to it; to be asked about a link
        # makes the kernel do it now (since 6.8). Otherwise the pod's first ARP request may be lost, and the next is a second later.
        host.ask(rtnetlink.get_link(name), rtnetlink.get_link(self._bridge))
        return Attachment((str(address),), INTERFACE, mac, name, str(via))

    def _disconnect(self, host: Netlink, pod_id: str) -> None:
        """Unplug the pod's link and release its lease, in this order: the address is free when nothing answers to it."""
        link = bridge.find_link(host, bridge.pod_link_name(pod_id))
        if link is not None and bridge.pod_of(self._run, link) == pod_id:
            self._unplug(host, [link])
        self._leases.release(pod_id)

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
    except TareError as error:
        if not (isinstance(error, NetlinkError) and error.errno == ENODEV):
            log.warning("%s", describe(error))
