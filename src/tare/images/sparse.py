"""Sparse files in tar archives: which parts of a file have data. Pure.

GNU tar has four ways to say it (tar manual, "Storing Sparse Files"): type S with a map in the header and in blocks after it, and
three in PAX records: pairs of records (0.0), one record (0.1), decimal lines at the beginning of the data (1.0).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from tare.images.errors import LayerError

BLOCK = 512
MAX_SEGMENTS = 1 << 17
MAX_NUMBER = 20  # digits
_PREFIX = b"GNU.sparse."


class SparseError(LayerError):
    """A map that makes no sense."""


class Sparse(NamedTuple):
    """A sparse file's length and its segments (offset, length) in order; `more` says where the rest of the map is: "", "blocks" or "data"."""

    length: int
    segments: tuple[tuple[int, int], ...]
    more: str = ""


def of_header(block: bytes, number: Callable[[bytes], int]) -> Sparse:
    """What a header of type S says. Raises SparseError."""
    return Sparse(number(block[483:495]), _entries(block[386:482], number), "blocks" if block[482] else "")


def _entries(field: bytes, number: Callable[[bytes], int]) -> tuple[tuple[int, int], ...]:
    found = []
    for start in range(0, len(field) - 23, 24):
        if not field[start]:
            break
        found.append((number(field[start : start + 12]), number(field[start + 12 : start + 24])))
    return tuple(found)


def of_pax(pax: Mapping[bytes, bytes]) -> tuple[Sparse, bytes | None] | None:
    """What PAX records say of the file that follows, and its true name where they have that; None where it is not sparse. Raises SparseError."""
    if not any(key.startswith(_PREFIX) for key in pax):
        return None
    name = pax.get(_PREFIX + b"name")
    length = _decimal(pax.get(_PREFIX + b"realsize") or pax.get(_PREFIX + b"size") or b"")
    major, minor = pax.get(_PREFIX + b"major", b"0"), pax.get(_PREFIX + b"minor", b"0")
    if (major, minor) == (b"1", b"0"):
        return Sparse(length, (), "data"), name
    if major != b"0":
        raise SparseError("read layer", cause="a sparse file of an unknown kind")
    if _PREFIX + b"map" in pax:
        numbers = [_decimal(text) for text in pax[_PREFIX + b"map"].split(b",") if text]
        offsets, lengths = numbers[::2], numbers[1::2]
    else:
        offsets, lengths = (
            [_decimal(text) for text in pax.get(_PREFIX + key, b"").split(b",") if text]
            for key in (b"offset", b"numbytes")
        )
    if len(offsets) != len(lengths):
        raise SparseError("read layer", cause="a sparse file's map is cut short")
    return Sparse(length, tuple(zip(offsets, lengths, strict=True))), name


def complete(
    sparse: Sparse, size: int, take: Callable[[int], bytes], number: Callable[[bytes], int]
) -> tuple[Sparse, int]:
    """The whole map, and how many of the file's `size` stored bytes are left after reading it by `take`. Raises SparseError."""
    segments = list(sparse.segments)
    if sparse.more == "blocks":
        more = True
        while more:
            block = _block(take)
            segments += _entries(block[:504], number)
            more = bool(block[504]) and len(segments) <= MAX_SEGMENTS
    elif sparse.more == "data":
        read, used = _Lines(take), 0
        count = read.number()
        if count > MAX_SEGMENTS:
            raise SparseError("read layer", cause=f"a sparse file of {count} pieces")
        segments = [(read.number(), read.number()) for _ in range(count)]
        used = read.blocks * BLOCK
        if used > size:
            raise SparseError("read layer", cause="a sparse file's map is longer than the file")
        size -= used
    _check(sparse.length, segments, size)
    return Sparse(sparse.length, tuple(segments)), size


def _check(length: int, segments: list[tuple[int, int]], size: int) -> None:
    if len(segments) > MAX_SEGMENTS:
        raise SparseError("read layer", cause=f"a sparse file of more than {MAX_SEGMENTS} pieces")
    end = 0
    for offset, count in segments:
        if offset < end or count < 0 or offset + count > length:
            raise SparseError("read layer", cause="the pieces of a sparse file overlap or leave it")
        end = offset + count
    if length < 0 or sum(count for _, count in segments) != size:
        raise SparseError("read layer", cause="the pieces of a sparse file are not as long as its data")


class _Lines:
    """Decimal lines at the beginning of a file's data, padded to whole blocks."""

    def __init__(self, take: Callable[[int], bytes]) -> None:
        self._take = take
        self._left = b""
        self.blocks = 0

    def number(self) -> int:
        while b"\n" not in self._left:
            if len(self._left) > MAX_NUMBER:
                raise SparseError("read layer", cause="a sparse file's map is no list of numbers")
            self._left += _block(self._take)
            self.blocks += 1
        text, _, self._left = self._left.partition(b"\n")
        return _decimal(text)


def _block(take: Callable[[int], bytes]) -> bytes:
    block = take(BLOCK)
    if len(block) != BLOCK:
        raise SparseError("read layer", cause="the archive ends in the middle of a sparse file's map")
    return block


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > MAX_NUMBER:
        raise SparseError("read layer", cause=f"{text[:40]!r} in a sparse file's map")
    return int(text)
