"""What a layer's tar archive says: header blocks become entries. Pure; `unpack.py` applies entries to a directory.

Dialects: ustar, PAX (`x`, `g`), GNU long names (`L`, `K`) and base-256 numbers. Names are bytes, made relative to the layer's
root ("./a//b/" and "/a/b" are a/b; a/../b is b; what leaves the root is refused). `.wh.NAME` and `.wh..wh..opq` become
whiteouts (OCI layer spec, "Whiteouts"). Maps of sparse files: `sparse.py`. An entry is read like this:

    block of 512 bytes ─► HeaderReader.read ─► Extension(size): hand its bytes to `extend`, go on with the next block
                                           ├─► Entry: entry.size bytes of data follow
                                           └─► None: the archive is over
"""

from __future__ import annotations

import enum
import zlib
from typing import NamedTuple

from tare.images.errors import LayerError as LayerError
from tare.images.sparse import Sparse, of_header, of_pax

BLOCK = 512
MAX_PATH = 4096
MAX_COMPONENT = 255
MAX_DEPTH = 256
MAX_EXTENSION = 4 << 20
MAX_XATTR_NAME = 255
MAX_XATTR_VALUE = 64 << 10  # what the kernel takes (xattr(7))
MAX_XATTRS = 256
MAX_SIZE = 1 << 53
MAX_ID = 0xFFFFFFFE  # the next one means "leave it" to chown(2)
SECOND = 1_000_000_000
MAX_TIME = (1 << 33) * SECOND  # either way from the epoch

XATTR_RECORD = b"SCHILY.xattr."
SPARSE_PAIRS = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")  # records that come once for each piece of a file
XATTR_ACCEPTED = (b"user.", b"security.", b"system.posix_acl_access", b"system.posix_acl_default")
# By these an archive could speak to overlayfs or to this machine's security policy (and by trusted.*, which is not accepted either).
XATTR_REFUSED = (b"user.overlay.", b"security.selinux", b"security.ima", b"security.evm")


class Kind(enum.IntEnum):
    """What an entry makes. `SKIPPED` makes nothing (the union-filesystem notes of aufs)."""

    FILE = 0
    DIRECTORY = 1
    SYMLINK = 2
    HARDLINK = 3
    CHARACTER = 4
    BLOCK = 5
    FIFO = 6
    WHITEOUT = 7
    OPAQUE = 8
    SKIPPED = 9


class Entry(NamedTuple):
    """One entry. `path` is normalised, b"" for the root; `link` is a hard link's path (normalised) or a symlink's target (verbatim).

    `mode` holds permission bits and setuid, setgid, sticky; `mtime` is in ns; `size` bytes of data follow the header.
    A whiteout's `path` is what it removes, an opaque's the directory that it empties. Of a `sparse` file the data are its pieces,
    with more of its map before them if `sparse.more` says so.
    """

    kind: Kind
    path: bytes
    link: bytes
    mode: int
    uid: int
    gid: int
    mtime: int
    size: int
    device: tuple[int, int]
    xattrs: dict[bytes, bytes]
    sparse: Sparse | None = None


class Extension(NamedTuple):
    """An extended header: `size` bytes of it follow, for `HeaderReader.extend`."""

    kind: bytes
    size: int


_KINDS = {
    ord("0"): Kind.FILE,
    0: Kind.FILE,
    ord("7"): Kind.FILE,
    ord("S"): Kind.FILE,
    ord("1"): Kind.HARDLINK,
    ord("2"): Kind.SYMLINK,
    ord("3"): Kind.CHARACTER,
    ord("4"): Kind.BLOCK,
    ord("5"): Kind.DIRECTORY,
    ord("6"): Kind.FIFO,
}
_EXTENSIONS = frozenset(b"xgLK")
_NO_XATTRS: dict[bytes, bytes] = {}
_ZEROS = bytes(BLOCK)


