"""What an instance asks of the packet filter: one table of family inet, made whole in one transaction.

    table inet tare-tare0 {
        map any4   { type inet_proto . inet_service : ipv4_addr . inet_service }                 published on every address of the node
        map exact4 { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service }     published on one address

        chain guard { type filter hook prerouting priority raw; policy accept;
            iifname "tare0" ip daddr 127.0.0.0/8 drop         # and ip saddr: only answers may reach the node's loopback, see below
        }
        chain prerouting { type nat hook prerouting priority dstnat; policy accept;
            ip daddr 127.0.0.0/8 accept                       # a neighbour's frame may say so: left as it is, the kernel drops it
            fib daddr type local jump hostports               # from outside and from pods
        }
        chain output { type nat hook output priority -100; policy accept;
            ip6 daddr ::1 accept                              # where pods have IPv6
            fib daddr type local jump hostports               # from the node itself
        }
        chain hostports {
            ip saddr 10.85.0.0/16 meta mark set meta mark | 0x2000
            dnat ip to ip daddr . meta l4proto . th dport map @exact4
            dnat ip to meta l4proto . th dport map @any4
        }
        chain postrouting { type nat hook postrouting priority srcnat; policy accept;
            ip saddr 10.85.0.0/16 ip daddr != 10.85.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
            oifname "tare0" meta mark & 0x2000 == 0x2000 masquerade fully-random
            oifname "tare0" ip saddr 127.0.0.0/8 masquerade fully-random
        }
        chain forward { type filter hook forward priority filter; policy accept;         one rule for each other network of the instance
            iifname "tare0" oifname "tare-51f0aa0b2c" ct status & dnat == 0 reject with icmpx admin-prohibited
        }
        chain links { type filter hook prerouting priority mangle; policy accept;        with isolation from "link-local"
            iifname "tare0" ct state established,related accept
            iifname "tare0" ip daddr 169.254.0.0/16 reject with icmpx admin-prohibited
            iifname "tare0" ip6 daddr fe80::/10 meta l4proto != ipv6-icmp reject with icmpx admin-prohibited
        }
        chain node { type filter hook input priority filter; policy accept;              with isolation from "node"
            iifname "tare0" ct state established,related accept
            iifname "tare0" meta l4proto != ipv6-icmp reject with icmpx admin-prohibited
        }
    }

and the same for IPv6 where pods have it. Pods of different networks reach each other by published ports alone. ICMPv6 is left to the node in any
case: by it neighbours find each other.

A pod that calls a published port, another's or its own, must be answered by the node: the other pod is on the same wire and would
answer directly, from an address that was not called. So such packets take the node's address, and a bit of the packet's mark says
which they are; it is the one that CNI's portmap uses for the same. It lives for one pass through the stack. A call of the node's own to
127.0.0.1 leaves by the bridge with that source, for which the bridge has `route_localnet`; that would let pods call the node's
loopback too (CVE-2020-8558), which `guard` prevents before connections are looked at: an answer is addressed to the bridge there.
IPv6 has no such setting: the kernel takes no packet for ::1 from a link, so ports are not published there, and a client that knows the
node as "localhost" is refused at once and goes on to 127.0.0.1.

There is no chain that accepts forwarded packets: a verdict of accept ends one table only, and what another table's
policy drops stays dropped. Nor does a table of ours decide what the node may receive.
Replacing the table leaves connections alone, because the kernel keeps their translation apart from the rules. Pure.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tare.network import nft
from tare.network.netlink import Message
from tare.network.rtnetlink import Address, Network

HOSTPORT_MARK = 0x2000
PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}
PORT = struct.Struct(">H2x")  # a register is filled up with zeros
ICMPV6 = 58
LINK_LOCAL, NODE = "link-local", "node"  # what pods can be isolated from
LOOPBACK4, LOOPBACK6 = ipaddress.IPv4Network("127.0.0.0/8"), ipaddress.IPv6Network("::1/128")


@dataclass(frozen=True, slots=True)
class Family:
    """Where IPv4 and IPv6 differ. Offsets are those of the addresses in the header."""

    version: int
    number: int
    source: int
    destination: int
    length: int
    type: int
    multicast: Network
    link_local: Network

    @property
    def words(self) -> int:
        """Registers that an address takes."""
        return self.length // 4


IPV4 = Family(
    4,
    socket.AF_INET,
    12,
    16,
    4,
    nft.TYPE_IPV4_ADDR,
    ipaddress.IPv4Network("224.0.0.0/4"),
    ipaddress.IPv4Network("169.254.0.0/16"),
)
IPV6 = Family(
    6,
    socket.AF_INET6,
    8,
    24,
    16,
    nft.TYPE_IPV6_ADDR,
    ipaddress.IPv6Network("ff00::/8"),
    ipaddress.IPv6Network("fe80::/10"),
)
FAMILIES = {4: IPV4, 6: IPV6}


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    """A port of the node's that leads to a pod's: on `host` alone, or with None on every address of the target's family."""

    protocol: str
    host: Address | None
    port: int
    target: Address
    target_port: int


