"""The whole path of a pod's packets, as it is in the kernel: namespace, veth pair, addresses, routes, rates, ports, rules; and what
of it is not as it was made. For people, and for `tare network check`: JSON-able.

    record: lease, ports ─┐
    node: both ends' links, bridge, table ─┼─► path ─► troubles, in plain words
    pod's namespace: links, addresses, routes ─┘
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tare.errors import TareError, describe
from tare.network import bridge, place, rtnetlink, shaping
from tare.network.attach import INTERFACE, EmbeddedNetwork, Ready, node
from tare.network.bridge import Host
from tare.network.firewall import Redirect
from tare.network.netlink import Netlink
from tare.network.rtnetlink import Link

IN_TABLE = {rtnetlink.RT_TABLE_MAIN}


def look(namespace: Path) -> Host:
    """Links, addresses and routes of a namespace. Raises OSError, TareError."""

    def ask() -> Host:
        with node() as netlink:
            return bridge.look(netlink)

    return place.inside(namespace, ask)


async def enter(netns: str) -> tuple[Host | None, str]:
    """What is in a pod's namespace, or why that cannot be seen."""
    if not netns:
        return None, "it has no network namespace of its own"
    try:
        return await asyncio.to_thread(look, Path(netns)), ""
    except (OSError, TareError) as error:
        return None, f"its network namespace cannot be entered: {describe(error)}"


def number(netns: str) -> int:
    """The namespace's number, as lsns(8) has it; 0 where it is gone."""
    try:
        status = os.stat(netns)
    except OSError:
        return 0
    return status.st_ino if status.st_dev == os.stat("/proc/self/ns/net").st_dev else 0


def link(item: Link, names: Mapping[int, str]) -> dict[str, Any]:
    """A device, with the name of what it hangs on."""
    return {
        "name": item.name,
        "index": item.index,
        "kind": item.kind,
        "mac": item.address,
        "mtu": item.mtu,
        "up": item.up,
        **({"bridge": names.get(item.master, str(item.master))} if item.master else {}),
    }


def interfaces(inside: Host, host: Netlink) -> list[dict[str, Any]]:
    """The pod's devices with their addresses, and where they are veths the other end on the node."""
    found = []
    for item in inside.links:
        own = [str(address.interface) for address in inside.addresses if address.index == item.index]
        entry = {**link(item, {}), "addresses": own}
        if item.kind == "veth" and item.peer and (there := find_peer(host, item)) is not None:
            entry["peer"] = there
        found.append(entry)
    return found


def find_peer(host: Netlink, item: Link) -> dict[str, Any] | None:
    """The node's end of a veth; None where the other end is not on the node, or gone."""
    try:
        there = rtnetlink.read_link(host.ask(rtnetlink.get_link_at(item.peer))[0])
        if there.kind != "veth" or there.peer != item.index:
            return None
        master = rtnetlink.read_link(host.ask(rtnetlink.get_link_at(there.master))[0]).name if there.master else ""
    except TareError:
        return None
    return link(there, {there.master: master})


def routes(inside: Host) -> list[dict[str, Any]]:
    """The pod's routes of the main table."""
    names = {item.index: item.name for item in inside.links}
    return [
        {
            "destination": str(route.destination),
            "gateway": str(route.gateway) if route.gateway is not None else "",
            "interface": names.get(route.index, ""),
            "metric": route.metric,
        }
        for route in inside.routes
        if route.table in IN_TABLE and route.type == rtnetlink.RTN_UNICAST
    ]


def ports(redirects: Iterable[Redirect]) -> list[dict[str, Any]]:
    """What of the node's leads to the pod."""
    return [
        {
            "protocol": item.protocol,
            "hostIP": str(item.host) if item.host is not None else ("::" if item.target.version == 6 else "0.0.0.0"),
            "hostPort": item.port,
            "podIP": str(item.target),
            "containerPort": item.target_port,
        }
        for item in redirects
    ]


def rate(host: Netlink, name: str) -> int | None:
    """Bits a second to which a link is held; None without a bound."""
    item = bridge.find_link(host, name)
    if item is None:
        return None
    rates = map(shaping.read_rate, host.ask(shaping.list_buckets(item.index, name)))
    return next((bytes_ * 8 for index, bytes_ in rates if index == item.index and bytes_), None)


