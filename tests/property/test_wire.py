"""Messages between Tare's processes: what is encoded is decoded, and any other bytes are an error of the one kind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tare.launch import wire

FIELDS = st.lists(st.one_of(st.binary(max_size=200), st.integers(-(1 << 63), (1 << 63) - 1)), max_size=20)


@given(kind=st.integers(0, 255), request=st.integers(0, (1 << 32) - 1), fields=FIELDS)
def test_round_trip(kind: int, request: int, fields: list[bytes | int]) -> None:
    assert wire.decode(wire.encode(kind, request, fields)) == (kind, request, fields)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_wire_error(packet: bytes) -> None:
    try:
        kind, request, fields = wire.decode(packet)
    except wire.WireError:
        return
    assert wire.encode(kind, request, fields) == packet


@given(fields=FIELDS, cut=st.integers(1, 40))
def test_a_packet_that_is_cut_is_an_error(fields: list[bytes | int], cut: int) -> None:
    packet = wire.encode(wire.CREATE, 7, fields)
    with pytest.raises(wire.WireError):
        wire.decode(packet[: max(0, len(packet) - cut)])


@given(fields=FIELDS, more=st.binary(min_size=1, max_size=20))
def test_bytes_after_the_last_field_are_an_error(fields: list[bytes | int], more: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode(wire.encode(wire.CREATE, 7, fields) + more)


@given(fields=FIELDS, place=st.integers(0, 5000), bit=st.integers(0, 7))
def test_a_flipped_bit_raises_nothing_else(fields: list[bytes | int], place: int, bit: int) -> None:
    packet = bytearray(wire.encode(wire.EXEC, 1, fields))
    packet[place % len(packet)] ^= 1 << bit
    try:
        wire.decode(bytes(packet))
    except wire.WireError:
        return


@given(st.one_of(st.integers(min_value=1 << 63), st.integers(max_value=-(1 << 63) - 1)))
def test_a_number_that_fits_no_field_is_an_error(number: int) -> None:
    with pytest.raises(wire.WireError):
        wire.encode(wire.OK, 1, (number,))


@pytest.mark.parametrize(
    ("kind", "number", "fields"),
    [(256, 0, ()), (-1, 0, ()), (1, 1 << 32, ()), (1, 0, (b"x" * wire.MAX_PACKET,)), (1, 0, (1,) * 65536)],
)
def test_what_fits_no_packet_is_an_error(kind: int, number: int, fields: tuple[bytes | int, ...]) -> None:
    with pytest.raises(wire.WireError):
        wire.encode(kind, number, fields)


def test_shapes() -> None:
    assert wire.shape((b"a", 1, b"")) == "bib"
    assert wire.bytes_of(b"a") == b"a" and wire.int_of(-3) == -3
    with pytest.raises(wire.WireError):
        wire.bytes_of(1)
    with pytest.raises(wire.WireError):
        wire.int_of(b"1")
