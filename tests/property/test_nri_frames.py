"""NRI's frames: whatever way bytes are cut, what went in comes out, and no bytes do anything but that or be refused."""

from __future__ import annotations

import contextlib
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from tare.nri import frames
from tare.nri.frames import HEADER, LARGEST, BrokenFrame, Message

PAYLOADS = st.binary(max_size=8) | st.builds(
    lambda byte, size: bytes([byte]) * size, st.integers(0, 255), st.integers(0, 9000)
)
MESSAGES = st.lists(
    st.tuples(
        st.sampled_from([frames.TO_PLUGIN, frames.TO_RUNTIME]),
        st.builds(
            Message,
            st.integers(0, 0xFFFFFFFF),
            st.integers(0, 255),
            st.integers(0, 255),
            PAYLOADS,
            st.just(0),
        ),
    ),
    max_size=8,
)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The bytes in parts that end at these places."""
    ends = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in itertools.pairwise(ends)]


def on_the_wire(items: list[tuple[int, Message]]) -> bytes:
    """Messages as a socket has them."""
    parts = (
        frames.frames(stream, frames.message(item.call, item.type, item.payload, item.flags)) for stream, item in items
    )
    return b"".join(itertools.chain.from_iterable(parts))


def taken_apart(parts: list[bytes]) -> list[tuple[int, Message]]:
    """What comes out."""
    socket, streams = frames.Socket(), {1: frames.Stream(), 2: frames.Stream()}
    found = []
    for part in parts:
        for stream, data in socket.feed(part):
            if stream in streams:
                found += [(stream, message) for message in streams[stream].feed(data)]
    return found


@settings(deadline=None)
@given(MESSAGES, st.lists(st.integers(0, 60_000), max_size=12))
def test_what_goes_in_comes_out_however_it_is_cut(items: list[tuple[int, Message]], places: list[int]) -> None:
    assert taken_apart(cut(on_the_wire(items), places)) == items


@settings(deadline=None, max_examples=20)
@given(MESSAGES, st.integers(1, 300), st.lists(st.integers(0, 60_000), max_size=12))
def test_one_that_is_too_large_is_passed_over_and_told_of(
    items: list[tuple[int, Message]], beyond: int, places: list[int]
) -> None:
    header = HEADER.pack(LARGEST + beyond, 7, frames.RESPONSE, 0)
    stream = frames.Stream()
    found = [message for part in cut(header, places) for message in stream.feed(part)]
    assert found == [Message(7, frames.RESPONSE, 0, b"", oversized=LARGEST + beyond)]
    passed_over = bytes(1 << 20)
    for _ in range(4):
        assert list(stream.feed(passed_over)) == []
    after = b"".join(frames.message(item.call, item.type, item.payload, item.flags) for _, item in items)
    assert list(stream.feed(bytes(beyond) + after)) == [item for _, item in items]


@settings(deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=20))
def test_any_bytes_are_frames_or_are_refused(parts: list[bytes]) -> None:
    with contextlib.suppress(BrokenFrame):
        for stream, message in taken_apart(parts):
            assert stream in (1, 2) and len(message.payload) <= LARGEST


@settings(deadline=None)
@given(st.integers(0, 3 * frames.FIRST_FRAME))
def test_a_peer_in_go_can_read_each_frame(size: int) -> None:
    """It reads a frame into 4096 bytes, or into exactly what a message has left."""
    data = frames.message(1, frames.REQUEST, bytes(size))
    parts = [part[frames.FRAME.size :] for part in frames.frames(1, data)]
    assert b"".join(parts) == data and len(parts) <= 2
    assert len(parts[0]) <= 4096 and (len(parts) == 1 or len(parts[0]) == 4096)
