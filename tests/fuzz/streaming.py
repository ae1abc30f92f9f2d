"""Fuzzing of the streaming protocols with coverage (atheris): `python -m tests.fuzz.streaming [libFuzzer options] [corpus directories]`.

The first byte of an input says which protocol gets the rest, the second how it is cut. An exception that is not the protocol's own ends it.
"""

from __future__ import annotations

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["tare.streaming"]):
    from tare.streaming import channels, remote, spdy
    from tare.streaming.spdy_headers import HeaderError, Unpacker


def frames(data: bytes, step: int) -> None:
    """SPDY, in pieces; what it holds is bounded by what came."""
    server = spdy.Connection(max_streams=16)
    with contextlib.suppress(spdy.SpdyError):
        for at in range(0, len(data), step):
            for event in server.receive(data[at : at + step]):
                if isinstance(event, spdy.Opened):
                    server.accept(event.stream, {"name": "value"})
                elif isinstance(event, spdy.Data):
                    server.send(event.stream, event.data, fin=event.fin)
                    server.consumed(event.stream, len(event.data))
    assert server.open_streams() <= 16
    server.output()


def headers(data: bytes) -> None:
    """A header block."""
    with contextlib.suppress(HeaderError):
        Unpacker().unpack(data)


def messages(data: bytes, which: int) -> None:
    """Messages of a WebSocket."""
    protocol = channels.PROTOCOLS[which % len(channels.PROTOCOLS)]
    for message in (data, data.decode("utf-8", "replace")):
        with contextlib.suppress(channels.ChannelError):
            piece = channels.read(protocol, message)
            assert 0 <= piece.channel <= 255


def sizes(data: bytes, step: int) -> None:
    """A resize stream."""
    reader = remote.Sizes()
    with contextlib.suppress(ValueError):
        for at in range(0, len(data), step):
            for size in reader.feed(data[at : at + step]):
                assert 0 < size.width <= remote.MAX_SIZE


def one_input(data: bytes) -> None:
    """One try."""
    if len(data) < 2:
        return
    kind, number, rest = data[0] % 4, data[1] + 1, data[2:]
    if kind == 0:
        frames(rest, number)
    elif kind == 1:
        headers(rest)
    elif kind == 2:
        messages(rest, number)
    else:
        sizes(rest, number)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
