"""Links, addresses and routes: what rtnetlink's messages say, as bytes that are built and values that are read.

Pure: a `netlink.Message` is made here and run elsewhere, in whatever namespace the socket lives. IPv4 and IPv6 alike.

    link:     ifinfomsg │ IFLA_…     address:  ifaddrmsg │ IFA_…     route:  rtmsg │ RTA_…

Source: rtnetlink(7), Documentation/netlink/specs/rt-{link,addr,route}.yaml.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from dataclasses import dataclass

from tare.network.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    attribute,
    attributes,
    nested,
    number,
    string,
    text,
    u32,
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK = 16, 17, 18
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH = 28

IFINFO = struct.Struct("=BxHiII")  # family, hardware type, index, flags, which flags to change
IFADDR = struct.Struct("=BBBBi")  # family, prefix length, flags, scope, index
ROUTE = struct.Struct(
    "=BBBBBBBBI"
)  # family, prefix lengths of destination and source, tos, table, protocol, scope, type, flags
NEIGHBOUR = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
NDA_DST, NDA_LLADDR, NUD_REACHABLE = 1, 2, 2

IFF_UP = 1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER, IFLA_LINKINFO = 1, 3, 4, 5, 10, 18
IFLA_IFALIAS, IFLA_AF_SPEC, IFLA_NET_NS_FD = 20, 26, 28
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
VETH_INFO_PEER = 1
IFLA_BRPORT_MODE = 4  # hairpin: a frame may leave by the port it came in
IFLA_INET6_ADDR_GEN_MODE = 8
IN6_ADDR_GEN_MODE_NONE = 1

IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST = 1, 2, 4
IFA_F_NODAD = 0x02

RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_TABLE = 1, 4, 5, 6, 15
RT_TABLE_MAIN, RT_TABLE_LOCAL = 254, 255
RTPROT_BOOT = 3
RT_SCOPE_UNIVERSE = 0
RTN_UNICAST, RTN_LOCAL, RTN_BROADCAST, RTN_ANYCAST, RTN_MULTICAST = 1, 2, 3, 4, 5

MAX_NAME = 15  # IFNAMSIZ without the closing zero byte
MAX_ALIAS = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A network device. `kind` is "" for hardware, `master` 0 for none; `address` is its MAC in colon form.

    `peer` is the index of a veth's other end, which may be in another namespace; 0 where there is none.
    """

    index: int
    name: str
    kind: str
    master: int
    mtu: int
    address: str
    alias: str
    up: bool
    peer: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkAddress:
    """An address on the link `index`."""

    index: int
    interface: Interface


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A route. `index` is the outgoing link (0 where there are several or none), `type` an RTN_ number, `metric` 0 comes first."""

    destination: Network
    gateway: Address | None
    index: int
    table: int
    type: int
    metric: int


def pack_mac(mac: str) -> bytes:
    """The six bytes of a MAC address in colon form."""
    return bytes.fromhex(mac.replace(":", ""))


def link_header(index: int = 0, *, up: bool | None = None, family: int = 0) -> bytes:
    """An ifinfomsg that sets a link up or down, or leaves that alone."""
    return IFINFO.pack(family, 0, index, IFF_UP if up else 0, 0 if up is None else IFF_UP)


def add_bridge(name: str, *, mac: str, mtu: int) -> Message:
    """Make a bridge. With a MAC of its own it does not take those of its ports, which come and go."""
    body = link_header() + text(IFLA_IFNAME, name) + attribute(IFLA_ADDRESS, pack_mac(mac)) + u32(IFLA_MTU, mtu)
    body += nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "bridge"))
    return Message(f"make bridge {name}", RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body)


def add_veth(name: str, *, mtu: int, peer: str, peer_mac: str, netns: int) -> Message:
    """Make a veth pair whose other end, `peer`, comes to life in the namespace behind the descriptor `netns`."""
    other = link_header() + text(IFLA_IFNAME, peer) + attribute(IFLA_ADDRESS, pack_mac(peer_mac))
    other += u32(IFLA_MTU, mtu) + u32(IFLA_NET_NS_FD, netns)
    data = nested(IFLA_INFO_DATA, attribute(VETH_INFO_PEER, other))
    body = link_header() + text(IFLA_IFNAME, name) + u32(IFLA_MTU, mtu)
    body += nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "veth"), data)
    doing = f"make veth {name} with {peer} in the pod"
    return Message(doing, RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body)


def set_link(
    name: str,
    *,
    up: bool | None = None,
    master: int | None = None,
    mtu: int | None = None,
    alias: str | None = None,
    ipv6: bool = True,
) -> Message:
    """Change a link that exists. With `ipv6` False the kernel gives it no link-local address."""
    body = link_header(up=up) + text(IFLA_IFNAME, name)
    if master is not None:
        body += u32(IFLA_MASTER, master)
    if mtu is not None:
        body += u32(IFLA_MTU, mtu)
    if alias is not None:
        body += attribute(IFLA_IFALIAS, alias.encode())
    if not ipv6:
        mode = attribute(IFLA_INET6_ADDR_GEN_MODE, bytes([IN6_ADDR_GEN_MODE_NONE]))
        body += nested(IFLA_AF_SPEC, nested(socket.AF_INET6, mode))
    return Message(f"configure link {name}", RTM_NEWLINK, NLM_F_ACK, body)


def set_bridge_port(name: str, *, hairpin: bool) -> Message:
    """Change how a bridge treats one of its ports."""
    data = nested(IFLA_INFO_SLAVE_DATA, attribute(IFLA_BRPORT_MODE, bytes([hairpin])))
    body = link_header() + text(IFLA_IFNAME, name) + nested(IFLA_LINKINFO, text(IFLA_INFO_SLAVE_KIND, "bridge"), data)
    return Message(f"configure bridge port {name}", RTM_NEWLINK, NLM_F_ACK, body)


def delete_link(index: int, name: str) -> Message:
    """Remove a link, a veth with its peer. Takes milliseconds: the kernel waits until no packet is on its way through it."""
    return Message(f"remove link {name}", RTM_DELLINK, NLM_F_ACK, link_header(index))


def get_link(name: str) -> Message:
    """Ask for one link by name; ENODEV if there is none."""
    return Message(f"look up link {name}", RTM_GETLINK, NLM_F_ACK, link_header() + text(IFLA_IFNAME, name))


def get_link_at(index: int) -> Message:
    """Ask for one link by its index; ENODEV if there is none."""
    return Message(f"look up link {index}", RTM_GETLINK, NLM_F_ACK, link_header(index))


def list_links(kind: str = "") -> Message:
    """Ask for all links (of one kind)."""
    body = link_header() + (nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, kind)) if kind else b"")
    return Message("list links", RTM_GETLINK, NLM_F_ACK | NLM_F_DUMP, body)


def address_body(index: int, interface: Interface) -> bytes:
    """An ifaddrmsg with the address (and, for IPv4 networks that have one, their broadcast address).

    An IPv6 address is to be used at once: that no other has it is known here, so the kernel need not ask around for a second.
    """
    family, flags = (socket.AF_INET, 0) if interface.version == 4 else (socket.AF_INET6, IFA_F_NODAD)
    body = IFADDR.pack(family, interface.network.prefixlen, flags, 0, index)
    body += attribute(IFA_LOCAL, interface.ip.packed) + attribute(IFA_ADDRESS, interface.ip.packed)
    if interface.version == 4 and interface.network.prefixlen < 31:
        body += attribute(IFA_BROADCAST, interface.network.broadcast_address.packed)
    return body


def add_address(index: int, interface: Interface) -> Message:
    """Give a link an address, and with it the route to its network."""
    body = address_body(index, interface)
    return Message(f"add address {interface}", RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body)


def delete_address(index: int, interface: Interface) -> Message:
    """Take an address from a link."""
    return Message(f"remove address {interface}", RTM_DELADDR, NLM_F_ACK, address_body(index, interface))


def list_addresses() -> Message:
    """Ask for all addresses."""
    return Message("list addresses", RTM_GETADDR, NLM_F_ACK | NLM_F_DUMP, IFADDR.pack(0, 0, 0, 0, 0))


def add_neighbour(index: int, address: Address, mac: str) -> Message:
    """Say on which MAC address a neighbour is to be found, as if it had just answered."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    body = NEIGHBOUR.pack(family, index, NUD_REACHABLE, 0, 0)
    body += attribute(NDA_DST, address.packed) + attribute(NDA_LLADDR, pack_mac(mac))
    return Message(f"add neighbour {address}", RTM_NEWNEIGH, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, body)


