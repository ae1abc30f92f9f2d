"""Tar headers: every dialect's fields, layers' whiteouts, and what is refused."""

from __future__ import annotations

import io
import tarfile

import pytest

from tare.images.layer import (
    BLOCK,
    MAX_EXTENSION,
    Entry,
    Extension,
    HeaderReader,
    Kind,
    LayerError,
    normalise,
    parse_pax,
    whiteout,
)


def entries(archive: bytes) -> list[Entry]:
    """All entries of an archive, their data passed over."""
    reader, position, found = HeaderReader(), 0, []
    while position < len(archive):
        header = reader.read(archive[position : position + BLOCK])
        position += BLOCK
        if header is None:
            break
        if isinstance(header, Extension):
            reader.extend(archive[position : position + header.size])
        else:
            found.append(header)
        position += header.size + -header.size % BLOCK
    return found


def archive(*members: tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as writer:
        for member in members:
            writer.addfile(member, io.BytesIO(bytes(member.size)))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, **values: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in values.items():
        setattr(info, key, value)
    return info


def header(**fields: bytes) -> bytes:
    """A ustar header block with a right checksum; fields by name as bytes."""
    places = {
        "name": 0, "mode": 100, "uid": 108, "gid": 116, "size": 124, "mtime": 136, "type": 156,
        "link": 157, "magic": 257, "major": 329, "minor": 337, "prefix": 345,
    }  # fmt: skip
    block = bytearray(BLOCK)
    for name, value in {"name": b"f", "mode": b"0000644", "type": b"0", "magic": b"ustar\x0000", **fields}.items():
        block[places[name] : places[name] + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_kind_in_every_dialect(format: int) -> None:
    found = entries(
        archive(
            member("d", tarfile.DIRTYPE, mode=0o1777, uid=5, gid=6, mtime=7),
            member("d/f", size=513, mode=0o4755),
            member("d/s", tarfile.SYMTYPE, linkname="../x"),
            member("d/h", tarfile.LNKTYPE, linkname="./d/f"),
            member("c", tarfile.CHRTYPE, devmajor=5, devminor=1),
            member("b", tarfile.BLKTYPE, devmajor=8, devminor=17),
            member("p", tarfile.FIFOTYPE),
            format=format,
        )
    )
    assert [entry.kind for entry in found] == [
        Kind.DIRECTORY, Kind.FILE, Kind.SYMLINK, Kind.HARDLINK, Kind.CHARACTER, Kind.BLOCK, Kind.FIFO
    ]  # fmt: skip
    assert found[0] == Entry(Kind.DIRECTORY, b"d", b"", 0o1777, 5, 6, 7_000_000_000, 0, (0, 0), {})
    assert (found[1].path, found[1].size, found[1].mode) == (b"d/f", 513, 0o4755)
    assert (found[2].link, found[3].link) == (b"../x", b"d/f")
    assert (found[4].device, found[5].device) == ((5, 1), (8, 17))


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_and_large_numbers(format: int) -> None:
    name, link = "a" * 120 + "/" + "b" * 200, "c/" * 120 + "d"
    found = entries(
        archive(
            member(name, tarfile.SYMTYPE, linkname=link, uid=0o77777777, gid=3_000_000_000, mtime=-5),
            member("next"),
            format=format,
        )
    )
    assert found[0].path == name.encode()
    assert found[0].link == link.encode()
    assert (found[0].uid, found[0].gid, found[0].mtime) == (0o77777777, 3_000_000_000, -5_000_000_000)
    assert found[1].path == b"next"


def test_ustar_prefix() -> None:
    found = entries(archive(member("p" * 100 + "/" + "n" * 90), format=tarfile.USTAR_FORMAT))
    assert found[0].path == b"p" * 100 + b"/" + b"n" * 90


def test_pax_times_sizes_and_names() -> None:
    records = {"path": "über/ñ", "mtime": "1.000000001", "uid": "70000", "comment": "x"}
    (entry,) = entries(archive(member("x", pax_headers=records)))
    assert (entry.path, entry.mtime, entry.uid) == ("über/ñ".encode(), 1_000_000_001, 70000)
    (entry,) = entries(archive(member("x", pax_headers={"mtime": "-1.5"})))
    assert entry.mtime == -1_500_000_000
    reader = HeaderReader()
    reader.read(header(type=b"x", size=b"%011o" % 21))
    reader.extend(b"21 size=123456789012\n")
    large = reader.read(header())
    assert isinstance(large, Entry) and large.size == 123456789012


def test_an_extension_holds_for_one_entry() -> None:
    found = entries(archive(member("x", pax_headers={"path": "y", "mtime": "9.5"}), member("z", mtime=1)))
    assert [(entry.path, entry.mtime) for entry in found] == [(b"y", 9_500_000_000), (b"z", 1_000_000_000)]


def test_a_global_header_is_passed_over() -> None:
    reader = HeaderReader()
    assert reader.read(header(type=b"g", size=b"00000000024")) == Extension(b"g", 0o24)
    reader.extend(b"20 path=elsewhere/x\n")
    entry = reader.read(header(name=b"f"))
    assert isinstance(entry, Entry) and entry.path == b"f"


def test_extended_attributes() -> None:
    names = {
        "user.a": "1",
        "security.capability": "cap",
        "security.selinux": "label",
        "security.ima": "x",
        "trusted.overlay.opaque": "y",
        "trusted.x": "y",
        "user.overlay.redirect": "/etc",
        "system.posix_acl_access": "acl",
        "system.other": "x",
        "empty": "x",
    }
    (entry,) = entries(
        archive(member("x", pax_headers={f"SCHILY.xattr.{name}": value for name, value in names.items()}))
    )
    assert entry.xattrs == {b"user.a": b"1", b"security.capability": b"cap", b"system.posix_acl_access": b"acl"}


def test_an_empty_attribute_is_kept_but_an_empty_record_is_unset() -> None:
    assert parse_pax(b"26 SCHILY.xattr.user.emp=\n") == {b"SCHILY.xattr.user.emp": b""}
    assert parse_pax(b"8 path=\n") == {}
    assert parse_pax(b"9 path=a\n8 path=\n") == {}


@pytest.mark.parametrize(
    ("name", "path"),
    [
        (b"a/b", b"a/b"),
        (b"./a//b/", b"a/b"),
        (b"/a/b", b"a/b"),
        (b"//a", b"a"),
        (b"a/./b/.", b"a/b"),
        (b"a/../b", b"b"),
        (b"a/b/../../c", b"c"),
        (b".", b""),
        (b"./", b""),
        (b"/", b""),
        (b"", b""),
        (b"a/..", b""),
        (b"...", b"..."),
        (b".hidden/..x/x..", b".hidden/..x/x.."),
        (b"\xff\xfe", b"\xff\xfe"),
    ],
)
def test_names_are_made_relative_to_the_root(name: bytes, path: bytes) -> None:
    assert normalise(name) == path


@pytest.mark.parametrize(
    ("name", "word"),
    [
        (b"..", "leads out"),
        (b"../x", "leads out"),
        (b"/../x", "leads out"),
        (b"a/../../x", "leads out"),
        (b"a\0b", "zero byte"),
        (b"x" * 256, "more than 255"),
        (b"a/" + b"x" * 256, "more than 255"),
        (b"a/" * 256 + b"x", "nested"),
        (b"a/" * 3000, "bytes"),
    ],
)
def test_names_that_are_refused(name: bytes, word: str) -> None:
    with pytest.raises(LayerError, match=word):
        normalise(name)


@pytest.mark.parametrize(
    ("path", "kind", "means"),
    [
        (b".wh.x", Kind.WHITEOUT, b"x"),
        (b"a/b/.wh.x", Kind.WHITEOUT, b"a/b/x"),
        (b"a/.wh..hidden", Kind.WHITEOUT, b"a/.hidden"),
        (b"a/.wh..wh..opq", Kind.OPAQUE, b"a"),
        (b".wh..wh..opq", Kind.OPAQUE, b""),
        (b".wh..wh.aufs", Kind.SKIPPED, b".wh..wh.aufs"),
        (b".wh..wh.plnk/1.2", Kind.SKIPPED, b".wh..wh.plnk/1.2"),
        (b"a.wh.b", Kind.FILE, b"a.wh.b"),
    ],
)
def test_whiteouts(path: bytes, kind: Kind, means: bytes) -> None:
    assert whiteout(Kind.FILE, path) == (kind, means)


@pytest.mark.parametrize("path", [b".wh.", b"a/.wh.", b".wh..", b"a/.wh...", b".wh.x/y"])
def test_whiteouts_of_nothing(path: bytes) -> None:
    with pytest.raises(LayerError, match="whiteout"):
        whiteout(Kind.FILE, path)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"type": b"V"}, "not supported"),
        ({"type": b"9"}, "not supported"),
        ({"type": b"3", "major": b"7777777", "minor": b"1"}, "device"),
        ({"size": b"0000000000x"}, "number"),
        ({"size": b"-0000000001"}, "out of range"),
        ({"size": b"\x80" + b"\xff" * 11}, "out of range"),
        ({"uid": b"\xff" * 8}, "out of range"),
        ({"mtime": b"\x80" + b"\x7f" * 11}, "out of range"),
        ({"type": b"2", "link": b""}, "leads nowhere"),
        ({"type": b"1", "link": b"../x"}, "leads out"),
        ({"type": b"x", "size": b"%011o" % (MAX_EXTENSION + 1)}, "extended header"),
        ({"name": b"../../etc/passwd"}, "leads out"),
    ],
)
def test_headers_that_are_refused(fields: dict[str, bytes], word: str) -> None:
    with pytest.raises(LayerError, match=word):
        HeaderReader().read(header(**fields))


