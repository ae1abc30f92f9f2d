"""Our nf_tables messages, compared with what `nft` itself makes of the same table."""

from __future__ import annotations

import errno
import ipaddress
import json
import subprocess
from typing import Any

import pytest

from tare.network import nft
from tare.network.netlink import NetlinkError, text
from tests.support.netns import on_its_own_node, sh

pytestmark = pytest.mark.root
TABLE = nft.Table("tare-test0", ipaddress.IPv4Network("10.99.16.0/20"))
WANTED = """
table inet tare-test0 {
    chain postrouting {
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr 10.99.16.0/20 ip daddr != 10.99.16.0/20 ip daddr != 224.0.0.0/4 masquerade fully-random
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
    nft.apply(nft.replace(TABLE))
    assert ruleset() == by_nft
    assert sh("nft list ruleset") == text
    assert [next(iter(item)) for item in by_nft] == ["table", "chain", "rule"]


@on_its_own_node
@pytest.mark.parametrize("subnet", ["10.0.0.0/8", "10.85.0.0/16", "10.200.16.0/20", "192.168.5.128/25", "10.1.2.4/30"])
def test_every_prefix_length_reads_back(subnet: str) -> None:
    nft.apply(nft.replace(nft.Table("tare-test0", ipaddress.IPv4Network(subnet))))
    assert f"ip saddr {subnet} ip daddr != {subnet} ip daddr != 224.0.0.0/4" in sh("nft list ruleset")


@on_its_own_node
def test_replacing_twice_is_the_same_as_once_and_touches_nothing_else() -> None:
    sh("nft add table inet other")
    nft.apply(nft.replace(TABLE))
    once = ruleset()
    nft.apply(nft.replace(TABLE))
    assert ruleset() == once
    nft.apply(nft.replace(nft.Table("tare-test1", TABLE.masquerade)))
    nft.apply(nft.remove("tare-test0"))
    assert sh("nft list tables").splitlines() == ["table inet other", "table inet tare-test1"]


@on_its_own_node
def test_removing_a_table_that_is_not_there_is_nothing() -> None:
    nft.apply(nft.remove("tare-test0"))
    assert ruleset() == []


@on_its_own_node
def test_a_transaction_that_fails_leaves_the_table_as_it_was() -> None:
    nft.apply(nft.replace(TABLE))
    before = ruleset()
    *changes, end = nft.replace(nft.Table("tare-test0", ipaddress.IPv4Network("10.1.0.0/16")))
    misfit = nft.message("add a rule to no chain", nft.NFT_MSG_NEWRULE, 0, text(nft.NFTA_RULE_TABLE, "tare-test0"))
    with pytest.raises(NetlinkError, match="add a rule to no chain") as caught:
        nft.apply([*changes, misfit, end])
    assert caught.value.errno == errno.EINVAL
    assert caught.value.hint == nft.NEEDS
    assert ruleset() == before