def add_default_route(index: int, gateway: Address) -> Message:
    """Send by `gateway`, which the link `index` reaches, whatever no other route takes."""
    family = socket.AF_INET if gateway.version == 4 else socket.AF_INET6
    body = ROUTE.pack(family, 0, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, RT_SCOPE_UNIVERSE, RTN_UNICAST, 0)
    body += attribute(RTA_GATEWAY, gateway.packed) + u32(RTA_OIF, index)
    return Message(f"add default route by {gateway}", RTM_NEWROUTE, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body)


def list_routes() -> Message:
    """Ask for all routes of all tables."""
    return Message("list routes", RTM_GETROUTE, NLM_F_ACK | NLM_F_DUMP, ROUTE.pack(0, 0, 0, 0, 0, 0, 0, 0, 0))


def read_link(body: bytes) -> Link:
    """An RTM_NEWLINK's body. Raises ValueError where it is malformed."""
    _, _, index, flags, _ = unpack(IFINFO, body)
    found = attributes(body, IFINFO.size)
    info = attributes(found.get(IFLA_LINKINFO, b""))
    return Link(
        index=index,
        name=string(found.get(IFLA_IFNAME, b"")),
        kind=string(info.get(IFLA_INFO_KIND, b"")),
        master=number(found.get(IFLA_MASTER, bytes(4))),
        mtu=number(found.get(IFLA_MTU, bytes(4))),
        address=found.get(IFLA_ADDRESS, b"").hex(":"),
        alias=string(found.get(IFLA_IFALIAS, b"")),
        up=bool(flags & IFF_UP),
        peer=number(found.get(IFLA_LINK, bytes(4))),
    )