def test_checksums() -> None:
    block = bytearray(header(name=b"\xc3\xa9" * 30))
    assert isinstance(HeaderReader().read(bytes(block)), Entry)
    signed = sum(byte - 256 if byte > 127 else byte for byte in block[:148] + block[156:]) + 8 * 32
    block[148:156] = b"%06o\0 " % signed
    assert isinstance(HeaderReader().read(bytes(block)), Entry)
    block[0] ^= 1
    with pytest.raises(LayerError, match="checksum"):
        HeaderReader().read(bytes(block))


def test_the_end_and_a_cut() -> None:
    assert HeaderReader().read(bytes(BLOCK)) is None
    with pytest.raises(LayerError, match="middle of a header"):
        HeaderReader().read(bytes(100))


@pytest.mark.parametrize(
    ("records", "word"),
    [
        ({"major": "2", "realsize": "1"}, "unknown kind"),
        ({"major": "1", "minor": "0"}, "b'' in a sparse"),
        ({"size": "1", "map": "0"}, "cut short"),
        ({"size": "x"}, "b'x' in a sparse"),
    ],
)
def test_sparse_records_that_are_refused(records: dict[str, str], word: str) -> None:
    with pytest.raises(LayerError, match=word):
        entries(archive(member("x", pax_headers={f"GNU.sparse.{key}": value for key, value in records.items()})))


def test_old_directories_end_in_a_slash() -> None:
    entry = HeaderReader().read(header(name=b"d/", type=b"\0", magic=b"\0" * 8))
    assert isinstance(entry, Entry) and (entry.kind, entry.path) == (Kind.DIRECTORY, b"d")


@pytest.mark.parametrize(
    "payload",
    [b"x", b"5 a", b"0 a=b\n", b"99 a=b\n", b"6 a=bc", b"5 ab\n", b"4 =\n\n"],
)
def test_pax_records_that_are_refused(payload: bytes) -> None:
    with pytest.raises(LayerError, match="PAX"):
        parse_pax(payload)


@pytest.mark.parametrize(
    "records", [{"uid": "x"}, {"size": "-1"}, {"mtime": "soon"}, {"mtime": "1.x"}, {"gid": "9" * 30}]
)
def test_pax_values_that_are_refused(records: dict[str, str]) -> None:
    with pytest.raises(LayerError):
        entries(archive(member("x", pax_headers=records)))
