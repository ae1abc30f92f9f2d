"""Archives of images: any bytes are read or refused in plain words, and what is written is read again."""

from __future__ import annotations

import io
import tarfile
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tare.errors import TareError
from tare.images.archive import blob_digest, blob_path, made_index, read_docker, read_index, tar_header
from tare.images.importing import images_of, read_members
from tare.images.manifest import OCI_MANIFEST, Descriptor
from tare.images.reference import Reference
from tare.storage.content import ContentStore

NAMES = st.sampled_from(
    ["index.json", "oci-layout", "manifest.json", "x.json", "layer.tar", "a/layer.tar", "blobs/sha256/" + "0" * 64]
)
JSON = st.sampled_from([b"{}", b"[]", b"[{}]", b'{"manifests": []}', b'[{"Config":"x.json","Layers":["layer.tar"]}]'])


def archive(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as written:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            written.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@settings(max_examples=60, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=2000), st.lists(st.tuples(NAMES, st.one_of(JSON, st.binary(max_size=50)))).map(archive)
    ),
    st.integers(0, 3000),
)
def test_any_archive_is_read_or_refused(data: bytes, cut: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        content = ContentStore(Path(directory))
        pieces = iter([data[:cut], data[cut:]])
        held: list[str] = []
        try:
            members = read_members(lambda: next(pieces, b""), content, held.append, 1000)
            images_of(members, content, held.append, None)
        except TareError as error:
            assert str(error)
        assert set(content.sizes()) <= set(held)
        assert not any((Path(directory) / "ingest").iterdir())


@given(st.binary(max_size=300))
def test_documents_are_read_or_refused(data: bytes) -> None:
    for read in (read_index, read_docker):
        try:
            read(data, None)
        except TareError as error:
            assert str(error)


@given(
    st.text("abc/", min_size=1, max_size=90).filter(lambda path: "/" not in (path[0], path[-1])),
    st.integers(0, 1 << 40),
)
def test_headers_are_those_of_tar(path: str, size: int) -> None:
    member = tarfile.TarInfo.frombuf(tar_header(path, size), "utf-8", "strict")
    assert (member.name, member.size, member.mode) == (path, size, 0o644)


@given(st.lists(st.sampled_from(["1", "2", None]), min_size=1, max_size=3, unique=True))
def test_an_index_is_read_as_it_was_written(tags: list[str | None]) -> None:
    digest = "sha256:" + "1" * 64
    assert blob_digest(blob_path(digest)) == digest
    names = [Reference("r.example", "a/b", tag) for tag in tags if tag]
    listed: list[Reference | None] = [*names] or [None]
    entries: list[tuple[Descriptor, Reference | None]] = [
        (Descriptor(digest=digest, size=3, media_type=OCI_MANIFEST), name) for name in listed
    ]
    (found,) = read_index(made_index(entries), None)
    assert (found.digest, list(found.names), found.genuine) == (digest, names, True)
