"""Which bridge and which subnet an instance gets."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest

from tare.errors import FailedPrecondition, InvalidArgument
from tare.network import subnets
from tare.network.subnets import CANDIDATES, DEFAULT_RUN, DEFAULT_SUBNET, Occupied, bridge_name, choose_subnet

ELSEWHERE = Path("/somewhere/run")


def taken(*networks: str) -> list[Occupied]:
    """Ranges that the host uses."""
    return [Occupied(ipaddress.ip_network(network), f"route {network} on eth0") for network in networks]


def test_the_usual_instance() -> None:
    assert bridge_name("", DEFAULT_RUN) == "tare0"
    assert choose_subnet("", DEFAULT_RUN, None, [], False) == DEFAULT_SUBNET


def test_another_instance_has_a_name_of_its_own_that_stays() -> None:
    name = bridge_name("", ELSEWHERE)
    assert name == bridge_name("", ELSEWHERE) != bridge_name("", Path("/other/run"))
    assert name.startswith("tare-") and len(name) == 15


@pytest.mark.parametrize("name", ["a" * 16, "a/b", "a b", "..", "x%d", "ü" * 8, "a:1", "a\n"])
def test_a_bridge_name_that_the_kernel_would_not_take(name: str) -> None:
    with pytest.raises(InvalidArgument, match="bridge"):
        bridge_name(name, DEFAULT_RUN)
    assert bridge_name("br-pods.7", DEFAULT_RUN) == "br-pods.7"


@pytest.mark.parametrize(
    "subnet",
    [
        "",
        "10.0.0.0",
        "10.85.0.1/16",
        "10.0.0.0/31",
        "fd00::/64",
        "224.0.0.0/8",
        "127.0.0.0/8",
        "pods",
        "0.0.0.0/0",
        "0.0.0.0/8",
        "240.0.0.0/8",
    ],
)
def test_a_subnet_that_cannot_be(subnet: str) -> None:
    with pytest.raises(InvalidArgument, match=r"\[network\] subnet"):
        subnets.parse_subnet(subnet)


def test_what_lies_within_the_configured_subnet_forbids_it_and_what_is_wider_does_not() -> None:
    wide = taken("10.0.0.0/8", "fd00::/8", "192.168.0.0/16")
    assert str(choose_subnet("10.50.0.0/16", ELSEWHERE, None, wide, False)) == "10.50.0.0/16"
    with pytest.raises(FailedPrecondition, match=r"10\.50\.7\.0/24 is in use: route 10\.50\.7\.0/24 on eth0"):
        choose_subnet("10.50.0.0/16", ELSEWHERE, None, taken("10.50.7.0/24"), False)
    with pytest.raises(FailedPrecondition, match=r"10\.85\.0\.0/16 is in use"):
        choose_subnet("", DEFAULT_RUN, None, taken("10.85.0.0/16"), False)


def test_the_first_free_candidate_is_chosen_and_kept() -> None:
    first = choose_subnet("", ELSEWHERE, None, [], False)
    assert first.prefixlen == 20 and any(first.subnet_of(area) for area in CANDIDATES)
    second = choose_subnet("", ELSEWHERE, None, taken(str(first)), False)
    assert second == list(subnets.candidates(ELSEWHERE))[1]
    assert choose_subnet("", ELSEWHERE, second, [], False) == second
    assert choose_subnet("", ELSEWHERE, second, taken(str(second)), False) == first


def test_a_kept_subnet_that_is_taken_while_pods_are_on_it_is_an_error() -> None:
    kept = choose_subnet("", ELSEWHERE, None, [], False)
    with pytest.raises(FailedPrecondition, match="is in use"):
        choose_subnet("", ELSEWHERE, kept, taken(str(kept)), True)


def test_pods_hold_the_subnet_where_it_is() -> None:
    kept = ipaddress.IPv4Network("10.60.0.0/16")
    with pytest.raises(FailedPrecondition, match=r"pods still hold addresses of 10\.60\.0\.0/16"):
        choose_subnet("10.61.0.0/16", ELSEWHERE, kept, [], True)
    assert str(choose_subnet("10.61.0.0/16", ELSEWHERE, kept, [], False)) == "10.61.0.0/16"
    assert choose_subnet("10.60.0.0/16", ELSEWHERE, kept, [], True) == kept


def test_a_host_that_uses_everything_has_to_be_told() -> None:
    everything = taken("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")
    with pytest.raises(FailedPrecondition, match=r"name one: \[network\] subnet"):
        choose_subnet("", ELSEWHERE, None, everything, False)
    third = choose_subnet("", ELSEWHERE, None, everything[:2], False)
    assert third.subnet_of(CANDIDATES[2])


SUBNET, SUBNET6 = ipaddress.IPv4Network("10.99.0.0/24"), ipaddress.IPv6Network("fd00:99::/64")


def test_the_cluster_gives_a_range_of_either_family_in_any_order() -> None:
    assert subnets.given(["fd00:99::/64", "10.99.0.0/24", "10.98.0.0/24"], "", "") == ("10.99.0.0/24", "fd00:99::/64")
    assert subnets.given(["10.99.0.0/24"], "10.99.0.0/24", "fd00::/64") == ("10.99.0.0/24", "")
    with pytest.raises(InvalidArgument, match="needs an IPv4 range"):
        subnets.given(["fd00:99::/64"], "", "")
    with pytest.raises(FailedPrecondition, match=r"settings have pods in fd00:1::/64.*subnet6"):
        subnets.given(["10.99.0.0/24", "fd00:99::/64"], "", "fd00:1::/64")
    with pytest.raises(InvalidArgument, match=r"smaller than 10\.99\.0\.0/24.*/120 or larger"):
        subnets.given(["10.99.0.0/24", "fd00:99::/121"], "", "")


@pytest.mark.parametrize("text", ["fd00::1/64", "ff00::/64", "fe80::/64", "::1/128", "fd00::/121", "10.0.0.0/8", "x"])
def test_an_ipv6_subnet_that_is_no_use(text: str) -> None:
    with pytest.raises(InvalidArgument, match="subnet6"):
        subnets.choose_subnet6(text, SUBNET, None, [], False)


def test_the_ipv6_subnet_is_not_taken_from_others_nor_from_pods() -> None:
    assert subnets.choose_subnet6("", SUBNET, SUBNET6, [], False) is None
    assert subnets.choose_subnet6(str(SUBNET6), SUBNET, None, taken("fd00::/8", "fd01::/64"), True) == SUBNET6
    with pytest.raises(FailedPrecondition, match=r"fd00:99::10/128 is in use: route"):
        subnets.choose_subnet6(str(SUBNET6), SUBNET, None, taken("10.0.0.0/8", "fd00:99::10/128"), False)
    with pytest.raises(FailedPrecondition, match="have pods without IPv6: pods still hold addresses of fd00:99::/64"):
        subnets.choose_subnet6("", SUBNET, SUBNET6, [], True)
