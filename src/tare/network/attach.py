"""An embedded network: a pod gets an address, and a veth whose other end is on the network's bridge. `embedded` has all of an instance's.

    pod's netns                            node's netns
    ┌─────────────────────────┐            ┌───────────────────────────────────────────────────────────┐
    │ lo   127.0.0.1          │            │  tare0  10.85.0.1/16 ── ip_forward ── uplink              │
    │ eth0 10.85.0.2/16 ──────┼── veth ────┼─ tare0123456789a (port, hairpin)      masquerade, unless  │
    │ default via 10.85.0.1   │            │                                       within 10.85.0.0/16 │
    └─────────────────────────┘            └───────────────────────────────────────────────────────────┘

Nothing here enters a namespace: the peer is made inside by descriptor, and configured on a netlink socket that lives there.
What another part does: making and pinning the namespace (runtime), sysctls of the pod (launcher), other drivers.

A pod whose rate is bounded has one device more on the node (`shaping`).

Attaching takes a millisecond and is done where it is called. Detaching unplugs the link (0.2 ms), after which no packet
passes and the address is free, and leaves its removal, for which the kernel takes 20 ms and more, to a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from errno import ENODEV, ENOENT, EOPNOTSUPP
from pathlib import Path

from tare.config import Isolation, NetworkConfig
from tare.errors import FailedPrecondition, InternalError, InvalidArgument, TareError, describe
from tare.network import bridge, rtnetlink, shaping, subnets
from tare.network.addresses import Leases, companion, gateway
from tare.network.forwarding import Forwarding
from tare.network.netlink import Netlink, NetlinkError
from tare.network.publishing import Publisher
from tare.network.rtnetlink import Interface, Link, Network
from tare.network.subnets import Occupied
from tare.network.wishes import Wishes
from tare.state.database import Database

log = logging.getLogger(__name__)
INTERFACE = "eth0"
DEFAULT = "default"
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
    """What state.db keeps of a bridge by its name: the subnets of the last start, and those that the cluster has given to this node ("": none).

    `name` is the network's; "" is the default one. `isolation` is what pods are kept from also when the settings name the network no more.
    """

    subnet: str
    given: str = ""
    subnet6: str = ""
    given6: str = ""
    name: str = ""
    isolation: tuple[Isolation, ...] = ()


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
    """One network of an instance. `database` is state.db; `run` tells instances on one node apart.

    `others` are the bridges of the instance's other networks, and `reserved` the ranges that are theirs.
    """

    def __init__(self, database: Database, config: NetworkConfig, run: Path, name: str = DEFAULT) -> None:
        self.name = name
        self.others: tuple[str, ...] = ()
        self.reserved: tuple[Occupied, ...] = ()
        self._config = config
        self._run = run.resolve()
        self._seed = self._run if name == DEFAULT else self._run / "networks" / name
        self.bridge = subnets.bridge_name(config.bridge, self._seed)
        self.leases = Leases(database)
        self._forwarding = Forwarding(database)
        self._remembered = database.table("networks", Remembered)
        remembered = self._remembered.get(self.bridge)
        self._given = (remembered.given, remembered.given6) if remembered is not None else ("", "")
        self._removal = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tare-links")
        self.publisher = Publisher(database, self.bridge, self._removal.submit)
        self.ready: Ready | None = None
        self._given_up = False
        if config.mtu and config.mtu not in MTU_RANGE:
            section = "[network]" if name == DEFAULT else f"[network.networks.{name}]"
            raise InvalidArgument(
                f"{section} mtu = {config.mtu}",
                cause=f"it is neither 0 (the uplink's) nor {MTU_RANGE[0]} to {MTU_RANGE[-1]}",
            )

    @property
    def isolation(self) -> frozenset[str]:
        """What of the node pods do not reach."""
        return frozenset(self._config.isolation)

    @property
    def subnet(self) -> str:
        """The IPv4 subnet in which pods have their addresses, now or when the network was there last; "" before that."""
        remembered = self._remembered.get(self.bridge)
        return remembered.subnet if remembered is not None else ""

    @property
    def ranges(self) -> tuple[str, ...]:
        """The subnets that it has, or is to have according to the settings."""
        remembered = self._remembered.get(self.bridge)
        had = (remembered.subnet, remembered.subnet6) if remembered is not None else ("", "")
        wanted = (self._config.subnet or had[0], self._config.subnet6 or had[1])
        return tuple(item for item in wanted if item)

    def pods(self) -> set[str]:
        """The pods that hold an address of it."""
        return set(self.leases.held(self.subnet).values()) if self.subnet else set()

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
                if before != given or self.ready is None:
                    self._set_up(netlink)
        except BaseException:
            self._given = before
            raise

    def status(self) -> str | None:
        """None when pods can be attached, or why they cannot. What is missing is made, if it can be, but for what was given up."""
        if self._given_up:
            return None
        try:
            with node() as netlink:
                self._usable(netlink)
            self.publisher.repair()
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
            self.publisher.repair()  # one question, of 0.1 ms
            address = self.leases.take(network.subnet, pod_id)
            try:
                taken = []
                if wishes is not None and wishes.ports:
                    ips = [item.ip for item in network.addresses(address)]
                    taken = self.publisher.publish(wishes.ports, ips, pod_id, f"{wishes.namespace}/{wishes.name}")
                attachment = self._connect(host, Netlink(netlink), pod_id, netns, network, address)
                if wishes is not None and (wishes.ingress or wishes.egress):
                    self._limit(host, pod_id, wishes)
                self.publisher.forget_before(host, taken)
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
        """Remove the links, and release the ports and the leases, of pods other than these. Works before `setup` too.

        For an instance with this network alone; one with several has all of them recovered at once (`embedded`).
        """
        with node() as host:
            self.unplug(host, [link for pod_id, link in bridge.pod_links(host, self._run) if pod_id not in pods])
            for pod_id in (self.leases.pods() | self.publisher.pods()) - pods:
                self._disconnect(host, pod_id)

    async def teardown(self) -> None:
        """Remove the bridge, what hangs on it and the table; leases stay, and so does the node's forwarding. Idempotent.

        It is made anew when the next pod comes, or the next daemon.
        """
        self.ready, self._given_up = None, True
        with node() as host:
            link = bridge.find_link(host, self.bridge)
            mine = {0, link.index} if link is not None else {0}
            links = bridge.pod_links(host, self._run)
            pods = {pod_id for pod_id, item in links if item.master in mine and item.kind == "veth"}
            self.unplug(host, [item for pod_id, item in links if pod_id in pods])
        if link is not None and link.alias == bridge.mark(self._run):
            self._removal.submit(remove_link, link)
        self.publisher.remove()
        await self.settle()

    def exists(self) -> bool:
        """Whether there is anything of it on the node: its bridge, or its table. Raises NetlinkError."""
        with node() as host:
            link = bridge.find_link(host, self.bridge)
        return (link is not None and link.alias == bridge.mark(self._run)) or self.publisher.rules() > 0

    def forget(self) -> None:
        """What state.db remembers of it goes."""
        self._remembered.delete(self.bridge)

    async def settle(self) -> None:
        """Wait until the links that were unplugged so far are removed, and flows to ports that moved are forgotten."""
        await asyncio.wrap_future(self._removal.submit(int))

    def _set_up(self, netlink: Netlink) -> Ready:
        self.ready = None
        host = bridge.look(netlink)
        remembered = self._remembered.get(self.bridge)
        before = ipaddress.IPv4Network(remembered.subnet) if remembered else None
        before6 = ipaddress.IPv6Network(remembered.subnet6) if remembered and remembered.subnet6 else None
        in_use = before is not None and bool(self.leases.held(str(before)))
        ranges = [*bridge.occupied(host, self.bridge), *self.reserved]
        given, given6 = self._given
        subnet = subnets.choose_subnet(self._config.subnet or given, self._seed, before, ranges, in_use)
        subnet6 = subnets.choose_subnet6(self._config.subnet6 or given6, subnet, before6, ranges, in_use)
        nets: list[Network] = [subnet] if subnet6 is None else [subnet, subnet6]
        for net in nets:
            subnets.refuse_shared(net, self.reserved)
        ready = Ready(0, subnet, subnet6, self._config.mtu or bridge.uplink_mtu(host))
        stale = Ready(0, before, before6, 0).gateways() if before is not None else []
        wanted = bridge.Bridge(self.bridge, self._run, tuple(ready.gateways()), ready.mtu)
        index = bridge.ensure(netlink, host, wanted, stale, self.pods())
        self._remembered.put(
            self.bridge,
            Remembered(
                subnet=str(subnet),
                given=given,
                subnet6=str(subnet6) if subnet6 else "",
                given6=given6,
                name=self.name,
                isolation=self._config.isolation,
            ),
        )
        self._forwarding.forward(host, ipv6=subnet6 is not None)
        self.publisher.set_up(tuple(nets), self.others, self.isolation)
        self.ready, self._given_up = replace(ready, index=index), False
        return self.ready

    def _usable(self, netlink: Netlink) -> Ready:
        """The network as it was set up, or set up again where its bridge is gone or down."""
        if self.ready is not None:
            link = bridge.find_link(netlink, self.bridge)
            if link is not None and link.index == self.ready.index and link.up:
                return self.ready
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
        host.ask(rtnetlink.get_link(name), rtnetlink.get_link(self.bridge))
        # IPv6 is as slow to listen for who asks after its addresses (a work queue joins the group), so each is told of the other.
        for there, mine in zip(via, own, strict=True):
            if mine.version == 6:
                host.run([rtnetlink.add_neighbour(network.index, mine.ip, mac)])
                pod.run([rtnetlink.add_neighbour(inside.index, there, bridge.mac_of(via[0]))])
        return Attachment(tuple(str(item.ip) for item in own), INTERFACE, mac, name, str(via[0]))

    def _limit(self, host: Netlink, pod_id: str, wishes: Wishes) -> None:
        """Hold the node's end of the link to the rates, where the pod cannot lift them."""
        name = bridge.pod_link_name(pod_id)
        link = bridge.find_link(host, name)
        if link is None:
            raise InternalError(f"limit the traffic of pod {pod_id}", cause=f"link {name} has vanished")
        try:
            if wishes.ingress:
                host.run([shaping.limit_rate(link.index, name, max(wishes.ingress // 8, 1))])
            if wishes.egress:
                self._limit_egress(host, pod_id, link, max(wishes.egress // 8, 1))
        except NetlinkError as error:
            if error.errno in (ENOENT, EOPNOTSUPP):
                raise NetlinkError(error.doing, error.errno, error.text, hint=shaping.NEEDS) from error
            raise

    def _limit_egress(self, host: Netlink, pod_id: str, link: Link, rate: int) -> None:
        name = shaping.bucket_name(pod_id)
        if bridge.find_link(host, name) is not None:
            raise FailedPrecondition(f"limit the traffic of pod {pod_id}", cause=f"a link {name} exists already")
        alias = rtnetlink.set_link(name, alias=bridge.pod_mark(self._run, pod_id))
        host.run([shaping.add_ifb(name), alias, rtnetlink.set_link(name, up=True, ipv6=False)])
        bucket = bridge.find_link(host, name)
        if bucket is None:
            raise InternalError(f"limit the traffic of pod {pod_id}", cause=f"link {name} has vanished")
        host.run(
            [shaping.limit_rate(bucket.index, name, rate), *shaping.lead_through(link.index, link.name, bucket.index)]
        )

    def _disconnect(self, host: Netlink, pod_id: str) -> None:
        """Withdraw the pod's ports, unplug its link, release its lease, in this order: the address is free when nothing answers to it."""
        gone = self.publisher.withdraw(pod_id)
        for name in (bridge.pod_link_name(pod_id), shaping.bucket_name(pod_id)):
            link = bridge.find_link(host, name)
            if link is not None and bridge.pod_of(self._run, link) == pod_id:
                self.unplug(host, [link])
        self.leases.release(pod_id)
        self.publisher.forget_after(gone)

    def unplug(self, netlink: Netlink, links: Iterable[Link]) -> None:
        """Cut pods' links off at once and have them removed by and by; one may vanish meanwhile, with its pod's namespace."""
        for link in links:
            try:
                netlink.run([rtnetlink.set_link(link.name, up=False, master=0 if link.kind == "veth" else None)])
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