async def path(network: EmbeddedNetwork, pod_id: str, netns: str) -> dict[str, Any]:
    """A pod's path through an embedded network. `troubles` is empty where all is as it was made. Raises NetlinkError."""
    inside, trouble = await enter(netns)
    lease = network.leases.of(pod_id).get(network.subnet, "")
    redirects = network.publisher.redirects(pod_id)
    name = bridge.pod_link_name(pod_id)
    with node() as host:
        ours, on = bridge.find_link(host, name), bridge.find_link(host, network.bridge)
        missing = network.publisher.missing(redirects)
        count = network.publisher.rules()
        found: dict[str, Any] = {
            "mode": "embedded",
            "name": network.name,
            "bridge": network.bridge,
            "subnets": list(network.ranges),
            "lease": lease,
            "namespace": netns,
            "namespaceNumber": number(netns),
            "interfaces": interfaces(inside, host) if inside is not None else [],
            "routes": routes(inside) if inside is not None else [],
            "ports": ports(redirects),
            "rules": {
                "table": f"inet {network.publisher.table}",
                "count": count,
                "isolation": sorted(network.isolation),
            },
            "rates": {"ingress": rate(host, name), "egress": rate(host, shaping.bucket_name(pod_id))},
        }
    troubles = [trouble] if trouble else []
    if not lease:
        troubles.append("it holds no address")
    troubles += link_troubles(name, ours, on, network.bridge)
    if inside is not None and network.ready is not None and lease:
        troubles += inside_troubles(inside, network.ready, lease)
    if not count:
        troubles.append(f"nftables table {network.publisher.table} has no rules")
    troubles += [f"host port {item.port}/{item.protocol} leads nowhere: it is not in the table" for item in missing]
    return {**found, "troubles": troubles}


async def plugins_path(
    name: str, plugins: list[str], result: Mapping[str, Any] | None, netns: str, troubles: list[str]
) -> dict[str, Any]:
    """A pod's path where plugins made it: what they said that they made, and what there is."""
    inside, trouble = await enter(netns)
    with node() as host:
        there = interfaces(inside, host) if inside is not None else []
    return {
        "mode": "cni",
        "name": name,
        "plugins": plugins,
        "result": result,
        "namespace": netns,
        "namespaceNumber": number(netns),
        "interfaces": there,
        "routes": routes(inside) if inside is not None else [],
        "troubles": [*([trouble] if trouble else []), *troubles],
    }


def link_troubles(name: str, ours: Link | None, on: Link | None, wanted: str) -> list[str]:
    """What is wrong with the node's end of the veth (pure)."""
    found = []
    if on is None:
        found.append(f"bridge {wanted} is gone")
    elif not on.up:
        found.append(f"bridge {wanted} is down")
    if ours is None:
        return [*found, f"link {name} is gone from the node"]
    if not ours.up:
        found.append(f"link {name} is down")
    if on is not None and ours.master != on.index:
        found.append(f"link {name} is not on bridge {wanted}")
    return found


def inside_troubles(inside: Host, ready: Ready, lease: str) -> list[str]:
    """What is wrong in the pod's namespace (pure)."""
    own = ready.addresses(ipaddress.IPv4Address(lease))
    item = next((item for item in inside.links if item.name == INTERFACE), None)
    if item is None:
        return [f"{INTERFACE} is gone from the pod"]
    found = [] if item.up else [f"{INTERFACE} is down in the pod"]
    mac = bridge.mac_of(own[0].ip)
    if item.address != mac:
        found.append(f"{INTERFACE} has the hardware address {item.address}, not {mac}")
    there = {address.interface for address in inside.addresses if address.index == item.index}
    found += [f"{INTERFACE} has not the address {address}" for address in own if address not in there]
    gateways = {route.gateway for route in inside.routes if not route.destination.prefixlen}
    found += [f"there is no default route by {via.ip}" for via in ready.gateways() if via.ip not in gateways]
    return found