class HeaderReader:
    """Reads an archive's header blocks in order; an extended header holds for the entry that follows it."""

    def __init__(self) -> None:
        self._pending = b""
        self._pax: dict[bytes, bytes] = {}
        self._name: bytes | None = None
        self._link: bytes | None = None

    def read(self, block: bytes) -> Entry | Extension | None:
        """What a block of 512 bytes begins. Raises LayerError."""
        if len(block) != BLOCK:
            raise LayerError("read layer", cause="the archive ends in the middle of a header")
        if block == _ZEROS:
            return None
        _check_sum(block)
        flag = block[156]
        if flag in _EXTENSIONS:
            size = number(block[124:136])
            if not 0 <= size <= MAX_EXTENSION:
                raise LayerError("read layer", cause=f"an extended header of {size} bytes")
            self._pending = block[156:157]
            return Extension(self._pending, size)
        try:
            return self._entry(block, flag)
        finally:
            if self._pax:
                self._pax = {}
            self._name = self._link = None

    def extend(self, payload: bytes) -> None:
        """The bytes of the extended header just announced. Raises LayerError."""
        kind = self._pending
        if kind == b"x":
            self._pax = parse_pax(payload)
        elif kind == b"L":
            self._name = payload.rstrip(b"\0")
        elif kind == b"K":
            self._link = payload.rstrip(b"\0")
        # A global header ("g") holds comments in practice and is not applied, as in Go's archive/tar.

    def _entry(self, block: bytes, flag: int) -> Entry:
        name = self._name
        if name is None:
            name = block[:100].partition(b"\0")[0]
            if block[345] and block[257:263] == b"ustar\0":
                name = block[345:500].partition(b"\0")[0] + b"/" + name
        link = self._link if self._link is not None else block[157:257].partition(b"\0")[0]
        size, uid, gid = number(block[124:136]), number(block[108:116]), number(block[116:124])
        mtime = number(block[136:148]) * SECOND
        xattrs = _NO_XATTRS
        pax = self._pax
        if pax:
            name, link = pax.get(b"path", name), pax.get(b"linkpath", link)
            size, uid, gid = (_decimal(pax, key, n) for key, n in ((b"size", size), (b"uid", uid), (b"gid", gid)))
            mtime = _pax_time(pax[b"mtime"]) if b"mtime" in pax else mtime
            xattrs = _xattrs(pax)
        kind, sparse = _kind(flag, name), None
        if kind is Kind.FILE and (flag == ord("S") or pax):
            sparse, name = _sparse(flag, block, pax, name)
        if kind is Kind.HARDLINK:
            link = normalise(link)
        elif kind is Kind.SYMLINK and (not link or len(link) >= MAX_PATH or b"\0" in link):
            raise LayerError(f"read layer entry {show(name)}", cause="a symbolic link that leads nowhere")
        if not (0 <= size <= MAX_SIZE and 0 <= uid <= MAX_ID and 0 <= gid <= MAX_ID and -MAX_TIME < mtime < MAX_TIME):
            cause = f"size {size}, owner {uid}:{gid} or time {mtime} is out of range"
            raise LayerError(f"read layer entry {show(name)}", cause=cause)
        device = _device(block) if kind in (Kind.CHARACTER, Kind.BLOCK) else (0, 0)
        if kind is not Kind.FILE:
            size = 0  # other kinds have no data, whatever their size field says (as in Go's archive/tar)
        path = normalise(name)
        if b".wh." in path:
            kind, path = whiteout(kind, path)
        return Entry(kind, path, link, number(block[100:108]) & 0o7777, uid, gid, mtime, size, device, xattrs, sparse)


def _sparse(flag: int, block: bytes, pax: dict[bytes, bytes], name: bytes) -> tuple[Sparse | None, bytes]:
    """The map of a file, if it is sparse, and its name."""
    if flag == ord("S"):
        return of_header(block, number), name
    found = of_pax(pax)
    return (None, name) if found is None else (found[0], found[1] or name)


def _kind(flag: int, name: bytes) -> Kind:
    kind = _KINDS.get(flag)
    if kind is None:
        what = "multi-volume and incremental archives are" if flag in b"VMD" else f"type {chr(flag)!r} is"
        raise LayerError(f"read layer entry {show(name)}", cause=f"{what} not supported")
    return Kind.DIRECTORY if flag == 0 and name.endswith(b"/") else kind


def _device(block: bytes) -> tuple[int, int]:
    major, minor = number(block[329:337]), number(block[337:345])
    if not (0 <= major < 1 << 12 and 0 <= minor < 1 << 20):
        raise LayerError("read layer", cause=f"a device {major}:{minor}")
    return major, minor


def normalise(name: bytes) -> bytes:
    """A member's name relative to the layer's root, without empty, "." and ".." components. Raises LayerError if it leaves the root."""
    path = name.strip(b"/")
    if len(path) >= MAX_PATH:
        raise LayerError(f"read layer entry {show(name)}", cause=f"its name has {len(path)} bytes")
    if not path or path.startswith(b".") or b"/." in path or b"//" in path or b"\0" in path:
        parts: list[bytes] = []
        for part in path.split(b"/"):
            if part == b"..":
                if not parts:
                    raise LayerError(f"read layer entry {show(name)}", cause="its name leads out of the layer")
                parts.pop()
            elif part not in (b"", b"."):
                parts.append(part)
        path = b"/".join(parts)
        if b"\0" in path:
            raise LayerError(f"read layer entry {show(name)}", cause="a zero byte in its name")
    if len(path) > MAX_COMPONENT and max(map(len, path.split(b"/"))) > MAX_COMPONENT:
        raise LayerError(f"read layer entry {show(name)}", cause=f"a name of more than {MAX_COMPONENT} bytes")
    if path.count(b"/") >= MAX_DEPTH:
        raise LayerError(f"read layer entry {show(name)}", cause=f"directories nested more than {MAX_DEPTH} deep")
    return path


