"""nf_tables, spoken to the kernel directly: no nft binary, no libnftables. What our table says is `firewall`'s.

    message:      nfgenmsg │ NFTA_…           changes of one transaction stand between BATCH_BEGIN and BATCH_END in one send
    rule:         expressions that run in order; one that does not match ends the rule
    registers:    sixteen of 4 bytes (8 to 23); a longer value, or a key of several parts, takes as many as it needs, one after the other

Pure but for `apply`. Source: include/uapi/linux/netfilter/nf_tables.h; nft(8) for the meaning of the expressions.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence

from tare.network.netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_DUMP,
    Message,
    Netlink,
    NetlinkError,
    attribute,
    attributes,
    members,
    nested,
    text,
)

NETLINK_NETFILTER = 12
GENERIC = struct.Struct(">BBH")  # nfgenmsg: family, version, resource
BE32 = struct.Struct(">I")
MARK = struct.Struct("=I")

NFPROTO_INET = 1
NFNL_SUBSYS_NFTABLES = 10
NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END = 0x10, 0x11
NFT_MSG_NEWTABLE, NFT_MSG_DELTABLE, NFT_MSG_NEWCHAIN, NFT_MSG_NEWRULE, NFT_MSG_GETRULE = 0, 2, 3, 6, 7
NFT_MSG_NEWSET, NFT_MSG_NEWSETELEM, NFT_MSG_GETSETELEM, NFT_MSG_DELSETELEM = 9, 12, 13, 14

NFTA_TABLE_NAME = 1
NFTA_CHAIN_TABLE, NFTA_CHAIN_NAME, NFTA_CHAIN_HOOK, NFTA_CHAIN_POLICY, NFTA_CHAIN_TYPE = 1, 3, 4, 5, 7
NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY = 1, 2
NF_INET_PRE_ROUTING, NF_INET_LOCAL_IN, NF_INET_FORWARD, NF_INET_LOCAL_OUT, NF_INET_POST_ROUTING = 0, 1, 2, 3, 4
NF_IP_PRI_RAW, NF_IP_PRI_MANGLE, NF_IP_PRI_NAT_DST, NF_IP_PRI_FILTER, NF_IP_PRI_NAT_SRC = -300, -150, -100, 0, 100
NF_DROP, NF_ACCEPT = 0, 1
NFTA_RULE_TABLE, NFTA_RULE_CHAIN, NFTA_RULE_EXPRESSIONS = 1, 2, 4
NFTA_LIST_ELEM = 1
NFTA_EXPR_NAME, NFTA_EXPR_DATA = 1, 2

NFT_REG_VERDICT, NFT_REG_1, NFT_REG32_00 = 0, 1, 8
NFTA_META_DREG, NFTA_META_KEY, NFTA_META_SREG = 1, 2, 3
NFT_META_MARK, NFT_META_IIFNAME, NFT_META_OIFNAME, NFT_META_NFPROTO, NFT_META_L4PROTO = 3, 6, 7, 15, 16
NFTA_PAYLOAD_DREG, NFTA_PAYLOAD_BASE, NFTA_PAYLOAD_OFFSET, NFTA_PAYLOAD_LEN = 1, 2, 3, 4
NFT_PAYLOAD_NETWORK_HEADER, NFT_PAYLOAD_TRANSPORT_HEADER = 1, 2
NFTA_BITWISE_SREG, NFTA_BITWISE_DREG, NFTA_BITWISE_LEN, NFTA_BITWISE_MASK, NFTA_BITWISE_XOR = 1, 2, 3, 4, 5
NFTA_CMP_SREG, NFTA_CMP_OP, NFTA_CMP_DATA, NFT_CMP_EQ, NFT_CMP_NEQ = 1, 2, 3, 0, 1
NFTA_CT_DREG, NFTA_CT_KEY, NFT_CT_STATE, NFT_CT_STATUS = 1, 2, 0, 2
ESTABLISHED_OR_RELATED, IPS_DST_NAT = 0x2 | 0x4, 0x20
NFTA_REJECT_TYPE, NFTA_REJECT_ICMP_CODE, NFT_REJECT_ICMPX_UNREACH, NFT_REJECT_ICMPX_ADMIN_PROHIBITED = 1, 2, 2, 3
NFTA_DATA_VALUE, NFTA_DATA_VERDICT = 1, 2
NFTA_MASQ_FLAGS, NF_NAT_RANGE_PROTO_RANDOM_FULLY = 1, 1 << 4
NFTA_NAT_TYPE, NFTA_NAT_FAMILY, NFTA_NAT_REG_ADDR_MIN, NFTA_NAT_REG_PROTO_MIN, NFT_NAT_DNAT = 1, 2, 3, 5, 1
NFTA_LOOKUP_SET, NFTA_LOOKUP_SREG, NFTA_LOOKUP_DREG = 1, 2, 3
NFTA_FIB_DREG, NFTA_FIB_RESULT, NFTA_FIB_FLAGS, NFT_FIB_RESULT_ADDRTYPE, NFTA_FIB_F_DADDR = 1, 2, 3, 3, 2
NFTA_IMMEDIATE_DREG, NFTA_IMMEDIATE_DATA = 1, 2
NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN, NFT_JUMP = 1, 2, -3
NFTA_SET_TABLE, NFTA_SET_NAME, NFTA_SET_FLAGS, NFTA_SET_KEY_TYPE, NFTA_SET_KEY_LEN = 1, 2, 3, 4, 5
NFTA_SET_DATA_TYPE, NFTA_SET_DATA_LEN, NFTA_SET_ID, NFT_SET_MAP = 6, 7, 10, 0x8
NFTA_SET_ELEM_LIST_TABLE, NFTA_SET_ELEM_LIST_SET, NFTA_SET_ELEM_LIST_ELEMENTS = 1, 2, 3
NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_DATA = 1, 2

# What nft(8) calls the types of keys; the kernel does not look at them, but whoever lists the table does. One of several parts has 6 bits for each.
TYPE_IPV4_ADDR, TYPE_IPV6_ADDR, TYPE_INET_PROTO, TYPE_INET_SERVICE = 7, 8, 12, 13

RTN_LOCAL = 2
IFNAMSIZ = 16
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33  # not in Python's socket
BUFFER = 32 << 20  # bytes; every port of both families in one send takes some 10 MB
ELEMENTS_IN_MESSAGE = 500  # a list of them is an attribute, which has 64 kB
NEEDS = "the kernel needs nf_tables with inet, nat, masq and fib, and this process CAP_NET_ADMIN"


def be32(kind: int, value: int) -> bytes:
    """An attribute that is a number; nf_tables wants them in network order."""
    return attribute(kind, BE32.pack(value & 0xFFFFFFFF))


def value(kind: int, data: bytes) -> bytes:
    """An attribute that is data to compare with, to put in a register or into a map."""
    return nested(kind, attribute(NFTA_DATA_VALUE, data))


def expression(name: str, *data: bytes) -> bytes:
    """One step of a rule."""
    return nested(NFTA_LIST_ELEM, text(NFTA_EXPR_NAME, name), nested(NFTA_EXPR_DATA, *data))


def compare(data: bytes, *, equal: bool = True) -> bytes:
    """Go on with the rule only if register 1 is equal to the data, or is not."""
    operator = NFT_CMP_EQ if equal else NFT_CMP_NEQ
    return expression("cmp", be32(NFTA_CMP_SREG, NFT_REG_1), be32(NFTA_CMP_OP, operator), value(NFTA_CMP_DATA, data))


def connection(key: int, bits: int, *, some: bool = True) -> bytes:
    """Of the bits of what is tracked about the packet's connection, some are set, or none is."""
    load = expression("ct", be32(NFTA_CT_KEY, key), be32(NFTA_CT_DREG, NFT_REG_1))
    return load + bitwise(MARK.pack(bits), bytes(4)) + compare(bytes(4), equal=not some)