@dataclass(frozen=True, slots=True)
class Table:
    """The table that a network wants: its name, its bridge, and the subnets whose packets to elsewhere take the node's address.

    `others` are the bridges of the instance's other networks, `isolation` is what of LINK_LOCAL and NODE pods do not reach.
    """

    name: str
    bridge: str
    subnets: tuple[Network, ...]
    redirects: tuple[Redirect, ...] = ()
    others: tuple[str, ...] = ()
    isolation: frozenset[str] = frozenset()


def match_family(family: Family) -> bytes:
    """The packet is of the family (an inet table sees both)."""
    return nft.meta(nft.NFT_META_NFPROTO) + nft.compare(bytes([family.number]))


def match_network(family: Family, offset: int, network: Network, *, inside: bool = True) -> bytes:
    """The address at `offset` of the header is in the network, or is not."""
    load = nft.payload(nft.NFT_PAYLOAD_NETWORK_HEADER, offset, family.length)
    mask = (
        b"" if network.prefixlen == network.max_prefixlen else nft.bitwise(network.netmask.packed, bytes(family.length))
    )
    return load + mask + nft.compare(network.network_address.packed, equal=inside)


def leave(table: Table, subnet: Network) -> Message:
    """Packets from the subnet, to neither the subnet nor a multicast group, are masqueraded."""
    family = FAMILIES[subnet.version]
    return nft.new_rule(
        table.name,
        "postrouting",
        match_family(family),
        match_network(family, family.source, subnet),
        match_network(family, family.destination, subnet, inside=False),
        match_network(family, family.destination, family.multicast, inside=False),
        nft.masquerade(),
    )


def key_registers(family: Family, *, exact: bool) -> bytes:
    """Load the key of a map: the destination's address where it is part of it, protocol, port."""
    first, address = nft.NFT_REG32_00, b""
    if exact:
        address = nft.payload(nft.NFT_PAYLOAD_NETWORK_HEADER, family.destination, family.length, first)
        first += family.words
    port = nft.payload(nft.NFT_PAYLOAD_TRANSPORT_HEADER, 2, 2, first + 1)
    return address + nft.meta(nft.NFT_META_L4PROTO, first) + port


def map_name(version: int, *, exact: bool) -> str:
    """What the map of a family is called."""
    return f"{'exact' if exact else 'any'}{version}"


def maps_of(table: Table, family: Family) -> Iterator[Message]:
    """The two maps of a family."""
    data = ((family.type, nft.TYPE_INET_SERVICE), family.length + 4)
    short = ((nft.TYPE_INET_PROTO, nft.TYPE_INET_SERVICE), 8)
    long = ((family.type, *short[0]), family.length + 8)
    yield nft.new_map(table.name, map_name(family.version, exact=False), family.version * 2, short, data)
    yield nft.new_map(table.name, map_name(family.version, exact=True), family.version * 2 + 1, long, data)


