"""Which images go when the disk is full, and which never do."""

from __future__ import annotations

import pytest

from tare.images.collect import excess, victims
from tare.images.names import pinned
from tare.images.records import ImageConfig, ImageRecord, LayerRecord


def image(name: str, *chain: str, tag: bool = True, used_at: int = 0, created_at: int = 1) -> ImageRecord:
    return ImageRecord(
        id=f"sha256:{name}",
        repo_tags=(f"r.io/{name}:1",) if tag else (),
        repo_digests=(f"r.io/{name}@sha256:{name}",),
        size=1,
        config=ImageConfig(),
        chain_ids=chain,
        layer_digests=tuple(f"blob-{layer}" for layer in chain),
        used_at=used_at,
        created_at=created_at,
    )


def layers(*chains: tuple[str, ...]) -> dict[str, LayerRecord]:
    found = {}
    for chain in chains:
        for parent, name in zip(("", *chain), chain, strict=False):
            found[name] = LayerRecord(chain_id=name, diff_id=name, parent=parent, size=100, inodes=1)
    return found


LAYERS = layers(("base", "a"), ("base", "b"), ("c",))
BLOBS = {f"blob-{name}": 10 for name in LAYERS}
A, B, C = image("a", "base", "a", used_at=3), image("b", "base", "b", used_at=2), image("c", "c", used_at=1)


def chosen(*images: ImageRecord, needed: int = 1, before: int = 100, tagged: bool = True, used: str = "") -> list[str]:
    in_use = {used} if used else set()
    found = victims(images, LAYERS, BLOBS, in_use=in_use, needed=needed, before=before, tagged_too=tagged)
    return [name.removeprefix("sha256:") for name in found]


@pytest.mark.parametrize(("available", "expected"), [(160, 0), (150, 50), (0, 200), (199, 0)])
def test_how_much_is_to_be_freed(available: int, expected: int) -> None:
    assert excess(1000, available, 85, 80) == expected


def test_a_disk_of_no_size_is_not_full() -> None:
    assert excess(0, 0, 85, 80) == 0


def test_the_longest_unused_go_first_and_no_more_than_needed() -> None:
    assert chosen(A, B, C, needed=1) == ["c"]
    assert chosen(A, B, C, needed=110) == ["c"]
    assert chosen(A, B, C, needed=111) == ["c", "b"]
    # b alone frees 110, for the base stays with a
    assert chosen(A, B, C, needed=221) == ["c", "b", "a"]


def test_what_never_goes() -> None:
    assert chosen(A, B, C, needed=1000, used="a") == ["c", "b"]
    assert chosen(A, B, C, needed=1000, before=2) == ["c"]
    assert chosen(A, B, C, needed=1000, tagged=False) == []
    assert chosen(image("c", "c", tag=False), A, needed=1000, tagged=False) == ["c"]
    assert chosen(pinned(C, ("r.io/c:*",)), needed=1000) == []


@pytest.mark.parametrize(
    ("glob", "expected"), [("r.io/a:1", True), ("r.io/*", True), ("*/a@*", True), ("r.io/b*", False), ("", False)]
)
def test_globs_pin(glob: str, expected: bool) -> None:
    assert pinned(A, (glob,)).pinned is expected
