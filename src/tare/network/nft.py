"""The instance's nftables table, spoken to the kernel directly: no nft binary, no libnftables.

One table of family inet holds all that an instance asks of the packet filter, and is replaced whole in one transaction:

    table inet tare-tare0 {
        chain postrouting {
            type nat hook postrouting priority srcnat; policy accept;
            ip saddr 10.85.0.0/16 ip daddr != 10.85.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
        }
    }

There is no chain that accepts forwarded packets: a verdict of accept ends one table only, and what another table's
policy drops stays dropped. Nor does a table of ours decide what the node may receive.
Replacing the table leaves connections alone, because the kernel keeps their translation apart from the rules.
Pure but for `apply`. Source: include/uapi/linux/netfilter/nf_tables.h; nft(8) for the meaning of the rules.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from tare.network.netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    Message,
    Netlink,
    NetlinkError,
    attribute,
    nested,
    text,
)

NETLINK_NETFILTER = 12
GENERIC = struct.Struct(">BBH")  # nfgenmsg: family, version, resource
BE32 = struct.Struct(">I")

NFPROTO_INET, NFPROTO_IPV4 = 1, 2
NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11
NFT_MSG_NEWTABLE, NFT_MSG_DELTABLE, NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE = 0, 2, 3, 6

NFTA_TABLE_NAME = 1
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY, NFTA_CHAIN_TYPE = 1, 3, 4, 5, 7
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY = 1, 2
NF_INET_POST_ROUTING, NF_IP_PRI_NAT_SRC, NF_ACCEPT = 4, 100, 1
NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS = 1, 2, 4
NFTA_LIST_ELEM = 1
NFTA_EXPR_NAME, NFTA_EXPR_DATA = 1, 2

NFT_REG_1 = 1
NFTA_META_DREG, NFTA_META_KEY, NFT_META_NFPROTO = 1, 2, 15
NFTA_PAYLOAD_DREG, NFTA_PAYLOAD_BASE, NFTA_PAYLOAD_OFFSET, NFTA_PAYLOAD_LEN = 1, 2, 3, 4
NFT_PAYLOAD_NETWORK_HEADER = 1
IPV4_SOURCE, IPV4_DESTINATION = 12, 16  # where the addresses are in an IPv4 header
NFTA_BITWISE_SREG, NFTA_BITWISE_DREG, NFTA_BITWISE_LEN, NFTA_BITWISE_MASK, NFTA_BITWISE_XOR = 1, 2, 3, 4, 5
NFTA_CMP_SREG, NFTA_CMP_OP, NFTA_CMP_DATA, NFT_CMP_EQ, NFT_CMP_NEQ = 1, 2, 3, 0, 1
NFTA_DATA_VALUE = 1
NFTA_MASQ_FLAGS, NF_NAT_RANGE_PROTO_RANDOM_FULLY = 1, 1 << 4

MULTICAST = ipaddress.IPv4Network("224.0.0.0/4")
NEEDS = "the kernel needs nf_tables with inet, nat and masq, and this process CAP_NET_ADMIN"


@dataclass(frozen=True, slots=True)
class Table:
    """The table that an instance wants: its name, and the subnet whose packets to elsewhere take the node's address."""

    name: str
    masquerade: ipaddress.IPv4Network


def be32(kind: int, value: int) -> bytes:
    """An attribute that is a number; nf_tables wants them in network order."""
    return attribute(kind, BE32.pack(value))


def expression(name: str, *data: bytes) -> bytes:
    """One step of a rule."""
    return nested(NFTA_LIST_ELEM, text(NFTA_EXPR_NAME, name), nested(NFTA_EXPR_DATA, *data))


def compare(operator: int, value: bytes) -> bytes:
    """Go on with the rule only if the register compares so with the value."""
    data = nested(NFTA_CMP_DATA, attribute(NFTA_DATA_VALUE, value))
    return expression("cmp", be32(NFTA_CMP_SREG, NFT_REG_1), be32(NFTA_CMP_OP, operator), data)


def match_ipv4() -> bytes:
    """The packet is IPv4 (an inet table sees both)."""
    load = expression("meta", be32(NFTA_META_DREG, NFT_REG_1), be32(NFTA_META_KEY, NFT_META_NFPROTO))
    return load + compare(NFT_CMP_EQ, bytes([NFPROTO_IPV4]))


