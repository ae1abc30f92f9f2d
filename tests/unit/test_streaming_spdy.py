"""SPDY framing: what comes in becomes events, whatever way it is cut; what is wrong ends the connection with a word."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Mapping

import pytest

from tare.streaming import spdy
from tare.streaming.spdy import Connection, Data, Event, GoneAway, Opened, Reset, SpdyError
from tare.streaming.spdy_headers import DICTIONARY, MAX_BLOCK, HeaderError, Packer, Unpacker


class Client:
    """Makes frames."""

    def __init__(self) -> None:
        self.deflate = zlib.compressobj(zdict=DICTIONARY)

    def block(self, headers: Mapping[str, str]) -> bytes:
        plain = struct.pack(">I", len(headers))
        for name, value in headers.items():
            for word in (name.encode(), value.encode()):
                plain += struct.pack(">I", len(word)) + word
        return self.deflate.compress(plain) + self.deflate.flush(zlib.Z_SYNC_FLUSH)

    def open(self, stream: int, flags: int = 0, **headers: str) -> bytes:
        return control(spdy.SYN_STREAM, struct.pack(">IIH", stream, 0, 0) + self.block(headers), flags)


def control(kind: int, payload: bytes, flags: int = 0, version: int = 3) -> bytes:
    return struct.pack(">HHI", 0x8000 | version, kind, flags << 24 | len(payload)) + payload


def data(stream: int, payload: bytes, flags: int = 0) -> bytes:
    return struct.pack(">II", stream, flags << 24 | len(payload)) + payload


def joined(events: list[Event]) -> dict[int, bytes]:
    """All data by stream."""
    found: dict[int, bytes] = {}
    for event in events:
        if isinstance(event, Data):
            found[event.stream] = found.get(event.stream, b"") + event.data
    return found


def test_the_dictionary_is_the_specifications() -> None:
    assert len(DICTIONARY) == 1423
    assert hashlib.sha256(DICTIONARY).hexdigest() == "51d27341373f923f3cd88e1eb7162aeaa3723d7585ff2399201dc06498407f02"


def test_a_stream_from_first_to_last() -> None:
    client, server = Client(), Connection()
    events = server.receive(client.open(1, streamtype="stdin") + data(1, b"hello ") + data(1, b"world", spdy.FIN))
    assert events == [
        Opened(1, {"streamtype": "stdin"}, False),
        Data(1, b"hello ", False),
        Data(1, b"world", True),
    ]
    server.accept(1)
    server.send(1, b"bye", fin=True)
    reply = server.output()
    assert struct.unpack(">HH", reply[:4]) == (0x8003, spdy.SYN_REPLY)
    assert reply.endswith(data(1, b"bye", spdy.FIN))
    assert server.open_streams() == 0


def test_every_cut_gives_the_same_events() -> None:
    client = Client()
    whole = (
        client.open(1, streamtype="error") + client.open(3, spdy.FIN, streamtype="data", port="80") + data(1, b"x" * 50)
    )
    whole += control(spdy.PING, struct.pack(">I", 7)) + control(spdy.GOAWAY, bytes(8))
    expected = Connection().receive(whole)
    for cut in range(1, len(whole)):
        server = Connection()
        events = server.receive(whole[:cut]) + server.receive(whole[cut:])
        assert [event for event in events if not isinstance(event, Data)] == [
            event for event in expected if not isinstance(event, Data)
        ]
        assert joined(events) == joined(expected)


def test_both_halves_close_by_themselves() -> None:
    client, server = Client(), Connection()
    server.receive(client.open(1, spdy.FIN))
    server.send(1, b"still here")
    assert server.output().endswith(b"still here")
    assert server.open_streams() == 1
    server.send(1, b"", fin=True)
    assert server.open_streams() == 0
    server.send(1, b"nobody hears this")
    assert b"nobody" not in server.output()


def test_a_long_write_is_cut_into_frames_that_leave_room_for_others() -> None:
    client, server = Client(), Connection()
    server.receive(client.open(1))
    server.send(1, bytes(100_000), fin=True)
    out = server.output()
    sizes = []
    while out:
        length = int.from_bytes(out[5:8], "big")
        sizes.append((length, out[4]))
        out = out[8 + length :]
    assert sizes == [(65536, 0), (34464, 1)]


def test_a_ping_is_answered_and_an_answer_is_not() -> None:
    server = Connection()
    ping = control(spdy.PING, struct.pack(">I", 5))
    server.receive(ping + control(spdy.PING, struct.pack(">I", 4)))
    assert server.output() == ping


def test_reset_ends_a_stream_and_later_data_is_dropped() -> None:
    client, server = Client(), Connection()
    server.receive(client.open(1))
    assert server.receive(control(spdy.RST_STREAM, struct.pack(">II", 1, 5))) == [Reset(1, 5)]
    assert server.receive(data(1, b"late")) == []
    server.receive(client.open(3))
    server.reset(3)
    assert server.output().endswith(control(spdy.RST_STREAM, struct.pack(">II", 3, spdy.CANCEL)))
    assert server.receive(data(3, b"under way")) == []


def test_consumed_bytes_widen_the_window_of_who_keeps_one() -> None:
    client, server = Client(), Connection()
    server.receive(client.open(1) + data(1, bytes(40_000)))
    server.consumed(1, 20_000)
    assert server.output() == b""
    server.consumed(1, 20_000)
    assert server.output() == control(spdy.WINDOW_UPDATE, struct.pack(">II", 1, 40_000))


def test_streams_beyond_the_most_are_refused_one_by_one() -> None:
    client, server = Client(), Connection(max_streams=2)
    events = server.receive(client.open(1) + client.open(3) + client.open(5, name="value") + data(1, b"on"))
    assert [type(event) for event in events] == [Opened, Opened, Data]
    assert server.output() == control(spdy.RST_STREAM, struct.pack(">II", 5, spdy.REFUSED_STREAM))


def test_going_away_is_told() -> None:
    assert Connection().receive(control(spdy.GOAWAY, bytes(8))) == [GoneAway()]


@pytest.mark.parametrize(
    "wrong",
    [
        control(spdy.PING, bytes(4), version=2),
        control(77, b""),
        control(spdy.PING, b"\0"),
        control(spdy.SYN_STREAM, bytes(10)),
        control(spdy.SYN_STREAM, struct.pack(">IIH", 2, 0, 0) + Client().block({})),
        control(spdy.SYN_STREAM, struct.pack(">IIH", 1, 0, 0) + b"no zlib"),
        data(9, b"on a stream that was never opened"),
        struct.pack(">HHI", 0x8003, spdy.HEADERS, 1 << 20),
    ],
)
def test_what_is_no_spdy_ends_the_connection_with_a_word(wrong: bytes) -> None:
    server = Connection()
    with pytest.raises(SpdyError):
        server.receive(wrong)
    assert server.output()[:4] == struct.pack(">HH", 0x8003, spdy.GOAWAY)
    assert server.receive(b"anything") == []


def test_stream_numbers_must_rise() -> None:
    client, server = Client(), Connection()
    server.receive(client.open(5))
    with pytest.raises(SpdyError, match="rise"):
        server.receive(client.open(3))


def test_a_header_block_that_unpacks_to_megabytes_is_not_unpacked() -> None:
    bomb = zlib.compressobj(9, zdict=DICTIONARY)
    block = bomb.compress(bytes(64 << 20)) + bomb.flush(zlib.Z_SYNC_FLUSH)
    assert len(block) < 1 << 17
    with pytest.raises(HeaderError, match=str(MAX_BLOCK)):
        Unpacker().unpack(block)


@pytest.mark.parametrize(
    "plain",
    [
        struct.pack(">I", 1),
        struct.pack(">I", 1 << 20),
        struct.pack(">II", 1, 9) + b"short",
        struct.pack(">III", 1, 0, 0),
        struct.pack(">II", 1, 1) + b"A" + struct.pack(">I", 0),
        struct.pack(">II", 1, 1) + b"\xff" + struct.pack(">I", 0),
        struct.pack(">I", 0) + b"more",
    ],
)
def test_header_blocks_that_are_none(plain: bytes) -> None:
    packer = zlib.compressobj(zdict=DICTIONARY)
    with pytest.raises(HeaderError):
        Unpacker().unpack(packer.compress(plain) + packer.flush(zlib.Z_SYNC_FLUSH))


def test_blocks_of_one_direction_share_their_compression() -> None:
    packer, unpacker = Packer(), Unpacker()
    blocks = [packer.pack({"Port": "8080", "requestID": str(number)}) for number in range(3)]
    assert [unpacker.unpack(block) for block in blocks] == [{"port": "8080", "requestid": str(n)} for n in range(3)]
    assert len(blocks[2]) < len(blocks[0])