def whiteout(kind: Kind, path: bytes) -> tuple[Kind, bytes]:
    """An entry's kind and path with the names that mean a removal understood. Raises LayerError for a removal of nothing or of a directory's self."""
    directory, _, name = path.rpartition(b"/")
    if not name.startswith(b".wh."):
        if b"/.wh." in path or path.startswith(b".wh."):
            first = next(part for part in path.split(b"/") if part.startswith(b".wh."))
            if first.startswith(b".wh..wh."):
                return Kind.SKIPPED, path
            raise LayerError(f"read layer entry {show(path)}", cause=f"it lies under the whiteout {show(first)}")
        return kind, path
    if name == b".wh..wh..opq":
        return Kind.OPAQUE, directory
    if name.startswith(b".wh..wh."):
        return Kind.SKIPPED, path
    hidden = name[4:]
    if hidden in (b"", b".", b".."):
        raise LayerError(f"read layer entry {show(path)}", cause="a whiteout of nothing")
    return Kind.WHITEOUT, directory + b"/" + hidden if directory else hidden


def parse_pax(payload: bytes) -> dict[bytes, bytes]:
    """The records of a PAX extended header, "LENGTH KEY=VALUE\\n" each (POSIX pax, "pax Header Block"). Raises LayerError."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(payload) and payload[position]:
        digits, space, _ = payload[position : position + 12].partition(b" ")
        if not space or not digits.isdigit():
            raise LayerError("read layer", cause="a PAX record without a length")
        end = position + int(digits)
        record = payload[position + len(digits) + 1 : end - 1]
        key, mark, value = record.partition(b"=")
        if not mark or not key or end > len(payload) or payload[end - 1 : end] != b"\n":
            raise LayerError("read layer", cause="a PAX record that is no KEY=VALUE")
        if key in SPARSE_PAIRS and key in records:
            records[key] += b"," + value
        elif value or key.startswith(XATTR_RECORD):
            records[key] = value
        else:
            records.pop(key, None)
        position = end
    return records


def _xattrs(pax: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Extended attributes to set (`SCHILY.xattr.NAME` records); names that are not accepted are left out."""
    found = {}
    for key, value in pax.items():
        if not key.startswith(XATTR_RECORD):
            continue
        name = key[len(XATTR_RECORD) :]
        if name.startswith(XATTR_REFUSED) or not name.startswith(XATTR_ACCEPTED):
            continue
        if len(name) > MAX_XATTR_NAME or b"\0" in name or len(value) > MAX_XATTR_VALUE:
            raise LayerError("read layer", cause=f"the extended attribute {show(name)} is too large")
        found[name] = value
    if len(found) > MAX_XATTRS:
        raise LayerError("read layer", cause=f"{len(found)} extended attributes on one entry")
    return found


def _check_sum(block: bytes) -> None:
    """The sum of a header's bytes, its own field taken as spaces, must be what that field says."""
    try:
        expected = number(block[148:156])
    except LayerError:
        expected = -1
    # The low half of Adler-32 is one more than the sum of the bytes, modulo 65521: seven times faster than sum().
    actual = ((zlib.adler32(block) & 0xFFFF) - 1 - sum(block[148:156]) + 8 * 32) % 65521
    if actual != expected % 65521:
        signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:]) + 8 * 32
        if signed != expected:
            raise LayerError(
                "read layer", cause="a header whose checksum is wrong: this is no tar archive, or a damaged one"
            )


def number(field: bytes) -> int:
    """A numeric field: octal digits padded with spaces and zero bytes, or a two's-complement number with the first bit set (GNU base-256)."""
    try:
        return int(field.partition(b"\0")[0] or b"0", 8)
    except ValueError:
        pass
    if field[0] & 0x80:
        value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits:
        raise LayerError("read layer", cause=f"the number {show(field)} in a header")
    return 0


def _decimal(pax: dict[bytes, bytes], key: bytes, otherwise: int) -> int:
    text = pax.get(key)
    if text is None:
        return otherwise
    if not text.isdigit() or len(text) > 20:
        raise LayerError("read layer", cause=f"the PAX record {show(key)} is {show(text)}")
    return int(text)


def _pax_time(text: bytes) -> int:
    """Decimal seconds with a fraction, as nanoseconds."""
    whole, _, fraction = text.partition(b".")
    sign = -1 if whole.startswith(b"-") else 1
    seconds = whole.lstrip(b"-")
    if not (seconds or b"0").isdigit() or (fraction and not fraction.isdigit()) or len(text) > 64:
        raise LayerError("read layer", cause=f"the PAX record mtime is {show(text)}")
    return sign * (int(seconds or b"0") * SECOND + int((fraction + b"000000000")[:9]))


def show(name: bytes) -> str:
    """Bytes for a message, at most 200 of them."""
    return repr(name[:200].decode("utf-8", "backslashreplace"))
