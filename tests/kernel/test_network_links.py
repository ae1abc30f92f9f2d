"""Our rtnetlink against the kernel, with iproute2 as the one who says what came of it."""

from __future__ import annotations

import errno
import ipaddress
import socket

import pytest

from tare.network import rtnetlink
from tare.network.attach import node
from tare.network.bridge import find_link, look
from tare.network.netlink import Message, Netlink, NetlinkError
from tests.support.netns import Namespace, ip, on_its_own_node, sh

pytestmark = pytest.mark.root


@on_its_own_node
def test_bridge_address_and_link_are_as_iproute2_sees_them() -> None:
    gateway = ipaddress.IPv4Interface("10.9.0.1/16")
    with node() as netlink:
        netlink.run(
            [
                rtnetlink.add_bridge("br0", mac="02:00:00:00:00:07", mtu=1400),
                rtnetlink.set_link("br0", alias="ours", up=True),
            ]
        )
        link = find_link(netlink, "br0")
        assert link is not None
        netlink.run([rtnetlink.add_address(link.index, gateway)])
    (seen,) = ip("addr show dev br0")
    assert (
        (seen["ifindex"], seen["mtu"], seen["address"])
        == (link.index, 1400, "02:00:00:00:00:07")
        == (
            link.index,
            link.mtu,
            link.address,
        )
    )
    assert seen["linkinfo"]["info_kind"] == link.kind == "bridge"
    assert seen["ifalias"] == link.alias == "ours"
    (address,) = [a for a in seen["addr_info"] if a["family"] == "inet"]
    assert (address["local"], address["prefixlen"], address["broadcast"]) == ("10.9.0.1", 16, "10.9.255.255")


@on_its_own_node
def test_veth_has_its_peer_in_the_other_namespace() -> None:
    with Namespace() as pod, node() as netlink:
        sh("ip link add br0 type bridge")
        master = find_link(netlink, "br0")
        assert master is not None
        netlink.run(
            [
                rtnetlink.add_veth("v0", mtu=1300, peer="eth0", peer_mac="0a:58:0a:09:00:02", netns=pod.fd),
                rtnetlink.set_link("v0", master=master.index, up=True, ipv6=False),
                rtnetlink.set_bridge_port("v0", hairpin=True),
            ]
        )
        (port,) = ip("link show dev v0")
        (peer,) = pod.ip("link show dev eth0")
        link = find_link(netlink, "v0")
        assert link is not None and link.master == master.index
        assert port["master"] == "br0" and port["inet6_addr_gen_mode"] == "none"
        assert port["linkinfo"]["info_slave_data"]["hairpin"] is True
        assert (peer["address"], peer["mtu"], port["mtu"]) == ("0a:58:0a:09:00:02", 1300, 1300)
        netlink.run([rtnetlink.delete_link(link.index, "v0")])
        assert [seen["ifname"] for seen in pod.ip("link show")] == ["lo"]


@on_its_own_node
def test_routes_and_addresses_are_listed_as_iproute2_lists_them() -> None:
    sh("ip link add br0 type bridge")
    sh("ip addr add 10.9.0.1/16 dev br0")
    sh("ip link set br0 up")
    sh("ip route add 192.0.2.0/24 via 10.9.0.2 metric 7")
    sh("ip route add 198.51.100.0/24 dev br0 table 300")
    sh("ip route add blackhole 203.0.113.0/24")
    sh("ip -6 route add 2001:db8::/64 dev br0")
    with node() as netlink:
        netlink.run([rtnetlink.add_default_route(2, ipaddress.ip_address("10.9.0.9"))])
        host = look(netlink)
    seen = {(route["dst"], route.get("gateway"), route.get("metric", 0)) for route in ip("-4 route show table all")}
    seen |= {(route["dst"], route.get("gateway"), route.get("metric", 0)) for route in ip("-6 route show table all")}
    ours = {
        (
            "default" if not r.destination.prefixlen else str(r.destination).removesuffix("/32").removesuffix("/128"),
            str(r.gateway) if r.gateway else None,
            r.metric,
        )
        for r in host.routes
    }
    assert ours == seen
    assert [r.table for r in host.routes if str(r.destination) == "198.51.100.0/24"] == [300]
    addresses = {f"{a['local']}/{a['prefixlen']}" for link in ip("addr show") for a in link["addr_info"]}
    assert {str(address.interface) for address in host.addresses} == addresses
    assert {link.name for link in host.links} == {link["ifname"] for link in ip("link show")}


@on_its_own_node
def test_links_can_be_listed_by_kind_with_many_of_them() -> None:
    with Namespace() as pod, node() as netlink:
        for number in range(150):
            peer = rtnetlink.add_veth(
                f"v{number}", mtu=1500, peer=f"p{number}", peer_mac="0a:58:0a:09:00:02", netns=pod.fd
            )
            netlink.run([peer])
        veths = [rtnetlink.read_link(body) for body in netlink.ask(rtnetlink.list_links("veth"))]
        assert sorted(link.name for link in veths) == sorted(f"v{number}" for number in range(150))
        assert {link.kind for link in veths} == {"veth"}


@on_its_own_node
def test_an_address_can_be_taken_away() -> None:
    with node() as netlink:
        netlink.run([rtnetlink.add_address(1, ipaddress.ip_interface("10.7.7.7/24"))])
        netlink.run([rtnetlink.add_address(1, ipaddress.ip_interface("2001:db8::7/64"))])
        assert {"10.7.7.7", "2001:db8::7"} <= {a["local"] for a in ip("addr show dev lo")[0]["addr_info"]}
        netlink.run([rtnetlink.delete_address(1, ipaddress.ip_interface("10.7.7.7/24"))])
        assert "10.7.7.7" not in {a["local"] for a in ip("addr show dev lo")[0]["addr_info"]}


@on_its_own_node
def test_an_error_says_what_was_done_and_has_the_kernels_own_words() -> None:
    with node() as netlink:
        with pytest.raises(
            NetlinkError, match=r"make bridge br0: Invalid argument: mtu greater than device maximum"
        ) as caught:
            netlink.run([rtnetlink.add_bridge("br0", mac="02:00:00:00:00:07", mtu=1_000_000)])
        assert caught.value.errno == errno.EINVAL
        assert find_link(netlink, "br0") is None


@on_its_own_node
def test_a_batch_tells_of_its_first_failure_and_the_socket_goes_on() -> None:
    with node() as netlink:
        bridge = rtnetlink.add_bridge("br0", mac="02:00:00:00:00:07", mtu=1500)
        with pytest.raises(NetlinkError, match=r"^make bridge br0: File exists") as caught:
            netlink.run([bridge, bridge, rtnetlink.set_link("nosuch", up=True)])
        assert caught.value.errno == errno.EEXIST
        with pytest.raises(NetlinkError, match="configure link nosuch: No such device"):
            netlink.run([rtnetlink.set_link("nosuch", up=True)])
        assert find_link(netlink, "br0") is not None


@on_its_own_node
def test_a_message_that_the_kernel_does_not_know_is_an_error_too() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        netlink = Netlink(sock)
        with pytest.raises(NetlinkError, match="ask for nonsense: Operation not supported"):
            netlink.run([Message("ask for nonsense", 9999, 4, bytes(16))])
        assert find_link(netlink, "lo") is not None
