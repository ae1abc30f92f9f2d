"""Whose a link is, and what the host around the bridge says."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from tare.errors import FailedPrecondition
from tare.network import bridge, rtnetlink, sysctl
from tare.network.bridge import Host
from tare.network.rtnetlink import Link, LinkAddress, Route

RUN = Path("/run/tare")
POD = "0123456789abcdef" * 4


def link(index: int, name: str, kind: str = "", alias: str = "", mtu: int = 1500) -> Link:
    return Link(index=index, name=name, kind=kind, master=0, mtu=mtu, address="", alias=alias, up=True)


def route(
    destination: str, index: int, *, metric: int = 0, table: int = 254, kind: int = rtnetlink.RTN_UNICAST
) -> Route:
    network = ipaddress.ip_network(destination)
    return Route(destination=network, gateway=None, index=index, table=table, type=kind, metric=metric)


def address(index: int, interface: str) -> LinkAddress:
    return LinkAddress(index=index, interface=ipaddress.ip_interface(interface))


def test_a_pods_link_says_whose_it_is() -> None:
    name = bridge.pod_link_name(POD)
    assert name == "tare0123456789a" and len(name) == rtnetlink.MAX_NAME
    ours = link(5, name, "veth", bridge.pod_mark(RUN, POD))
    assert bridge.pod_of(RUN, ours) == POD
    assert bridge.pod_of(Path("/run/tare2"), ours) is None
    assert bridge.pod_of(RUN, link(5, name, "veth")) is None
    assert bridge.pod_of(RUN, link(5, name, "veth", bridge.mark(RUN))) is None
    assert bridge.pod_of(RUN, link(5, name, "bridge", bridge.pod_mark(RUN, POD))) is None
    spaced = Path("/run/with a space")
    assert bridge.pod_of(spaced, link(5, name, "veth", bridge.pod_mark(spaced, POD))) == POD


def test_a_mark_fits_whatever_the_directory() -> None:
    assert len(bridge.pod_mark(Path("/" + "x" * 300), POD)) <= rtnetlink.MAX_ALIAS


def test_a_mac_goes_with_its_address() -> None:
    assert bridge.mac_of(ipaddress.IPv4Address("10.85.1.254")) == "0a:58:0a:55:01:fe"


def test_occupied_are_others_routes_and_addresses_but_not_ours_nor_the_default_routes() -> None:
    host = Host(
        (link(1, "lo"), link(2, "eth0"), link(3, "tare0", "bridge")),
        (address(2, "192.0.2.2/24"), address(3, "10.85.0.1/16")),
        (
            route("0.0.0.0/0", 2),
            route("192.0.2.0/24", 2),
            route("10.85.0.0/16", 3),
            route("10.70.0.0/16", 0, kind=6),
            route("10.71.0.0/16", 2, table=300),
            route("127.0.0.0/8", 1, table=255, kind=rtnetlink.RTN_LOCAL),
        ),
    )
    assert [(str(o.network), o.where) for o in bridge.occupied(host, "tare0")] == [
        ("192.0.2.2/32", "address 192.0.2.2/24 on eth0"),
        ("192.0.2.0/24", "route 192.0.2.0/24 on eth0"),
        ("10.70.0.0/16", "route 10.70.0.0/16 on several links"),
        ("10.71.0.0/16", "route 10.71.0.0/16 on eth0"),
    ]


def test_the_uplink_is_the_link_of_the_best_default_route() -> None:
    links = (link(2, "eth0", mtu=1400), link(3, "wlan0", mtu=1300), link(4, "six", mtu=1280))
    v4, v4_worse = route("0.0.0.0/0", 2, metric=100), route("0.0.0.0/0", 3, metric=600)
    v6, elsewhere = route("::/0", 4), route("0.0.0.0/0", 3, table=300)
    assert bridge.uplink_mtu(Host(links, (), (v6, elsewhere, v4_worse, v4))) == 1400
    assert bridge.uplink_mtu(Host(links, (), (v6, elsewhere))) == 1280
    assert bridge.uplink_mtu(Host(links, (), ())) == 1500


def test_a_setting_that_is_right_already_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysctl, "ROOT", tmp_path)
    file = tmp_path / "net" / "x"
    file.parent.mkdir()
    file.write_text("1\n")
    sysctl.ensure("1", "net", "x")
    assert file.read_text() == "1\n"
    sysctl.ensure("0", "net", "x")
    assert file.read_text() == "0"
    with pytest.raises(FailedPrecondition, match=r"set net/y=1: No such file.*try: sysctl -w net/y=1"):
        sysctl.ensure("1", "net", "y")
