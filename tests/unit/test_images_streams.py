"""Bytes in chunks: the channel between threads, the reader of portions, decompression."""

from __future__ import annotations

import gzip
import os
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd

from tare.images.chunks import Abandoned, Channel, ChunkReader
from tare.images.decompress import CHUNK, decompressed
from tare.images.layer import LayerError

SKIPPABLE = bytes.fromhex("502a4d1803000000") + b"abc"


def cut(data: bytes, size: int) -> Callable[[], bytes]:
    pieces = iter([data[start : start + size] for start in range(0, len(data), size)])
    return lambda: next(pieces, b"")


def test_a_channel_keeps_order_and_is_bounded() -> None:
    channel = Channel(depth=2)
    received: list[bytes] = []
    thread = threading.Thread(target=lambda: received.extend(iter(channel.get, b"")))
    channel.put(b"0")
    channel.put(b"1")
    thread.start()
    for number in range(2, 100):
        channel.put(str(number).encode())
    channel.finish()
    thread.join()
    assert received == [str(number).encode() for number in range(100)]


def test_a_channel_tells_the_taker_of_an_error_after_what_came_before() -> None:
    channel = Channel()
    channel.put(b"x")
    channel.finish(OSError("disk"))
    assert channel.get() == b"x"
    with pytest.raises(OSError, match="disk"):
        channel.get()


def test_a_channel_tells_the_giver_that_nobody_takes() -> None:
    channel, ended = Channel(depth=1), []
    channel.put(b"x")

    def give() -> None:
        try:
            channel.put(b"y")
        except Abandoned:
            ended.append(True)

    thread = threading.Thread(target=give)
    thread.start()
    channel.abandon()
    thread.join()
    assert ended == [True]


@pytest.mark.parametrize("size", [1, 2, 5, 7, 100])
def test_portions(size: int, tmp_path: Path) -> None:
    data = bytes(range(60))
    reader = ChunkReader(cut(data, size))
    assert (reader.take(0), reader.take(3), reader.take(10)) == (b"", data[:3], data[3:13])
    assert reader.skip(7) == 7
    descriptor = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    assert reader.copy(15, descriptor) == 15
    assert reader.take(5) == data[35:40]
    assert reader.copy(100, descriptor) == 20
    assert os.pread(descriptor, 100, 0) == data[20:35] + data[40:]
    os.close(descriptor)
    assert (reader.take(5), reader.skip(5)) == (b"", 0)


@pytest.mark.parametrize("size", [1, 3])
def test_portions_beyond_the_end(size: int) -> None:
    reader = ChunkReader(cut(b"12345", size))
    assert reader.skip(4) == 4
    assert reader.take(10) == b"5"
    reader = ChunkReader(cut(b"12345", size))
    assert reader.skip(9) == 5
    reader = ChunkReader(cut(b"12345", size))
    reader.drain()
    assert reader.take(1) == b""


@pytest.mark.parametrize("size", [1, 3, 1000, 1 << 20])
@pytest.mark.parametrize(
    ("stored", "plain"),
    [
        (b"", b""),
        (b"ab", b"ab"),
        (b"no compression at all" * 100, b"no compression at all" * 100),
        (gzip.compress(b"hello" * 1000), b"hello" * 1000),
        (gzip.compress(b"one") + gzip.compress(b"") + gzip.compress(b"two"), b"onetwo"),
        (gzip.compress(b"padded") + bytes(700), b"padded"),
        (zstd.compress(b"hello" * 1000), b"hello" * 1000),
        (zstd.compress(b"one") + SKIPPABLE + zstd.compress(b"two"), b"onetwo"),
        (SKIPPABLE + zstd.compress(b"two"), b"two"),
    ],
)
def test_decompression_is_told_by_the_first_bytes(size: int, stored: bytes, plain: bytes) -> None:
    assert b"".join(decompressed(cut(stored, size))) == plain


@pytest.mark.parametrize(
    "stored",
    [
        gzip.compress(b"x" * 1000)[:-1],
        gzip.compress(b"x" * 1000)[:-8] + b"checksum",
        gzip.compress(b"x") + b"garbage behind it",
        b"\x1f\x8b\x08 and nothing of the kind",
        zstd.compress(b"x" * 1000)[:-2],
        zstd.compress(b"x") + b"garbage behind it",
    ],
)
def test_damaged_streams_are_refused(stored: bytes) -> None:
    with pytest.raises(LayerError, match="decompress layer"):
        b"".join(decompressed(cut(stored, 100)))


def test_a_bomb_comes_in_chunks() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = packer.compress(bytes(64 << 20)) + packer.flush()
    assert len(bomb) < 100_000
    sizes = [len(chunk) for chunk in decompressed(cut(bomb, 1 << 20))]
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= CHUNK
    sizes = [len(chunk) for chunk in decompressed(cut(zstd.compress(bytes(64 << 20)), 1 << 20))]
    assert (sum(sizes), max(sizes) <= CHUNK) == (64 << 20, True)
