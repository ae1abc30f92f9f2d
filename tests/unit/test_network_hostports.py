"""Which host ports clash, and what leads where."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from typing import NoReturn

import pytest

from tare.errors import InvalidArgument
from tare.network import attach, nft, publishing
from tare.network.hostports import MOST_PORTS, Port, check, clash, redirects
from tare.network.rtnetlink import Address, Link

BOTH: list[Address] = [ipaddress.IPv4Address("10.85.0.2"), ipaddress.IPv6Address("fd00::2")]


def port(host_ip: str = "", host_port: int = 80, protocol: str = "tcp", container_port: int = 8080) -> Port:
    return Port(protocol=protocol, host_port=host_port, container_port=container_port, host_ip=host_ip)


@pytest.mark.parametrize(
    ("one", "other", "clashing"),
    [
        ("", "", True),
        ("", "192.0.2.1", True),
        ("", "2001:db8::1", True),
        ("0.0.0.0", "192.0.2.1", True),
        ("0.0.0.0", "2001:db8::1", False),
        ("0.0.0.0", "::", False),
        ("::", "2001:db8::1", True),
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
        ("2001:db8::1", "2001:DB8:0::1", True),
    ],
)
def test_ports_clash_where_one_packet_may_be_meant_for_both(one: str, other: str, clashing: bool) -> None:
    assert clash(port(one), port(other)) is clash(port(other), port(one)) is clashing
    assert not clash(port(one), port(other, protocol="udp"))
    assert not clash(port(one), port(other, host_port=81))


@pytest.mark.parametrize(
    ("host_ip", "found"),
    [
        ("", [(None, BOTH[0]), (None, BOTH[1])]),
        ("0.0.0.0", [(None, BOTH[0])]),
        ("::", [(None, BOTH[1])]),
        ("192.0.2.1", [(ipaddress.IPv4Address("192.0.2.1"), BOTH[0])]),
        ("2001:db8::1", [(ipaddress.IPv6Address("2001:db8::1"), BOTH[1])]),
    ],
)
def test_a_port_leads_to_the_pods_address_of_the_same_family(host_ip: str, found: list[tuple[object, object]]) -> None:
    got = redirects(port(host_ip), BOTH)
    assert [(item.host, item.target) for item in got] == found
    assert {(item.protocol, item.port, item.target_port) for item in got} == {("tcp", 80, 8080)}


def test_a_pod_has_a_bound_of_ports() -> None:
    wanted = [port("192.0.2.1", number) for number in range(1, MOST_PORTS + 1)]
    assert check([*wanted, *wanted]) == wanted
    with pytest.raises(InvalidArgument, match=r"host port 1/udp: a pod may have 1000 host ports"):
        check([*wanted, port("", 1, "udp")])


def test_what_is_done_by_and_by_says_that_descriptors_ran_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for these threads, so nobody else would."""

    def exhausted() -> NoReturn:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(nft, "connect", exhausted)
    monkeypatch.setattr(attach, "node", exhausted)
    publishing.forget([(socket.AF_INET, 80)], lambda flow: True)
    attach.remove_link(Link(index=1, name="tare0", kind="", master=0, mtu=1500, address="", alias="", up=True))
    assert [record.message for record in caplog.records] == ["Too many open files"] * 2


def test_an_address_of_a_family_that_pods_have_not_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"no address of this family.*subnet6"):
        redirects(port("::"), BOTH[:1])
    assert len(redirects(port(""), BOTH[:1])) == 1


def test_what_a_pod_asks_for_twice_is_had_once_unless_it_contradicts_itself() -> None:
    assert check([port(), port(), port(protocol="udp")]) == [port(), port(protocol="udp")]
    with pytest.raises(InvalidArgument, match="twice"):
        check([port(), port("192.0.2.1")])
    with pytest.raises(InvalidArgument, match="container's port is missing"):
        check([port(container_port=0)])
    with pytest.raises(InvalidArgument, match=r"::1.*127\.0\.0\.1"):
        check([port("::1")])