def match_network(offset: int, network: ipaddress.IPv4Network, operator: int) -> bytes:
    """The address at `offset` of the IPv4 header is in the network (NFT_CMP_EQ), or is not (NFT_CMP_NEQ)."""
    load = expression(
        "payload",
        be32(NFTA_PAYLOAD_DREG, NFT_REG_1),
        be32(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER),
        be32(NFTA_PAYLOAD_OFFSET, offset),
        be32(NFTA_PAYLOAD_LEN, 4),
    )
    mask = expression(
        "bitwise",
        be32(NFTA_BITWISE_SREG, NFT_REG_1),
        be32(NFTA_BITWISE_DREG, NFT_REG_1),
        be32(NFTA_BITWISE_LEN, 4),
        nested(NFTA_BITWISE_MASK, attribute(NFTA_DATA_VALUE, network.netmask.packed)),
        nested(NFTA_BITWISE_XOR, attribute(NFTA_DATA_VALUE, bytes(4))),
    )
    return load + mask + compare(operator, network.network_address.packed)


def masquerade(subnet: ipaddress.IPv4Network) -> bytes:
    """The expressions of the rule: from the subnet, to neither the subnet nor a multicast group.

    fully-random: choosing source ports in order makes two connections that begin at once race for one port, and lose a packet.
    """
    flags = be32(NFTA_MASQ_FLAGS, NF_NAT_RANGE_PROTO_RANDOM_FULLY)
    return b"".join(
        (
            match_ipv4(),
            match_network(IPV4_SOURCE, subnet, NFT_CMP_EQ),
            match_network(IPV4_DESTINATION, subnet, NFT_CMP_NEQ),
            match_network(IPV4_DESTINATION, MULTICAST, NFT_CMP_NEQ),
            expression("masq", flags),
        )
    )


def message(doing: str, kind: int, flags: int, *members: bytes) -> Message:
    """One change within a transaction."""
    header = GENERIC.pack(NFPROTO_INET, 0, 0)
    return Message(doing, NFNL_SUBSYS_NFTABLES << 8 | kind, flags | NLM_F_ACK, header + b"".join(members))


def transaction(*changes: Message) -> list[Message]:
    """The changes, all of which happen or none."""
    mark = GENERIC.pack(socket.AF_UNSPEC, 0, NFNL_SUBSYS_NFTABLES)
    begin = Message("begin an nftables transaction", NFNL_MSG_BATCH_BEGIN, 0, mark)
    return [begin, *changes, Message("commit an nftables transaction", NFNL_MSG_BATCH_END, 0, mark)]


def absent(name: str) -> tuple[Message, Message]:
    """Make the table and delete it: that it is gone afterwards, whether it was there or not."""
    made = message(f"make nftables table {name}", NFT_MSG_NEWTABLE, NLM_F_CREATE, text(NFTA_TABLE_NAME, name))
    return made, message(f"delete nftables table {name}", NFT_MSG_DELTABLE, 0, text(NFTA_TABLE_NAME, name))


def replace(table: Table) -> list[Message]:
    """The transaction after which the table is as wanted, whatever it was."""
    made, deleted = absent(table.name)
    hook = nested(
        NFTA_CHAIN_HOOK, be32(NFTA_HOOK_HOOKNUM, NF_INET_POST_ROUTING), be32(NFTA_HOOK_PRIORITY, NF_IP_PRI_NAT_SRC)
    )
    chain = message(
        f"make chain postrouting in nftables table {table.name}",
        NFT_MSG_NEWCHAIN,
        NLM_F_CREATE,
        text(NFTA_CHAIN_TABLE, table.name),
        text(NFTA_CHAIN_NAME, "postrouting"),
        hook,
        be32(NFTA_CHAIN_POLICY, NF_ACCEPT),
        text(NFTA_CHAIN_TYPE, "nat"),
    )
    rule = message(
        f"add the masquerade rule to nftables table {table.name}",
        NFT_MSG_NEWRULE,
        NLM_F_CREATE | NLM_F_APPEND,
        text(NFTA_RULE_TABLE, table.name),
        text(NFTA_RULE_CHAIN, "postrouting"),
        nested(NFTA_RULE_EXPRESSIONS, masquerade(table.masquerade)),
    )
    return transaction(made, deleted, made, chain, rule)


def remove(name: str) -> list[Message]:
    """The transaction after which there is no such table."""
    return transaction(*absent(name))


def apply(messages: Sequence[Message]) -> None:
    """Do a transaction in the network namespace of this thread. Raises NetlinkError."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER) as sock:
        try:
            Netlink(sock).run(messages)
        except NetlinkError as error:
            raise NetlinkError(error.doing, error.errno, error.text, hint=NEEDS) from error
