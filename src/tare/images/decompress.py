"""Layers' compression: told by their first bytes, undone chunk by chunk, never more than one chunk ahead of what is read.

What a media type claims is not asked: in practice gzip comes labelled as plain and the other way round. Several gzip
members or zstd frames in a row are one stream (eStargz, zstd:chunked, pigz).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Protocol

from isal import igzip_lib

from tare.images.layer import LayerError

CHUNK = 256 * 1024
GZIP_MAGIC = b"\x1f\x8b\x08"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


class Decoder(Protocol):
    """The interface of bz2.BZ2Decompressor, which igzip's and zstd's have too."""

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        """Up to `max_length` bytes of output."""

    @property
    def eof(self) -> bool:
        """This member or frame is complete."""

    @property
    def needs_input(self) -> bool:
        """Without more input there is no more output."""

    @property
    def unused_data(self) -> bytes:
        """What followed the end."""


def decompressed(read: Callable[[], bytes]) -> Iterator[bytes]:
    """The plain bytes of a layer whose stored bytes `read` gives chunk by chunk, b"" at the end. Raises LayerError."""
    first = read()
    while 0 < len(first) < len(ZSTD_MAGIC):
        more = read()
        if not more:
            break
        first += more
    if first.startswith(GZIP_MAGIC):
        yield from _decoded(first, read, _gzip, "gzip")
    elif first.startswith(ZSTD_MAGIC) or (first[1:4] == b"\x2a\x4d\x18" and first[0] & 0xF0 == 0x50):
        yield from _decoded(first, read, _zstd(), "zstd")
    elif first:
        yield first
        yield from iter(read, b"")


def _gzip() -> Decoder:
    decoder: Decoder = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
    return decoder


def _zstd() -> Callable[[], Decoder]:
    """Imported where it is needed: most nodes never see a zstd layer."""
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    return zstd.ZstdDecompressor


def _decoded(data: bytes, read: Callable[[], bytes], make: Callable[[], Decoder], name: str) -> Iterator[bytes]:
    decoder = make()
    while True:
        try:
            plain = decoder.decompress(data, CHUNK)
        except Exception as error:  # each library has an error class of its own
            raise LayerError(f"decompress layer ({name})", cause=error) from error
        if plain:
            yield plain
        if decoder.eof:
            data = _behind(decoder.unused_data, read)
            if not data:
                return
            decoder = make()
        elif decoder.needs_input:
            data = read()
            if not data:
                raise LayerError(f"decompress layer ({name})", cause="the data ends in the middle")
        else:
            data = b""


def _behind(data: bytes, read: Callable[[], bytes]) -> bytes:
    """What follows a member, without the zero bytes that some writers pad with; b"" at the end."""
    while True:
        rest = data.lstrip(b"\0")
        if rest:
            return rest
        data = read()
        if not data:
            return b""
