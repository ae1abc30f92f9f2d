"""The bridge that an instance's pods hang on: whose it is, what it must look like, and the host around it.

The kernel keeps a text with every link, its alias; ours says which instance a link belongs to, and which pod:

    tare0               "tare:/run/tare"
    tare0123456789a     "tare:/run/tare 0123456789abcdef…"      (the host's end of a pod's veth)
    tarb0123456789a     "tare:/run/tare 0123456789abcdef…"      (the device that bounds what the pod sends)

A link that does not say so is not ours and is never touched, whatever its name. Alias and link are made in one send,
within which the daemon cannot die.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from errno import ENODEV
from pathlib import Path

from tare.errors import FailedPrecondition
from tare.network import rtnetlink, sysctl
from tare.network.netlink import Netlink, NetlinkError
from tare.network.rtnetlink import Interface, Link, LinkAddress, Route
from tare.network.subnets import Occupied

DEFAULT_MTU = 1500
POD_KINDS = ("veth", "ifb")  # what a pod has on the node: its veth's end, and the device that bounds what it sends
POD_NAME_LENGTH = 11  # of a pod's ID; with "tare" the 15 bytes of a link's name
NOT_OCCUPYING = {rtnetlink.RTN_LOCAL, rtnetlink.RTN_BROADCAST, rtnetlink.RTN_ANYCAST, rtnetlink.RTN_MULTICAST}


class ForeignBridge(FailedPrecondition):
    """A link of the bridge's name is there, and it is not this instance's, or not as this instance made it."""


@dataclass(frozen=True, slots=True)
class Host:
    """The links, addresses and routes of the node's network namespace."""

    links: tuple[Link, ...]
    addresses: tuple[LinkAddress, ...]
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True)
class Bridge:
    """What an instance's bridge shall be. `gateways` are its own addresses, IPv4's first, with their prefix lengths; `mtu` is in bytes."""

    name: str
    run: Path
    gateways: tuple[Interface, ...]
    mtu: int


def mark(run: Path) -> str:
    """The alias of the bridge of the instance with this run directory."""
    return f"tare:{run}"[: rtnetlink.MAX_ALIAS - 65]


def pod_mark(run: Path, pod_id: str) -> str:
    """The alias of the host's end of a pod's veth."""
    return f"{mark(run)} {pod_id}"


def pod_of(run: Path, link: Link) -> str | None:
    """The pod whose link this is; None where it is not a pod's link of this instance."""
    owner, _, pod_id = link.alias.rpartition(" ")
    return pod_id if link.kind in POD_KINDS and owner == mark(run) and pod_id else None


def pod_links(netlink: Netlink, run: Path) -> list[tuple[str, Link]]:
    """The links of the instance's pods on the node, each with its pod's ID. Raises NetlinkError."""
    links = [rtnetlink.read_link(body) for kind in POD_KINDS for body in netlink.ask(rtnetlink.list_links(kind))]
    owned = ((pod_of(run, link), link) for link in links)
    return [(pod_id, link) for pod_id, link in owned if pod_id is not None]


def pod_link_name(pod_id: str) -> str:
    """What the host's end of a pod's veth is called."""
    return f"tare{pod_id[:POD_NAME_LENGTH]}"


def mac_of(address: rtnetlink.Address) -> str:
    """The MAC address that goes with an IPv4 address: locally administered, and the same whenever the address comes back.

    A neighbour that remembers the pod which had the address before then still sends to the right place.
    """
    return f"0a:58:{address.packed.hex(':')}"


def look(netlink: Netlink) -> Host:
    """All links, addresses and routes. Raises NetlinkError."""
    return Host(
        tuple(map(rtnetlink.read_link, netlink.ask(rtnetlink.list_links()))),
        tuple(map(rtnetlink.read_address, netlink.ask(rtnetlink.list_addresses()))),
        tuple(map(rtnetlink.read_route, netlink.ask(rtnetlink.list_routes()))),
    )


def find_link(netlink: Netlink, name: str) -> Link | None:
    """One link by name."""
    try:
        (body,) = netlink.ask(rtnetlink.get_link(name))
    except NetlinkError as error:
        if error.errno == ENODEV:
            return None
        raise
    return rtnetlink.read_link(body)


