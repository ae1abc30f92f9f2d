"""Archives of any shape: bytes never raise anything but LayerError, and what Python's tarfile writes is read as it was meant."""

from __future__ import annotations

import io
import tarfile

from hypothesis import given
from hypothesis import strategies as st

from tare.images.layer import BLOCK, MAX_DEPTH, Entry, Extension, HeaderReader, Kind, LayerError, normalise, parse_pax

name = st.text(st.characters(exclude_characters="\0/", codec="utf-8"), min_size=1, max_size=60).filter(
    lambda text: text not in (".", "..") and not text.startswith(".wh.") and len(text.encode()) < 256
)
path = st.lists(name, min_size=1, max_size=6).map("/".join)
kinds = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.DIRTYPE: Kind.DIRECTORY,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.CHRTYPE: Kind.CHARACTER,
    tarfile.FIFOTYPE: Kind.FIFO,
}


@st.composite
def members(draw: st.DrawFn) -> tarfile.TarInfo:
    info = tarfile.TarInfo(draw(path))
    info.type = draw(st.sampled_from(list(kinds)))
    info.mode = draw(st.integers(0, 0o7777))
    info.uid, info.gid = draw(st.integers(0, 2**31)), draw(st.integers(0, 2**31))
    info.mtime = draw(st.integers(-(2**31), 2**33 - 1))
    info.size = draw(st.integers(0, 1500)) if info.type == tarfile.REGTYPE else 0
    info.linkname = draw(path) if info.type == tarfile.SYMTYPE else ""
    info.devmajor, info.devminor = (draw(st.integers(0, 4095)), 7) if info.type == tarfile.CHRTYPE else (0, 0)
    return info


@given(st.lists(members(), max_size=5), st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_what_tarfile_writes_is_read(infos: list[tarfile.TarInfo], format: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as writer:
        for info in infos:
            writer.addfile(info, io.BytesIO(b"d" * info.size))
    archive, reader, position, found = buffer.getvalue(), HeaderReader(), 0, []
    while (header := reader.read(archive[position : position + BLOCK])) is not None:
        position += BLOCK
        if isinstance(header, Extension):
            reader.extend(archive[position : position + header.size])
        else:
            assert archive[position : position + header.size] == b"d" * header.size
            found.append(header)
        position += header.size + -header.size % BLOCK
    assert [entry.path for entry in found] == [normalise(info.name.encode()) for info in infos]
    for entry, info in zip(found, infos, strict=True):
        assert (entry.kind, entry.mode, entry.uid, entry.gid) == (kinds[info.type], info.mode, info.uid, info.gid)
        assert (entry.mtime, entry.size) == (int(info.mtime) * 1_000_000_000, info.size)
        assert entry.link == info.linkname.encode()
        assert entry.device == (info.devmajor, info.devminor)


@given(st.lists(st.binary(min_size=BLOCK, max_size=BLOCK) | st.binary(max_size=BLOCK), max_size=4))
def test_any_blocks(blocks: list[bytes]) -> None:
    reader = HeaderReader()
    try:
        for block in blocks:
            header = reader.read(block)
            if isinstance(header, Extension):
                reader.extend(block)
    except LayerError:
        return


@given(
    st.binary(min_size=BLOCK, max_size=BLOCK),
    st.sampled_from(b"\x000123456x7gLKSZ"),
    st.lists(
        st.tuples(st.sampled_from([100, 108, 116, 124, 136, 329, 337]), st.binary(min_size=1, max_size=12)), max_size=4
    ),
    st.binary(max_size=200),
)
def test_any_fields_under_a_right_checksum(
    noise: bytes, flag: int, fields: list[tuple[int, bytes]], payload: bytes
) -> None:
    block = bytearray(noise)
    for start in (100, 108, 116, 124, 136, 329, 337):
        block[start : start + 8] = b"0000001\0"
    for start, value in fields:
        block[start : start + len(value)] = value
    block[156] = flag
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    reader = HeaderReader()
    try:
        header = reader.read(bytes(block))
        if isinstance(header, Extension):
            reader.extend(payload)
            block[156] = ord("0")
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
            header = reader.read(bytes(block))
    except LayerError:
        return
    assert isinstance(header, Entry)
    parts = header.path.split(b"/")
    assert b".." not in parts and not header.path.startswith(b"/") and b"\0" not in header.path
    assert header.size >= 0 and len(parts) <= MAX_DEPTH


@given(st.binary(max_size=120) | st.from_regex(rb"([0-9]{1,3} [a-z.]{1,8}=[a-z]{0,5}\n){0,4}", fullmatch=True))
def test_any_pax_payload(payload: bytes) -> None:
    try:
        records = parse_pax(payload)
    except LayerError:
        return
    assert all(key and b"=" not in key for key in records)


@given(st.dictionaries(st.from_regex(r"[a-zA-Z.]{1,12}", fullmatch=True), st.text(min_size=1, max_size=30), max_size=5))
def test_pax_records_come_back(records: dict[str, str]) -> None:
    payload = b""
    for key, value in records.items():
        body = b" " + key.encode() + b"=" + value.encode("utf-8", "surrogatepass") + b"\n"
        length = len(body) + 1
        while len(str(length)) + len(body) != length:
            length += 1
        payload += str(length).encode() + body
    assert parse_pax(payload) == {
        key.encode(): value.encode("utf-8", "surrogatepass") for key, value in records.items()
    }


@given(st.binary(max_size=60) | st.from_regex(rb"[./a]{0,30}", fullmatch=True))
def test_a_normalised_name_stays_inside_and_stays_the_same(text: bytes) -> None:
    try:
        path = normalise(text)
    except LayerError:
        return
    assert normalise(path) == path
    assert path == b"" or all(part not in (b"", b".", b"..") for part in path.split(b"/"))
