"""What holds for every input: netlink's framing, the turn of addresses, the choice of a subnet, the files' lines."""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tare.errors import FailedPrecondition, InvalidArgument
from tare.network import netlink, nft, rtnetlink, shaping, subnets
from tare.network.addresses import capacity, choose
from tare.network.files import resolv_conf
from tare.network.netlink import Message

messages = st.lists(
    st.builds(Message, st.just("x"), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.binary(max_size=64)), max_size=5
)
networks = st.builds(
    lambda address, prefix: ipaddress.IPv4Network((address, prefix), strict=False),
    st.integers(0, 2**32 - 1),
    st.integers(4, 32),
)
addresses = st.builds(ipaddress.IPv4Address, st.integers(0, 2**32 - 1)) | st.builds(
    ipaddress.IPv6Address, st.integers(0, 2**128 - 1)
)


@given(st.dictionaries(st.integers(0, netlink.NLA_TYPE_MASK), st.binary(max_size=40)), st.binary(max_size=9))
def test_attributes_come_back(wanted: dict[int, bytes], before: bytes) -> None:
    data = before + b"".join(netlink.attribute(kind, value) for kind, value in wanted.items())
    assert netlink.attributes(data, len(before)) == wanted
    assert netlink.attributes(netlink.nested(1, data[len(before) :])[4:]) == wanted


@given(messages, st.integers(0, 2**31))
def test_messages_come_back(wanted: list[Message], first: int) -> None:
    got = list(netlink.decode(netlink.encode(wanted, first)))
    assert [(m.type, m.flags | 1, m.body) for m in wanted] == [(r.type, r.flags, r.body) for r in got]
    assert [r.sequence for r in got] == list(range(first, first + len(wanted)))


@given(
    st.lists(st.tuples(st.binary(min_size=1, max_size=40), st.binary(min_size=1, max_size=40)), min_size=1, max_size=9)
)
def test_entries_of_a_map_come_back(entries: list[tuple[bytes, bytes]]) -> None:
    """What is put into a map is laid out as the kernel lays out what it lists of one."""
    (message,) = nft.elements("tare-test0", "any4", entries, add=True)
    assert list(nft.read_elements(message.body)) == entries


@given(st.integers(0, 2**31 - 1), st.integers(1, 2**40))
def test_a_rate_comes_back(index: int, rate: int) -> None:
    assert shaping.read_rate(shaping.limit_rate(index, "eth0", rate).body) == (index, rate)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    readers: list[Callable[[bytes], object]] = [
        netlink.attributes,
        rtnetlink.read_link,
        rtnetlink.read_address,
        rtnetlink.read_route,
        shaping.read_rate,
        lambda d: list(nft.read_elements(d)),
        lambda d: [netlink.verdict(r) for r in netlink.decode(d)],
    ]
    for reader in readers:
        with contextlib.suppress(ValueError):
            reader(data)


@given(st.integers(1, 2**31 - 1), addresses, st.data())
def test_an_address_message_reads_back(index: int, address: rtnetlink.Address, data: st.DataObject) -> None:
    interface = ipaddress.ip_interface((address, data.draw(st.integers(0, address.max_prefixlen))))
    read = rtnetlink.read_address(rtnetlink.add_address(index, interface).body)
    assert read == rtnetlink.LinkAddress(index=index, interface=interface)


@given(st.integers(1, 2**31 - 1), addresses)
def test_a_route_message_reads_back(index: int, gateway: rtnetlink.Address) -> None:
    read = rtnetlink.read_route(rtnetlink.add_default_route(index, gateway).body)
    assert (read.index, read.gateway, read.destination.prefixlen, read.table) == (index, gateway, 0, 254)
    assert read.destination.version == gateway.version


@given(
    st.integers(22, 30),
    st.sets(st.integers(0, 1023)),
    st.dictionaries(st.integers(0, 1023), st.integers(0, 100)),
    st.integers(0, 1023),
)
def test_an_address_is_free_of_the_subnet_and_never_resting_without_need(
    prefix: int, taken: set[int], rest: dict[int, int], last: int
) -> None:
    subnet = ipaddress.IPv4Network(("10.9.0.0", prefix))
    size = subnet.num_addresses
    held = {str(subnet[n % size]) for n in taken}
    resting = {str(subnet[2 + n % capacity(subnet)]): when for n, when in rest.items()}
    usable = {str(subnet[n]) for n in range(2, size - 1)}
    chosen = choose(subnet, held, resting, str(subnet[2 + last % capacity(subnet)]))
    fresh = usable - held - resting.keys()
    if fresh:
        assert chosen in fresh
    elif usable - held:
        assert chosen in usable - held
        assert resting[chosen] == min(resting[address] for address in resting.keys() - held)
    else:
        assert chosen is None


@given(st.lists(networks, max_size=8), st.text(min_size=1, max_size=8), st.booleans(), st.none() | networks)
def test_a_chosen_subnet_never_overlaps_what_is_there(
    there: list[ipaddress.IPv4Network], run: str, in_use: bool, remembered: ipaddress.IPv4Network | None
) -> None:
    occupied = [subnets.Occupied(network, "x") for network in there]
    try:
        chosen = subnets.choose_subnet("", Path("/somewhere", run), remembered, occupied, in_use)
    except FailedPrecondition:
        return
    assert not any(network.overlaps(chosen) for network in there)
    assert chosen == remembered or not (in_use and remembered)


@given(st.text(max_size=12), st.text(max_size=12))
def test_no_word_adds_a_line_to_resolv_conf(search: str, option: str) -> None:
    try:
        text = resolv_conf(("10.0.0.1",), (search,), (option,), "")
    except InvalidArgument:
        return
    assert [line.split()[0] for line in text.splitlines()] == ["search", "nameserver", "options"]
    assert text.split() == ["search", search, "nameserver", "10.0.0.1", "options", option]


@pytest.mark.parametrize("value", [0, 1, 2**32 - 1])
def test_numbers_come_back(value: int) -> None:
    assert netlink.number(netlink.attributes(netlink.u32(1, value))[1]) == value