def redirections(table: Table, family: Family, subnet: Network) -> Iterator[Message]:
    """The rules of a family in chain hostports."""
    from_pods = match_family(family) + match_network(family, family.source, subnet)
    yield nft.new_rule(table.name, "hostports", from_pods, nft.set_mark_bit(HOSTPORT_MARK))
    for exact in (True, False):
        yield nft.new_rule(
            table.name,
            "hostports",
            match_family(family) if exact else b"",  # the last step does nothing to a packet of the other family
            key_registers(family, exact=exact),
            nft.lookup(map_name(family.version, exact=exact), into=nft.NFT_REG32_00),
            nft.redirect(family.number, nft.NFT_REG32_00, nft.NFT_REG32_00 + family.words),
        )


def loopback(table: Table) -> Message:
    """What the node sends from its loopback to a pod takes the bridge's address."""
    outwards = nft.interface(nft.NFT_META_OIFNAME, table.bridge)
    source = match_family(IPV4) + match_network(IPV4, IPV4.source, LOOPBACK4)
    return nft.new_rule(table.name, "postrouting", outwards, source, nft.masquerade())


def spare_loopback6(table: Table) -> Message:
    """What the node sends to ::1 stays there."""
    destination = match_family(IPV6) + match_network(IPV6, IPV6.destination, LOOPBACK6)
    return nft.new_rule(table.name, "output", destination, nft.verdict(nft.NF_ACCEPT))


def spare_loopback4(table: Table) -> Message:
    """What comes from a link and is for 127.0.0.1 keeps that address, and is dropped as a martian: translated before, it would be let in."""
    destination = match_family(IPV4) + match_network(IPV4, IPV4.destination, LOOPBACK4)
    return nft.new_rule(table.name, "prerouting", destination, nft.verdict(nft.NF_ACCEPT))


def guards(table: Table) -> Iterator[Message]:
    """Nothing that comes from a pod may pretend to be of the node's loopback, or call it."""
    inwards = nft.interface(nft.NFT_META_IIFNAME, table.bridge) + match_family(IPV4)
    for offset in (IPV4.destination, IPV4.source):
        drop = nft.verdict(nft.NF_DROP)
        yield nft.new_rule(table.name, "guard", inwards, match_network(IPV4, offset, LOOPBACK4), drop)


def apart(table: Table) -> Iterator[Message]:
    """Nothing goes from this network to another one, but what was addressed to a published port, and answers to that."""
    inwards = nft.interface(nft.NFT_META_IIFNAME, table.bridge)
    direct = nft.connection(nft.NFT_CT_STATUS, nft.IPS_DST_NAT, some=False)
    for other in table.others:
        outwards = nft.interface(nft.NFT_META_OIFNAME, other)
        yield nft.new_rule(table.name, "forward", inwards, outwards, direct, nft.reject())


def answers(table: Table, chain: str) -> Message:
    """What belongs to a connection that is there already may pass."""
    inwards = nft.interface(nft.NFT_META_IIFNAME, table.bridge)
    known = nft.connection(nft.NFT_CT_STATE, nft.ESTABLISHED_OR_RELATED)
    return nft.new_rule(table.name, chain, inwards, known, nft.verdict(nft.NF_ACCEPT))


def isolate(table: Table) -> Iterator[Message]:
    """Chains that keep pods from what the network isolates them from."""
    inwards = nft.interface(nft.NFT_META_IIFNAME, table.bridge)
    no_icmp = nft.meta(nft.NFT_META_L4PROTO) + nft.compare(bytes([ICMPV6]), equal=False)
    if LINK_LOCAL in table.isolation:
        yield nft.new_chain(table.name, "links", "filter", nft.NF_INET_PRE_ROUTING, nft.NF_IP_PRI_MANGLE)
        yield answers(table, "links")
        for family, more in ((IPV4, b""), (IPV6, no_icmp)):
            there = match_family(family) + match_network(family, family.destination, family.link_local)
            yield nft.new_rule(table.name, "links", inwards, there, more, nft.reject())
    if NODE in table.isolation:
        yield nft.new_chain(table.name, "node", "filter", nft.NF_INET_LOCAL_IN, nft.NF_IP_PRI_FILTER)
        yield answers(table, "node")
        yield nft.new_rule(table.name, "node", inwards, no_icmp, nft.reject())