def occupied(host: Host, bridge: str) -> list[Occupied]:
    """Every range that something other than our bridge uses: routes of any table and addresses, but not the default routes."""
    names = {link.index: link.name for link in host.links}
    ours = {link.index for link in host.links if link.name == bridge}
    ranges = [
        Occupied(
            ipaddress.ip_network(address.interface.ip), f"address {address.interface} on {names.get(address.index)}"
        )
        for address in host.addresses
        if address.index not in ours
    ]
    ranges += [
        Occupied(route.destination, f"route {route.destination} on {names.get(route.index, 'several links')}")
        for route in host.routes
        if route.index not in ours and route.destination.prefixlen and route.type not in NOT_OCCUPYING
    ]
    return ranges


def uplink_mtu(host: Host) -> int:
    """The MTU (bytes) of the link by which the node reaches the world: the best default route's, IPv4's first; 1500 without one."""
    mtus = {link.index: link.mtu for link in host.links}
    defaults = [
        route
        for route in host.routes
        if not route.destination.prefixlen
        and route.type == rtnetlink.RTN_UNICAST
        and route.table == rtnetlink.RT_TABLE_MAIN
        and route.index in mtus
    ]
    best = min(defaults, key=lambda route: (route.destination.version, route.metric), default=None)
    return mtus[best.index] if best else DEFAULT_MTU


def check_ours(link: Link, addresses: Iterable[LinkAddress], run: Path, expected: set[Interface]) -> None:
    """Raise ForeignBridge unless the link is this instance's bridge, with no IPv4 address but the expected ones."""
    doing = f"use {link.name} as the bridge of this instance"
    cure = f"name another: [network] bridge, or remove it: ip link delete {link.name}"
    if link.kind != "bridge":
        raise ForeignBridge(doing, cause=f"it is not a bridge but {link.kind or 'a hardware link'}", hint=cure)
    if link.alias != mark(run):
        owner = link.alias.removeprefix("tare:")
        cause = f"it belongs to the instance at {owner}" if owner != link.alias else "something else made it"
        raise ForeignBridge(doing, cause=cause, hint=cure)
    for address in addresses:
        interface = address.interface
        if address.index == link.index and interface.version == 4 and interface not in expected:
            remove = f"ip address delete {interface} dev {link.name}"
            raise ForeignBridge(doing, cause=f"something else gave it the address {interface}", hint=f"try: {remove}")


def ensure(netlink: Netlink, host: Host, wanted: Bridge, stale: Iterable[Interface], pods: Collection[str] = ()) -> int:
    """Make the bridge, or make it as wanted; returns its index. `stale` are addresses that an earlier start gave it.

    Links of these pods that lost their bridge come back to it. Raises ForeignBridge, NetlinkError.
    """
    link = next((link for link in host.links if link.name == wanted.name), None)
    if link is None:
        made = rtnetlink.add_bridge(wanted.name, mac=mac_of(wanted.gateways[0].ip), mtu=wanted.mtu)
        netlink.run([made, rtnetlink.set_link(wanted.name, alias=mark(wanted.run))])
        index, present = rtnetlink.read_link(netlink.ask(rtnetlink.get_link(wanted.name))[0]).index, set()
    else:
        check_ours(link, host.addresses, wanted.run, {*wanted.gateways, *stale})
        index = link.index
        present = {address.interface for address in host.addresses if address.index == index}
    messages = [rtnetlink.delete_address(index, old) for old in stale if old in present and old not in wanted.gateways]
    if any(address.version == 6 for address in wanted.gateways):
        allow_ipv6(wanted.name)
    messages += [rtnetlink.add_address(index, address) for address in wanted.gateways if address not in present]
    refuse_router_advertisements(wanted.name)
    messages.append(rtnetlink.set_link(wanted.name, mtu=wanted.mtu, up=True))
    for lost in host.links:
        if lost.kind == "veth" and pod_of(wanted.run, lost) in pods and lost.up and not lost.master:
            messages.append(rtnetlink.set_link(lost.name, master=index))
            messages.append(rtnetlink.set_bridge_port(lost.name, hairpin=True))
    netlink.run(messages)
    return index


def refuse_router_advertisements(bridge: str) -> None:
    """A pod that plays an IPv6 router must not become the node's (CVE-2020-10749). Nothing to do where the kernel has no IPv6."""
    key = ("net", "ipv6", "conf", bridge, "accept_ra")
    if sysctl.path_of(*key).exists():
        sysctl.ensure("0", *key)


def allow_ipv6(bridge: str) -> None:
    """A node that has IPv6 off for new links would refuse the bridge its address."""
    key = ("net", "ipv6", "conf", bridge, "disable_ipv6")
    if not sysctl.path_of(*key).exists():
        cause = "the kernel has no IPv6"
        raise FailedPrecondition(f"give {bridge} an IPv6 address", cause=cause, hint="take [network] subnet6 out")
    sysctl.ensure("0", *key)
