"""Connections that the kernel tracks, forgotten where a UDP port has moved: a flow keeps the way that its first packet took for as long as
packets come, so that a client which never falls silent would go on sending to a pod that is gone, or to the node where a pod should answer.

    message:  nfgenmsg │ CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID …
    tuple:    CTA_TUPLE_IP { source, destination } │ CTA_TUPLE_PROTO { number, source port, destination port }

The kernel looks through its table and lists only flows to the ports asked for. Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from errno import ENOENT

from tare.network.netlink import NLM_F_ACK, NLM_F_DUMP, Message, Netlink, NetlinkError, attribute, attributes, nested
from tare.network.nft import GENERIC
from tare.network.rtnetlink import Address

NFNL_SUBSYS_CTNETLINK = 1
IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE = 1, 2
CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_ID, CTA_FILTER = 1, 2, 12, 25
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_V4_SRC, CTA_IP_V4_DST, CTA_IP_V6_SRC, CTA_IP_V6_DST = 1, 2, 3, 4
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
CTA_FILTER_ORIG_FLAGS, CTA_FILTER_REPLY_FLAGS = 1, 2
BY_PROTOCOL, BY_DESTINATION_PORT = 1 << 3, 1 << 5  # bits of CTA_FILTER_ORIG_FLAGS
PORT = struct.Struct(">H")


@dataclass(frozen=True, slots=True)
class Flow:
    """A tracked flow: where its first packet was addressed to, who answers it, and the bytes that name it to the kernel."""

    destination: Address
    answers: Address
    name: bytes


def read_flow(body: bytes) -> Flow:
    """One of a list's. Raises ValueError where it is malformed."""
    found = attributes(body, GENERIC.size)
    original, reply = found.get(CTA_TUPLE_ORIG, b""), found.get(CTA_TUPLE_REPLY, b"")
    there = attributes(attributes(original).get(CTA_TUPLE_IP, b""))
    back = attributes(attributes(reply).get(CTA_TUPLE_IP, b""))
    name = nested(CTA_TUPLE_ORIG, original)
    if CTA_ID in found:  # or another flow that has begun meanwhile would go
        name += attribute(CTA_ID, found[CTA_ID])
    return Flow(
        ipaddress.ip_address(there.get(CTA_IP_V4_DST) or there.get(CTA_IP_V6_DST, b"")),
        ipaddress.ip_address(back.get(CTA_IP_V4_SRC) or back.get(CTA_IP_V6_SRC, b"")),
        name,
    )


def list_flows(family: int, port: int) -> Message:
    """Ask for the UDP flows of a family whose first packet was addressed to the port."""
    protocol = attribute(CTA_PROTO_NUM, bytes([socket.IPPROTO_UDP])) + attribute(CTA_PROTO_DST_PORT, PORT.pack(port))
    wanted = struct.pack("=I", BY_PROTOCOL | BY_DESTINATION_PORT)
    by = nested(CTA_FILTER, attribute(CTA_FILTER_ORIG_FLAGS, wanted), attribute(CTA_FILTER_REPLY_FLAGS, bytes(4)))
    body = GENERIC.pack(family, 0, 0) + nested(CTA_TUPLE_ORIG, nested(CTA_TUPLE_PROTO, protocol)) + by
    kind = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_GET
    return Message(f"list the UDP flows to port {port}", kind, NLM_F_ACK | NLM_F_DUMP, body)


def delete_flow(family: int, flow: Flow) -> Message:
    """Forget a flow: its next packet is looked at as a first one."""
    kind = NFNL_SUBSYS_CTNETLINK << 8 | IPCTNL_MSG_CT_DELETE
    return Message(f"forget a UDP flow to {flow.destination}", kind, NLM_F_ACK, GENERIC.pack(family, 0, 0) + flow.name)


def forget(netlink: Netlink, ports: Iterable[tuple[int, int]], chosen: Callable[[Flow], bool]) -> int:
    """Forget those UDP flows to the ports (family, port) that are chosen; how many there were. Raises NetlinkError, ValueError."""
    count = 0
    for family, port in ports:
        for flow in map(read_flow, netlink.ask(list_flows(family, port))):
            if not chosen(flow):
                continue
            try:
                netlink.run([delete_flow(family, flow)])
            except NetlinkError as error:
                if error.errno != ENOENT:  # it has ended meanwhile
                    raise
            count += 1
    return count
