"""Our table of nf_tables, compared with what `nft` itself makes of the same table."""

from __future__ import annotations

import errno
import ipaddress
import json
import subprocess
from typing import Any

import pytest

from tare.network import firewall, nft
from tare.network.netlink import NetlinkError, text
from tests.support.netns import on_its_own_node, sh

pytestmark = pytest.mark.root
SUBNET4, SUBNET6 = ipaddress.IPv4Network("10.99.16.0/20"), ipaddress.IPv6Network("fd00:99::/64")
REDIRECTS = (
    firewall.Redirect(protocol="tcp", host=None, port=8080, target=ipaddress.IPv4Address("10.99.16.2"), target_port=80),
    firewall.Redirect(
        protocol="sctp",
        host=ipaddress.IPv6Address("2001:db8::1"),
        port=9,
        target=ipaddress.IPv6Address("fd00:99::2"),
        target_port=10,
    ),
)
TABLE = firewall.Table(
    "tare-test0", "br-test", (SUBNET4, SUBNET6), REDIRECTS, ("br-one", "br-two"), frozenset({"link-local", "node"})
)
WANTED = """
table inet tare-test0 {
    map any4 { type inet_proto . inet_service : ipv4_addr . inet_service; elements = { tcp . 8080 : 10.99.16.2 . 80 } }
    map exact4 { type ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service; }
    map any6 { type inet_proto . inet_service : ipv6_addr . inet_service; }
    map exact6 {
        type ipv6_addr . inet_proto . inet_service : ipv6_addr . inet_service
        elements = { 2001:db8::1 . sctp . 9 : fd00:99::2 . 10 }
    }
    chain guard {
        type filter hook prerouting priority raw; policy accept;
        iifname "br-test" ip daddr 127.0.0.0/8 drop
        iifname "br-test" ip saddr 127.0.0.0/8 drop
    }
    chain prerouting {
        type nat hook prerouting priority dstnat; policy accept;
        ip daddr 127.0.0.0/8 accept
        fib daddr type local jump hostports
    }
    chain output {
        type nat hook output priority -100; policy accept;
        ip6 daddr ::1 accept
        fib daddr type local jump hostports
    }
    chain hostports {
        ip saddr 10.99.16.0/20 meta mark set meta mark | 0x2000
        dnat ip to ip daddr . meta l4proto . th dport map @exact4
        dnat ip to meta l4proto . th dport map @any4
        ip6 saddr fd00:99::/64 meta mark set meta mark | 0x2000
        dnat ip6 to ip6 daddr . meta l4proto . th dport map @exact6
        dnat ip6 to meta l4proto . th dport map @any6
    }
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr 10.99.16.0/20 ip daddr != 10.99.16.0/20 ip daddr != 224.0.0.0/4 masquerade fully-random
        ip6 saddr fd00:99::/64 ip6 daddr != fd00:99::/64 ip6 daddr != ff00::/8 masquerade fully-random
        oifname "br-test" meta mark & 0x2000 == 0x2000 masquerade fully-random
        oifname "br-test" ip saddr 127.0.0.0/8 masquerade fully-random
    }
    chain forward {
        type filter hook forward priority filter; policy accept;
        iifname "br-test" oifname "br-one" ct status & dnat == 0 reject with icmpx admin-prohibited
        iifname "br-test" oifname "br-two" ct status & dnat == 0 reject with icmpx admin-prohibited
    }
    chain links {
        type filter hook prerouting priority mangle; policy accept;
        iifname "br-test" ct state established,related accept
        iifname "br-test" ip daddr 169.254.0.0/16 reject with icmpx admin-prohibited
        iifname "br-test" ip6 daddr fe80::/10 meta l4proto != ipv6-icmp reject with icmpx admin-prohibited
    }
    chain node {
        type filter hook input priority filter; policy accept;
        iifname "br-test" ct state established,related accept
        iifname "br-test" meta l4proto != ipv6-icmp reject with icmpx admin-prohibited
    }
}
"""


def ruleset() -> list[dict[str, Any]]:
    """Everything that nft lists, without handles, which count up."""
    found: list[dict[str, Any]] = json.loads(sh("nft -j list ruleset"))["nftables"]
    for item in found:
        for content in item.values():
            content.pop("handle", None)
    return [item for item in found if "metainfo" not in item]


@on_its_own_node
def test_the_table_is_the_one_that_nft_would_make() -> None:
    subprocess.run(["nft", "-f", "-"], input=WANTED, text=True, check=True)
    by_nft, text = ruleset(), sh("nft list ruleset")
    sh("nft flush ruleset")
    nft.apply(firewall.replace(TABLE))
    assert ruleset() == by_nft
    assert sh("nft list ruleset") == text
    kinds = [next(iter(item)) for item in by_nft]
    assert {kind: kinds.count(kind) for kind in kinds} == {"table": 1, "map": 4, "chain": 8, "rule": 23}


@on_its_own_node
@pytest.mark.parametrize("subnet", ["10.0.0.0/8", "10.85.0.0/16", "10.200.16.0/20", "192.168.5.128/25", "10.1.2.4/30"])
def test_every_prefix_length_reads_back(subnet: str) -> None:
    nft.apply(firewall.replace(firewall.Table("tare-test0", "br-test", (ipaddress.IPv4Network(subnet),))))
    assert f"ip saddr {subnet} ip daddr != {subnet} ip daddr != 224.0.0.0/4" in sh("nft list ruleset")


@on_its_own_node
def test_replacing_twice_is_the_same_as_once_and_touches_nothing_else() -> None:
    sh("nft add table inet other")
    nft.apply(firewall.replace(TABLE))
    once = ruleset()
    nft.apply(firewall.replace(TABLE))
    assert ruleset() == once
    nft.apply(firewall.replace(firewall.Table("tare-test1", "br-test", (SUBNET4,))))
    nft.apply(firewall.remove("tare-test0"))
    assert sh("nft list tables").splitlines() == ["table inet other", "table inet tare-test1"]


@on_its_own_node
def test_removing_a_table_that_is_not_there_is_nothing() -> None:
    nft.apply(firewall.remove("tare-test0"))
    assert ruleset() == []


@on_its_own_node
def test_a_transaction_that_fails_leaves_the_table_as_it_was() -> None:
    nft.apply(firewall.replace(TABLE))
    before = ruleset()
    *changes, end = firewall.replace(firewall.Table("tare-test0", "br-test", (ipaddress.IPv4Network("10.1.0.0/16"),)))
    misfit = nft.message("add a rule to no chain", nft.NFT_MSG_NEWRULE, 0, text(nft.NFTA_RULE_TABLE, "tare-test0"))
    with pytest.raises(NetlinkError, match="add a rule to no chain") as caught:
        nft.apply([*changes, misfit, end])
    assert caught.value.errno == errno.EINVAL
    assert caught.value.hint == nft.NEEDS
    assert ruleset() == before
