"""Archives of checkpoints that come from anywhere: what is taken out of them, and what is refused."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tare.errors import InvalidArgument, ResourceExhausted
from tare.runtime import checkpoint_archive as archive
from tests.support.images import Directory, Node, Symlink, tar_of

GOOD: dict[str, Node] = {
    "config.dump": json.dumps({"name": "main", "rootfsImage": "busybox:1", "rootfsImageRef": "sha256:1"}),
    "spec.dump": "{}",
    "deleted.files": '["/gone"]',
    "checkpoint": Directory(),
    "checkpoint/inventory.img": b"image",
    "checkpoint/descriptors.json": '["/dev/null", "pipe:[1]", "file[1:2]"]',
    "artifacts/else": "what others have in theirs",
}


def take(base: Path, data: bytes) -> Path:
    (base / "x.tar").write_bytes(data)
    (directory := base / "taken").mkdir()
    archive.take(base / "x.tar", directory, "restore")
    return directory


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_what_is_needed_is_taken_and_read(tmp_path: Path, pack: Any) -> None:
    directory = take(tmp_path, pack(tar_of(GOOD)))
    names = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert names == set(GOOD) - {"checkpoint", "artifacts/else"}
    described = archive.read(directory, "restore")
    assert (described.name, described.image, described.image_ref) == ("main", "busybox:1", "sha256:1")
    assert described.deleted == ("/gone",) and described.streams == ("", "pipe:[1]", "file[1:2]")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("config.dump", "[]"),
        ("config.dump", '{"name": 1}'),
        ("deleted.files", '{"a": 1}'),
        ("deleted.files", "[1]"),
        ("checkpoint/descriptors.json", "[[]]"),
        ("spec.dump", "\udcff".encode("utf-8", "surrogateescape")),
    ],
)
def test_what_says_something_else_is_refused(tmp_path: Path, name: str, value: Node) -> None:
    directory = take(tmp_path, tar_of(GOOD | {name: value}))
    with pytest.raises(InvalidArgument):
        archive.read(directory, "restore")


def test_links_in_the_layer_of_an_image_are_refused(tmp_path: Path) -> None:
    directory = take(tmp_path, tar_of(GOOD))
    (directory / "checkpoint").rename(tmp_path / "elsewhere")
    (directory / "checkpoint").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidArgument, match="no directory"):
        archive.check(directory, "restore")


def test_many_files_and_big_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MOST_FILES", 3)
    with pytest.raises(InvalidArgument, match="more than 3 files"):
        take(tmp_path, tar_of(GOOD))
    monkeypatch.setattr(archive, "MOST_FILES", 100)
    monkeypatch.setattr(archive, "free", lambda _: 10)
    (tmp_path / "taken").rename(tmp_path / "before")
    with pytest.raises(ResourceExhausted):
        take(tmp_path, tar_of(GOOD))


@given(st.binary(max_size=2048), st.integers(0, 12_000))
def test_anything_else_is_refused_and_no_more(tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int) -> None:
    """An archive with some bytes of it changed is taken, or refused in words."""
    data = bytearray(tar_of({**GOOD, "checkpoint/link": Symlink("/etc/passwd")} if at % 7 == 0 else GOOD))
    data[at : at + len(noise)] = noise
    base = tmp_path_factory.mktemp("noise")
    with contextlib.suppress(InvalidArgument, ResourceExhausted):
        archive.read(take(base, bytes(data)), "restore")
    assert not any(path.is_symlink() for path in base.rglob("*"))