def read_address(body: bytes) -> LinkAddress:
    """An RTM_NEWADDR's body. Raises ValueError where it is malformed."""
    _, prefix, _, _, index = unpack(IFADDR, body)
    found = attributes(body, IFADDR.size)
    # On a point-to-point link IFA_ADDRESS is the other side's; IFA_LOCAL is missing for IPv6.
    packed = found.get(IFA_LOCAL, found.get(IFA_ADDRESS, b""))
    return LinkAddress(index=index, interface=ipaddress.ip_interface((packed, prefix)))


def read_route(body: bytes) -> Route:
    """An RTM_NEWROUTE's body. Raises ValueError where it is malformed."""
    family, prefix, _, _, table, _, _, kind, _ = unpack(ROUTE, body)
    found = attributes(body, ROUTE.size)
    anywhere = bytes(4 if family == socket.AF_INET else 16)
    gateway = found.get(RTA_GATEWAY)
    return Route(
        destination=ipaddress.ip_network((found.get(RTA_DST, anywhere), prefix), strict=False),
        gateway=ipaddress.ip_address(gateway) if gateway else None,
        index=number(found.get(RTA_OIF, bytes(4))),
        table=number(found[RTA_TABLE]) if RTA_TABLE in found else table,
        type=kind,
        metric=number(found.get(RTA_PRIORITY, bytes(4))),
    )


def unpack(header: struct.Struct, body: bytes) -> tuple[int, ...]:
    """The fixed part of a body. Raises ValueError where it is cut off."""
    if len(body) < header.size:
        raise ValueError(f"rtnetlink message of {len(body)} bytes")
    return header.unpack_from(body)
