"""Traffic control: a pod's rates, held at the node's end of its veth alone, where nothing in the pod can lift them. Pure.

    to the pod      node ─► [bucket] tare0123456789a ─► eth0
    from the pod    eth0 ─► tare0123456789a ─ingress─► [bucket] tarb0123456789a ─► back, as if it had just come in ─► bridge

What a link receives cannot be held back, only dropped, so it is led through a device of the kernel's that is there for that (ifb): what that
"sends" waits in a bucket and then goes on where it was taken from. Source: tc(8), tc-tbf(8), tc-u32(8), tc-mirred(8);
include/uapi/linux/pkt_sched.h, pkt_cls.h, tc_act/tc_mirred.h.
"""

from __future__ import annotations

import struct

from tare.network.netlink import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    Message,
    attribute,
    attributes,
    nested,
    string,
    text,
    u32,
)
from tare.network.rtnetlink import IFLA_IFNAME, IFLA_INFO_KIND, IFLA_LINKINFO, RTM_NEWLINK, link_header

RTM_NEWQDISC, RTM_GETQDISC, RTM_NEWTFILTER = 36, 38, 44
TRAFFIC = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info
BUCKET = struct.Struct(
    "=BBHhHI12xIII"
)  # of a rate: cell_log, link layer, overhead, alignment, mpu, rate; no peak rate; limit, buffer, mtu
SELECTOR = struct.Struct(
    "=BBBxHHhhIIIii"
)  # flags, shift, keys, mask, offset, twice an offset, mask of a hash; of one key: mask, value, offset, its mask
MIRRED = struct.Struct("=IIiiiiI")  # index, capabilities, verdict, two counts of users; what to do, the link

TCA_KIND, TCA_OPTIONS, TCA_TBF_PARMS, TCA_TBF_RATE64, TCA_TBF_BURST = 1, 2, 1, 4, 6
TCA_U32_SEL, TCA_U32_ACT, TCA_ACT_KIND, TCA_ACT_OPTIONS, TCA_MIRRED_PARMS = 5, 7, 1, 2, 2
TC_H_ROOT, TC_H_INGRESS, INGRESS_HANDLE = 0xFFFFFFFF, 0xFFFFFFF1, 0xFFFF0000
TC_LINKLAYER_ETHERNET = 1
TC_U32_TERMINAL, TC_ACT_STOLEN, TCA_EGRESS_REDIR = 1, 4, 1
PRIORITY, ALL_PROTOCOLS = 1, 0x0300  # ETH_P_ALL in network order
MAX_U32 = 0xFFFFFFFF
NEEDS = "the kernel needs ifb, sch_tbf, sch_ingress, cls_u32 and act_mirred to hold pods to their rates"


def bucket_name(pod_id: str) -> str:
    """What the device is called through which what a pod sends is led."""
    return f"tarb{pod_id[:11]}"


def add_ifb(name: str) -> Message:
    """Make such a device."""
    body = link_header() + text(IFLA_IFNAME, name) + nested(IFLA_LINKINFO, text(IFLA_INFO_KIND, "ifb"))
    return Message(f"make link {name} for what the pod sends", RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body)


def limit_rate(index: int, name: str, rate: int) -> Message:
    """Let a link send no more than `rate` bytes a second (a token bucket): 5 ms of it at once, and another 50 ms wait in its queue.

    Both are at least what one large segment takes, which the kernel hands to a link as one packet of 64 kB.
    """
    burst = min(max(rate // 200, 1 << 16), MAX_U32)
    limit = min(burst + max(rate // 20, 1 << 16), MAX_U32)
    rate32 = min(rate, MAX_U32)
    options = attribute(TCA_TBF_PARMS, BUCKET.pack(0, TC_LINKLAYER_ETHERNET, 0, 0, 0, rate32, limit, 0, 0)) + u32(
        TCA_TBF_BURST, burst
    )
    if rate > MAX_U32:
        options += attribute(TCA_TBF_RATE64, struct.pack("=Q", rate))
    body = TRAFFIC.pack(0, index, 0, TC_H_ROOT, 0) + text(TCA_KIND, "tbf") + nested(TCA_OPTIONS, options)
    return Message(f"limit {name} to {rate} bytes a second", RTM_NEWQDISC, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body)


def lead_through(index: int, name: str, bucket: int) -> list[Message]:
    """Lead all that a link receives through the link `bucket`."""
    flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
    inwards = TRAFFIC.pack(0, index, INGRESS_HANDLE, TC_H_INGRESS, 0) + text(TCA_KIND, "ingress")
    everything = SELECTOR.pack(TC_U32_TERMINAL, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    parameters = attribute(TCA_MIRRED_PARMS, MIRRED.pack(0, 0, TC_ACT_STOLEN, 0, 0, TCA_EGRESS_REDIR, bucket))
    action = nested(1, text(TCA_ACT_KIND, "mirred"), nested(TCA_ACT_OPTIONS, parameters))
    rule = TRAFFIC.pack(0, index, 0, INGRESS_HANDLE, PRIORITY << 16 | ALL_PROTOCOLS) + text(TCA_KIND, "u32")
    rule += nested(TCA_OPTIONS, attribute(TCA_U32_SEL, everything), nested(TCA_U32_ACT, action))
    return [
        Message(f"look at what {name} receives", RTM_NEWQDISC, flags, inwards),
        Message(f"lead what {name} receives through a bucket", RTM_NEWTFILTER, flags, rule),
    ]


def list_buckets(index: int, name: str) -> Message:
    """Ask how a link queues what it sends."""
    return Message(f"look how {name} sends", RTM_GETQDISC, NLM_F_ACK | NLM_F_DUMP, TRAFFIC.pack(0, index, 0, 0, 0))


def read_rate(body: bytes) -> tuple[int, int]:
    """(index of the link, bytes a second to which a bucket holds it) of one of the answers; 0 for what is no bucket. Raises ValueError."""
    if len(body) < TRAFFIC.size:
        raise ValueError(f"rtnetlink message of {len(body)} bytes")
    index = TRAFFIC.unpack_from(body)[1]
    found = attributes(body, TRAFFIC.size)
    if string(found.get(TCA_KIND, b"")) != "tbf":
        return index, 0
    options = attributes(found.get(TCA_OPTIONS, b""))
    if TCA_TBF_RATE64 in options:
        return index, int(struct.unpack("=Q", options[TCA_TBF_RATE64])[0])
    parameters = options.get(TCA_TBF_PARMS, b"")
    if len(parameters) < BUCKET.size:
        raise ValueError(f"parameters of a bucket of {len(parameters)} bytes")
    return index, int(BUCKET.unpack_from(parameters)[5])
