"""SPDY/3 header blocks: name and value pairs under one zlib stream for each direction of a connection. Pure.

    ┌───────────┬──────────────────────────────────────────────────┐
    │ count u32 │ count × (length u32, name, length u32, value)     │  compressed, with a dictionary of common words, and flushed
    └───────────┴──────────────────────────────────────────────────┘

Names are lower case; a name with several values has them separated by a zero byte. Source: SPDY protocol draft 3, 2.6.10.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

MAX_BLOCK = 64 << 10  # bytes of a header block, uncompressed: what a hostile one unpacks to is not looked at
MAX_HEADERS = 128

WORDS = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow "
    "authorization cache-control connection content-base content-encoding content-language content-length "
    "content-location content-md5 content-range content-type date etag expect expires from host if-match "
    "if-modified-since if-none-match if-range if-unmodified-since last-modified location max-forwards pragma "
    "proxy-authenticate proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade "
    "user-agent vary via warning www-authenticate method get status"
)
LATER_WORDS = ("200 OK", "version", "HTTP/1.1", "url", "public", "set-cookie", "keep-alive", "origin")
TEXT = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden"
    "404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,"
    "publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)


def counted(word: bytes) -> bytes:
    """A length of four bytes and the word."""
    return len(word).to_bytes(4, "big") + word


DICTIONARY = b"".join(counted(word.encode()) for word in (*WORDS.split(), *LATER_WORDS)) + TEXT.encode()


class HeaderError(Exception):
    """A header block that is none, or is too big. The connection's state of compression is lost with it."""


class Packer:
    """Header blocks of one direction, in the order in which they are sent."""

    def __init__(self) -> None:
        self._stream = zlib.compressobj(level=6, wbits=11, memLevel=5, zdict=DICTIONARY)

    def pack(self, headers: Mapping[str, str]) -> bytes:
        """A block."""
        parts = [len(headers).to_bytes(4, "big")]
        for name, value in headers.items():
            parts += [counted(name.lower().encode()), counted(value.encode())]
        return self._stream.compress(b"".join(parts)) + self._stream.flush(zlib.Z_SYNC_FLUSH)


class Unpacker:
    """Header blocks of the other direction, in the order in which they come."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(zdict=DICTIONARY)

    def unpack(self, block: bytes) -> dict[str, str]:
        """Name → value (the first of several). Raises HeaderError."""
        try:
            data = self._stream.decompress(block, MAX_BLOCK + 1)
        except zlib.error as error:
            raise HeaderError(f"a header block that does not unpack: {error}") from error
        if len(data) > MAX_BLOCK or self._stream.unconsumed_tail:
            raise HeaderError(f"a header block of more than {MAX_BLOCK} bytes")
        return dict(pairs(data))


def pairs(data: bytes) -> Iterable[tuple[str, str]]:
    """The headers of an uncompressed block. Raises HeaderError."""
    count, place = number(data, 0)
    if count > MAX_HEADERS:
        raise HeaderError(f"{count} headers, at most {MAX_HEADERS} are possible")
    seen: set[str] = set()
    for _ in range(count):
        name, place = text(data, place)
        value, place = text(data, place)
        if not name or name != name.lower() or name in seen:
            raise HeaderError(f"header name {name!r} is empty, not in lower case, or there twice")
        seen.add(name)
        yield name, value.split("\0", 1)[0]
    if place != len(data):
        raise HeaderError("a header block with something behind its last header")


def number(data: bytes, place: int) -> tuple[int, int]:
    """A number of four bytes, and where it ends."""
    if place + 4 > len(data):
        raise HeaderError("a header block that ends too early")
    return int.from_bytes(data[place : place + 4], "big"), place + 4


def text(data: bytes, place: int) -> tuple[str, int]:
    """A counted text, and where it ends."""
    length, start = number(data, place)
    if start + length > len(data):
        raise HeaderError("a header block that ends too early")
    try:
        return data[start : start + length].decode(), start + length
    except UnicodeDecodeError as error:
        raise HeaderError("a header that is not UTF-8") from error
