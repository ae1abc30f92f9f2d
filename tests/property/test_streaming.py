"""The streaming protocols over anything a client may send: the same events however it is cut, and no error but their own."""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from tare.streaming import channels, remote, spdy
from tare.streaming.spdy_headers import DICTIONARY, HeaderError, Packer, Unpacker

names = st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=12)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
headers = st.dictionaries(names, texts, max_size=8)


def control(kind: int, payload: bytes, flags: int = 0) -> bytes:
    return struct.pack(">HHI", 0x8003, kind, flags << 24 | len(payload)) + payload


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """What a client that keeps to the protocol says."""
    deflate = zlib.compressobj(zdict=DICTIONARY)
    said, streams = b"", [1]
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(("open", "data", "data", "ping", "reset", "headers")))
        stream = draw(st.sampled_from(streams))
        if kind == "open" or stream == 1:
            number = streams[-1] + 2
            streams.append(number)
            given_headers = draw(headers)
            plain = struct.pack(">I", len(given_headers))
            for name, value in given_headers.items():
                for word in (name.encode(), value.encode()):
                    plain += struct.pack(">I", len(word)) + word
            block = deflate.compress(plain) + deflate.flush(zlib.Z_SYNC_FLUSH)
            said += control(spdy.SYN_STREAM, struct.pack(">IIH", number, 0, 0) + block, draw(st.integers(0, 1)))
        elif kind == "data":
            payload = draw(st.binary(max_size=300))
            said += struct.pack(">II", stream, draw(st.integers(0, 1)) << 24 | len(payload)) + payload
        elif kind == "ping":
            said += control(spdy.PING, struct.pack(">I", draw(st.integers(0, 9))))
        else:
            said += control(spdy.RST_STREAM, struct.pack(">II", stream, 5))
    return said


def heard(pieces: Sequence[bytes]) -> tuple[list[object], dict[int, bytes], bytes]:
    """Events without data, data by stream, and what is answered."""
    server = spdy.Connection()
    others: list[object] = []
    data: dict[int, bytes] = {}
    for piece in pieces:
        for event in server.receive(piece):
            if isinstance(event, spdy.Data):
                data[event.stream] = data.get(event.stream, b"") + event.data
                if event.fin:
                    others.append(("fin", event.stream))
            else:
                others.append(event)
    return others, data, server.output()


@given(conversations(), st.data())
def test_every_cut_of_a_conversation_means_the_same(said: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(said)), max_size=8)))
    pieces = [said[start:end] for start, end in zip([0, *cuts], [*cuts, len(said)], strict=True)]
    assert heard(pieces) == heard([said])


@given(conversations(), st.data())
def test_damaged_conversations_end_in_no_other_way(said: bytes, data: st.DataObject) -> None:
    damaged = bytearray(said)
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    server = spdy.Connection()
    with contextlib.suppress(spdy.SpdyError):
        server.receive(bytes(damaged))
    server.output()


@given(st.binary(max_size=400))
def test_any_bytes_are_taken_or_refused(said: bytes) -> None:
    server = spdy.Connection()
    with contextlib.suppress(spdy.SpdyError):
        server.receive(said)
    assert server.open_streams() <= len(said)


@given(st.binary(max_size=200))
def test_any_header_block_is_taken_or_refused(block: bytes) -> None:
    with contextlib.suppress(HeaderError):
        Unpacker().unpack(block)
    packed = zlib.compressobj(zdict=DICTIONARY)
    with contextlib.suppress(HeaderError):
        Unpacker().unpack(packed.compress(block) + packed.flush(zlib.Z_SYNC_FLUSH))


@given(st.lists(headers, max_size=5))
def test_header_blocks_come_back(blocks: list[dict[str, str]]) -> None:
    packer, unpacker = Packer(), Unpacker()
    assert [unpacker.unpack(packer.pack(block)) for block in blocks] == blocks


@given(st.sampled_from(channels.PROTOCOLS), st.integers(0, 4), st.binary(max_size=100))
def test_channels_come_back(protocol: str, channel: int, data: bytes) -> None:
    assert channels.read(protocol, channels.write(protocol, channel, data)) == channels.Piece(channel, data)


@given(st.sampled_from(channels.PROTOCOLS), st.binary(max_size=50) | st.text(max_size=50))
def test_any_message_is_taken_or_refused(protocol: str, message: bytes | str) -> None:
    with contextlib.suppress(channels.ChannelError):
        channels.read(protocol, message)


@given(st.binary(max_size=6000), st.integers(1, 100))
def test_any_bytes_of_a_resize_stream_are_taken_or_refused(said: bytes, step: int) -> None:
    sizes = remote.Sizes()
    with contextlib.suppress(ValueError):
        for at in range(0, len(said), step):
            for size in sizes.feed(said[at : at + step]):
                assert 0 < size.width <= remote.MAX_SIZE
