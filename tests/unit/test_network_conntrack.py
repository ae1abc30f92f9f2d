"""A tracked flow's bytes, made as the kernel makes them, and read."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from tare.network import conntrack
from tare.network.netlink import attribute, attributes, nested
from tare.network.nft import GENERIC
from tare.network.rtnetlink import Address


def tuple_of(source: Address, destination: Address) -> bytes:
    """CTA_TUPLE_IP of these."""
    kinds = (conntrack.CTA_IP_V4_SRC, conntrack.CTA_IP_V4_DST)
    if source.version == 6:
        kinds = (conntrack.CTA_IP_V6_SRC, conntrack.CTA_IP_V6_DST)
    both = (attribute(kind, item.packed) for kind, item in zip(kinds, (source, destination), strict=True))
    return nested(conntrack.CTA_TUPLE_IP, *both)


@pytest.mark.parametrize("texts", [("192.0.2.1", "192.0.2.2", "10.85.0.2"), ("2001:db8::1", "2001:db8::2", "fd00::2")])
def test_a_flow_says_where_it_goes_and_who_answers_and_its_name_is_its_own_tuple(texts: tuple[str, str, str]) -> None:
    client, node, pod = map(ipaddress.ip_address, texts)
    original = nested(conntrack.CTA_TUPLE_ORIG, tuple_of(client, node))
    number = attribute(conntrack.CTA_ID, b"\1\2\3\4")
    body = GENERIC.pack(socket.AF_INET, 0, 0) + original
    body += nested(conntrack.CTA_TUPLE_REPLY, tuple_of(pod, client)) + number
    flow = conntrack.read_flow(body)
    assert (flow.destination, flow.answers) == (node, pod)
    assert flow.name == original + number


def test_what_is_no_flow_is_an_error() -> None:
    whole = GENERIC.pack(socket.AF_INET, 0, 0) + nested(conntrack.CTA_TUPLE_ORIG, b"")
    for body in (b"", whole, whole[:-1], GENERIC.pack(0, 0, 0) + b"\xff" * 8):
        with pytest.raises(ValueError, match=r"netlink|address"):
            conntrack.read_flow(body)


def test_only_the_flows_to_the_port_are_asked_for() -> None:
    message = conntrack.list_flows(socket.AF_INET6, 53)
    found = attributes(message.body, GENERIC.size)
    assert set(found) == {conntrack.CTA_TUPLE_ORIG, conntrack.CTA_FILTER}
    protocol = attributes(attributes(found[conntrack.CTA_TUPLE_ORIG])[conntrack.CTA_TUPLE_PROTO])
    assert protocol == {conntrack.CTA_PROTO_NUM: b"\x11", conntrack.CTA_PROTO_DST_PORT: b"\0\x35"}
