"""The content store: whole blobs or none, read while they come."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest

from tare.errors import NotFound
from tare.storage.content import CHUNK, ContentStore, Interrupted, WrongContent


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_put_read_open_forget(tmp_path: Path, algorithm: str) -> None:
    store, data = ContentStore(tmp_path), b"x" * (CHUNK + 1)
    digest = digest_of(data, algorithm)
    store.put(digest, data)
    assert store.read(digest) == data
    assert (store.size(digest), store.sizes()) == (len(data), {digest: len(data)})
    reader = store.open(digest)
    assert (reader.read(), reader.read(), reader.read()) == (data[:CHUNK], b"x", b"")
    reader.close()
    assert files(tmp_path) == [f"blobs/{algorithm}/{digest.partition(':')[2]}"]
    assert ContentStore(tmp_path).sizes() == {digest: len(data)}
    store.forget(digest)
    store.forget(digest)
    assert store.size(digest) is None
    with pytest.raises(NotFound):
        store.read(digest)
    with pytest.raises(NotFound):
        store.open(digest)
    store.empty_trash()
    assert files(tmp_path) == []


def test_wrong_content_leaves_nothing(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    with pytest.raises(WrongContent, match="have the digest"):
        store.put(digest_of(b"right"), b"wrong")
    ingest = store.ingest(digest_of(b"12345"), 5)
    ingest.write([b"1234"])
    with pytest.raises(WrongContent, match="4 bytes instead of 5"):
        ingest.commit()
    with pytest.raises(WrongContent, match="more than the 5 bytes"):
        ingest.write([b"5", b"6"])
    ingest.abort(RuntimeError())
    ingest.abort(RuntimeError())
    assert (files(tmp_path), store.sizes()) == ([], {})


@pytest.mark.parametrize("digest", ["", "sha256:", "sha256:../x", "sha256:" + "A" * 64, "md5:" + "a" * 32])
def test_only_digests_are_paths(tmp_path: Path, digest: str) -> None:
    with pytest.raises(ValueError, match="no digest"):
        ContentStore(tmp_path).path(digest)


def test_reading_what_is_still_coming(tmp_path: Path) -> None:
    store, data = ContentStore(tmp_path), bytes(range(256)) * 10
    ingest = store.ingest(digest_of(data), len(data))
    reader = ingest.follow()
    received: list[bytes] = []
    thread = threading.Thread(target=lambda: received.extend(iter(reader.read, b"")))
    thread.start()
    for start in range(0, len(data), 100):
        ingest.write([data[start : start + 100]])
    thread.join()
    ingest.commit()
    reader.close()
    assert b"".join(received) == data
    assert store.size(digest_of(data)) == len(data)


def test_a_reader_learns_that_nothing_more_comes(tmp_path: Path) -> None:
    ingest = ContentStore(tmp_path).ingest(digest_of(b"never"), 5)
    reader = ingest.follow()
    ingest.write([b"ne"])
    assert reader.read() == b"ne"
    failures: list[str] = []

    def read() -> None:
        try:
            reader.read()
        except Interrupted as error:
            failures.append(str(error))

    thread = threading.Thread(target=read)
    thread.start()
    ingest.abort(RuntimeError())
    thread.join()
    reader.close()
    assert "stopped coming" in failures[0]
    assert files(tmp_path) == []


def test_a_reader_can_be_stopped(tmp_path: Path) -> None:
    ingest = ContentStore(tmp_path).ingest(digest_of(b"never"), 5)
    reader = ingest.follow()

    def read() -> None:
        with pytest.raises(Interrupted):
            reader.read()

    thread = threading.Thread(target=read)
    thread.start()
    reader.stop()
    thread.join()
    with pytest.raises(Interrupted, match="not wanted"):
        reader.read()
    reader.close()
    ingest.abort(RuntimeError())


def test_recover_removes_what_was_under_way(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    store.put(digest_of(b"kept"), b"kept")
    store.put(digest_of(b"gone"), b"gone")
    store.forget(digest_of(b"gone"))
    abandoned = store.ingest(digest_of(b"cut"), 3)
    abandoned.write([b"c"])
    again = ContentStore(tmp_path)
    assert again.recover() == 2
    assert files(tmp_path) == [f"blobs/sha256/{digest_of(b'kept')[7:]}"]
    abandoned.abort(RuntimeError())


def test_a_damaged_file_ends_early(tmp_path: Path) -> None:
    store = ContentStore(tmp_path)
    store.put(digest_of(b"data"), b"data")
    reader = store.open(digest_of(b"data"))
    store.path(digest_of(b"data")).write_bytes(b"")
    with pytest.raises(Interrupted, match="ends after 0 of 4"):
        reader.read()
    reader.close()