def replace(table: Table) -> list[Message]:
    """The transaction after which the table is as wanted, whatever it was."""
    name, families = table.name, [FAMILIES[subnet.version] for subnet in table.subnets]
    changes = [nft.new_table(name), nft.delete_table(name), nft.new_table(name)]
    for family in families:
        changes += maps_of(table, family)
    changes += [
        nft.new_chain(name, "guard", "filter", nft.NF_INET_PRE_ROUTING, nft.NF_IP_PRI_RAW),
        nft.new_chain(name, "prerouting", "nat", nft.NF_INET_PRE_ROUTING, nft.NF_IP_PRI_NAT_DST),
        nft.new_chain(name, "output", "nat", nft.NF_INET_LOCAL_OUT, nft.NF_IP_PRI_NAT_DST),
        nft.new_chain(name, "hostports"),
        nft.new_chain(name, "postrouting", "nat", nft.NF_INET_POST_ROUTING, nft.NF_IP_PRI_NAT_SRC),
        *guards(table),
        spare_loopback4(table),
    ]
    if IPV6 in families:
        changes.append(spare_loopback6(table))
    for chain in ("prerouting", "output"):
        changes.append(nft.new_rule(name, chain, nft.destination_is_local(), nft.verdict(nft.NFT_JUMP, "hostports")))
    for family, subnet in zip(families, table.subnets, strict=True):
        changes += redirections(table, family, subnet)
        changes.append(leave(table, subnet))
    marked = nft.interface(nft.NFT_META_OIFNAME, table.bridge) + nft.has_mark_bit(HOSTPORT_MARK)
    changes.append(nft.new_rule(name, "postrouting", marked, nft.masquerade()))
    changes.append(loopback(table))
    changes += [
        nft.new_chain(name, "forward", "filter", nft.NF_INET_FORWARD, nft.NF_IP_PRI_FILTER),
        *apart(table),
        *isolate(table),
    ]
    return nft.transaction(*changes, *change_redirects(name, table.redirects, add=True))


def entries_of(redirects: Iterable[Redirect]) -> dict[str, list[tuple[bytes, bytes]]]:
    """What stands for redirects in the maps: keys and data, by the map."""
    entries: dict[str, list[tuple[bytes, bytes]]] = {}
    for item in redirects:
        key = PORT.pack(item.port)
        key = bytes([PROTOCOLS[item.protocol], 0, 0, 0]) + key
        if item.host is not None:
            key = item.host.packed + key
        data = item.target.packed + PORT.pack(item.target_port)
        entries.setdefault(map_name(item.target.version, exact=item.host is not None), []).append((key, data))
    return entries


def change_redirects(name: str, redirects: Iterable[Redirect], *, add: bool) -> list[Message]:
    """The changes that put redirects into the maps of the table, or take them out."""
    entries = entries_of(redirects)
    return [change for map_, some in entries.items() for change in nft.elements(name, map_, some, add=add)]


def publish(name: str, redirects: Iterable[Redirect]) -> list[Message]:
    """The transaction after which the redirects are in force as well."""
    return nft.transaction(*change_redirects(name, redirects, add=True))


def withdraw(name: str, redirects: Iterable[Redirect]) -> list[Message]:
    """The transaction after which the redirects are in force no more. All of them must be there."""
    return nft.transaction(*change_redirects(name, redirects, add=False))


def remove(name: str) -> list[Message]:
    """The transaction after which there is no such table: made before it is deleted, so that it need not have been there."""
    return nft.transaction(nft.new_table(name), nft.delete_table(name))