def reject() -> bytes:
    """The packet is refused, and its sender told that this is by rule."""
    code = attribute(NFTA_REJECT_ICMP_CODE, bytes([NFT_REJECT_ICMPX_ADMIN_PROHIBITED]))
    return expression("reject", be32(NFTA_REJECT_TYPE, NFT_REJECT_ICMPX_UNREACH), code)


def meta(key: int, register: int = NFT_REG_1) -> bytes:
    """Load a fact about the packet."""
    return expression("meta", be32(NFTA_META_DREG, register), be32(NFTA_META_KEY, key))


def payload(base: int, offset: int, length: int, register: int = NFT_REG_1) -> bytes:
    """Load bytes of the packet."""
    return expression(
        "payload",
        be32(NFTA_PAYLOAD_DREG, register),
        be32(NFTA_PAYLOAD_BASE, base),
        be32(NFTA_PAYLOAD_OFFSET, offset),
        be32(NFTA_PAYLOAD_LEN, length),
    )


def bitwise(mask: bytes, xor: bytes) -> bytes:
    """register 1 = register 1 & mask ^ xor."""
    return expression(
        "bitwise",
        be32(NFTA_BITWISE_SREG, NFT_REG_1),
        be32(NFTA_BITWISE_DREG, NFT_REG_1),
        be32(NFTA_BITWISE_LEN, len(mask)),
        value(NFTA_BITWISE_MASK, mask),
        value(NFTA_BITWISE_XOR, xor),
    )


def interface(key: int, name: str) -> bytes:
    """The packet came in, or goes out, by the link of this name."""
    return meta(key) + compare(name.encode().ljust(IFNAMSIZ, b"\0"))


def set_mark_bit(bit: int) -> bytes:
    """Set a bit of the packet's mark and leave the others alone."""
    put = expression("meta", be32(NFTA_META_KEY, NFT_META_MARK), be32(NFTA_META_SREG, NFT_REG_1))
    return meta(NFT_META_MARK) + bitwise(MARK.pack(~bit & 0xFFFFFFFF), MARK.pack(bit)) + put


def has_mark_bit(bit: int) -> bytes:
    """The bit of the packet's mark is set."""
    return meta(NFT_META_MARK) + bitwise(MARK.pack(bit), bytes(4)) + compare(MARK.pack(bit))


def destination_is_local() -> bytes:
    """The packet's destination is an address of the node's."""
    fib = expression(
        "fib",
        be32(NFTA_FIB_DREG, NFT_REG_1),
        be32(NFTA_FIB_RESULT, NFT_FIB_RESULT_ADDRTYPE),
        be32(NFTA_FIB_FLAGS, NFTA_FIB_F_DADDR),
    )
    return fib + compare(MARK.pack(RTN_LOCAL))


def lookup(name: str, *, into: int | None = None) -> bytes:
    """Go on only if the key in the registers from REG32_00 on is in the map; what it maps to is put `into` the registers from there on."""
    found = be32(NFTA_LOOKUP_DREG, into) if into is not None else b""
    return expression("lookup", text(NFTA_LOOKUP_SET, name), be32(NFTA_LOOKUP_SREG, NFT_REG32_00), found)


def verdict(code: int, chain: str = "") -> bytes:
    """The rule's last word: NF_DROP, or NFT_JUMP to a chain."""
    words = be32(NFTA_VERDICT_CODE, code) + (text(NFTA_VERDICT_CHAIN, chain) if chain else b"")
    data = nested(NFTA_IMMEDIATE_DATA, nested(NFTA_DATA_VERDICT, words))
    return expression("immediate", be32(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT), data)


def masquerade() -> bytes:
    """The packet takes the address of the link it leaves by.

    fully-random: choosing source ports in order makes two connections that begin at once race for one port, and lose a packet.
    """
    return expression("masq", be32(NFTA_MASQ_FLAGS, NF_NAT_RANGE_PROTO_RANDOM_FULLY))


def redirect(family: int, address: int, port: int) -> bytes:
    """The packet goes to the address and port in these registers instead (dnat)."""
    return expression(
        "nat",
        be32(NFTA_NAT_TYPE, NFT_NAT_DNAT),
        be32(NFTA_NAT_FAMILY, family),
        be32(NFTA_NAT_REG_ADDR_MIN, address),
        be32(NFTA_NAT_REG_PROTO_MIN, port),
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


def new_table(name: str) -> Message:
    """Make the table if it is not there."""
    return message(f"make nftables table {name}", NFT_MSG_NEWTABLE, NLM_F_CREATE, text(NFTA_TABLE_NAME, name))


def list_rules(table: str) -> Message:
    """Ask for the rules of all chains of the table; none where there is no such table."""
    return message(
        f"list the rules of nftables table {table}", NFT_MSG_GETRULE, NLM_F_DUMP, text(NFTA_RULE_TABLE, table)
    )


def list_elements(table: str, name: str) -> Message:
    """Ask for what is in a map; ENOENT where there is no such map."""
    names = text(NFTA_SET_ELEM_LIST_TABLE, table) + text(NFTA_SET_ELEM_LIST_SET, name)
    return message(f"list map {name} in nftables table {table}", NFT_MSG_GETSETELEM, NLM_F_DUMP, names)


def read_elements(body: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The entries (key, data) of one part of such a list. Raises ValueError where it is malformed."""
    listed = attributes(body, GENERIC.size).get(NFTA_SET_ELEM_LIST_ELEMENTS, b"")
    for item in members(listed):
        found = attributes(item)
        key, data = (
            attributes(found.get(kind, b"")).get(NFTA_DATA_VALUE, b"")
            for kind in (NFTA_SET_ELEM_KEY, NFTA_SET_ELEM_DATA)
        )
        yield key, data


def delete_table(name: str) -> Message:
    """Delete the table with all that is in it."""
    return message(f"delete nftables table {name}", NFT_MSG_DELTABLE, 0, text(NFTA_TABLE_NAME, name))


def new_chain(table: str, name: str, kind: str = "", hook: int = 0, priority: int = 0) -> Message:
    """Make a chain: one that is jumped to, or of this kind ("nat", "filter") on a hook, with the policy to accept."""
    base = b""
    if kind:
        base = nested(NFTA_CHAIN_HOOK, be32(NFTA_HOOK_HOOKNUM, hook), be32(NFTA_HOOK_PRIORITY, priority))
        base += be32(NFTA_CHAIN_POLICY, NF_ACCEPT) + text(NFTA_CHAIN_TYPE, kind)
    names = text(NFTA_CHAIN_TABLE, table) + text(NFTA_CHAIN_NAME, name)
    return message(f"make chain {name} in nftables table {table}", NFT_MSG_NEWCHAIN, NLM_F_CREATE, names, base)


def new_rule(table: str, chain: str, *expressions: bytes) -> Message:
    """Append a rule to a chain."""
    return message(
        f"add a rule to chain {chain} in nftables table {table}",
        NFT_MSG_NEWRULE,
        NLM_F_CREATE | NLM_F_APPEND,
        text(NFTA_RULE_TABLE, table),
        text(NFTA_RULE_CHAIN, chain),
        nested(NFTA_RULE_EXPRESSIONS, *expressions),
    )


def count_rules(messages: Iterable[Message]) -> int:
    """How many rules a transaction adds."""
    return sum(item.type == NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWRULE for item in messages)


def concatenated(types: Sequence[int]) -> int:
    """The type of a key of several parts."""
    joined = 0
    for part in types:
        joined = joined << 6 | part
    return joined


def new_map(
    table: str, name: str, number: int, key: tuple[Sequence[int], int], data: tuple[Sequence[int], int]
) -> Message:
    """Make a map; `key` and `data` are the types of their parts and their length in bytes. `number` tells it apart in the transaction."""
    return message(
        f"make map {name} in nftables table {table}",
        NFT_MSG_NEWSET,
        NLM_F_CREATE,
        text(NFTA_SET_TABLE, table),
        text(NFTA_SET_NAME, name),
        be32(NFTA_SET_FLAGS, NFT_SET_MAP),
        be32(NFTA_SET_KEY_TYPE, concatenated(key[0])),
        be32(NFTA_SET_KEY_LEN, key[1]),
        be32(NFTA_SET_DATA_TYPE, concatenated(data[0])),
        be32(NFTA_SET_DATA_LEN, data[1]),
        be32(NFTA_SET_ID, number),
    )


def elements(table: str, name: str, entries: Iterable[tuple[bytes, bytes]], *, add: bool) -> Iterator[Message]:
    """Put the entries (key, data) into a map, or take them out of it."""
    packed = [
        nested(NFTA_LIST_ELEM, value(NFTA_SET_ELEM_KEY, key), value(NFTA_SET_ELEM_DATA, data)) for key, data in entries
    ]
    kind, flags = (NFT_MSG_NEWSETELEM, NLM_F_CREATE) if add else (NFT_MSG_DELSETELEM, 0)
    names = text(NFTA_SET_ELEM_LIST_TABLE, table) + text(NFTA_SET_ELEM_LIST_SET, name)
    doing = f"{'add to' if add else 'remove from'} map {name} in nftables table {table}"
    for start in range(0, len(packed), ELEMENTS_IN_MESSAGE):
        some = packed[start : start + ELEMENTS_IN_MESSAGE]
        yield message(doing, kind, flags, names, nested(NFTA_SET_ELEM_LIST_ELEMENTS, *some))


def connect() -> socket.socket:
    """A socket for transactions, in the network namespace of this thread.

    To be kept: when one is closed the kernel first finishes what earlier transactions have left to be freed, which takes it 10 ms.
    """
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER)
    # A transaction is one send, which the kernel refuses (EMSGSIZE) where it is longer than the socket's buffer, 200 kB by default.
    with contextlib.suppress(
        PermissionError
    ):  # without CAP_NET_ADMIN there are no transactions, and the first of them says so
        for option in (SO_SNDBUFFORCE, SO_RCVBUFFORCE):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    return sock


def run(netlink: Netlink, messages: Sequence[Message]) -> None:
    """Do a transaction. Raises NetlinkError."""
    try:
        netlink.run(messages)
    except NetlinkError as error:
        raise NetlinkError(error.doing, error.errno, error.text, hint=NEEDS) from error


def apply(messages: Sequence[Message]) -> None:
    """Do a transaction in the network namespace of this thread, on a socket of its own. Raises NetlinkError."""
    with connect() as sock:
        run(Netlink(sock), messages)
