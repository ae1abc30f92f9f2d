"""Which image a name means, how names move between images, and what is garbage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tare.errors import InvalidArgument
from tare.images.collect import garbage, with_ancestors
from tare.images.names import arrive, by_digest, find, named, origin
from tare.images.records import ImageConfig, ImageRecord, LayerRecord
from tare.images.reference import parse


def digest(letter: str) -> str:
    return f"sha256:{letter * 64}"


def image(letter: str, *tags: str, digests: tuple[str, ...] = (), layers: str = "", created: int = 1) -> ImageRecord:
    return ImageRecord(
        id=digest(letter),
        repo_tags=tags,
        repo_digests=digests,
        size=1,
        config=ImageConfig(),
        chain_ids=tuple(map(digest, layers)),
        created_at=created,
        layer_digests=tuple(map(digest, layers)),
        documents=(digest(letter),),
    )


def layer(letter: str, parent: str = "") -> LayerRecord:
    return LayerRecord(chain_id=digest(letter), diff_id="", parent=digest(parent) if parent else "", size=1, inodes=1)


def by_id(*images: ImageRecord) -> dict[str, ImageRecord]:
    return {image.id: image for image in images}


A = image("a", "docker.io/library/busybox:latest", digests=(f"docker.io/library/busybox@{digest('1')}",))
B = image("b", "quay.io/x/y:1", "quay.io/x/y:2")
KNOWN = by_id(A, B, image("c"), image("d"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("busybox", A),
        ("docker.io/library/busybox:latest", A),
        (f"busybox@{digest('1')}", A),
        (f"busybox:latest@{digest('1')}", A),
        (f"quay.io/x/y@{digest('1')}", None),
        (f"busybox@{digest('2')}", None),
        ("busybox:2", None),
        ("quay.io/x/y:2", B),
        ("quay.io/x/y", None),
        (digest("a"), A),
        ("b" * 64, B),
        ("b" * 12, B),
        ("bbbb", B),
        ("sha256:bbbbbb", B),
        ("bbb", None),
        ("ffff", None),
        (digest("f"), None),
    ],
)
def test_find(text: str, expected: ImageRecord | None) -> None:
    assert find(KNOWN, text) == expected


@pytest.mark.parametrize("text", ["", "UPPER", "x@sha256:1", "a//b"])
def test_find_refuses_what_is_no_name(text: str) -> None:
    with pytest.raises(InvalidArgument, match="malformed"):
        find(KNOWN, text)


def test_a_beginning_of_several_ids_is_ambiguous() -> None:
    first, second = "sha256:abcd" + "0" * 60, "sha256:abcd" + "1" * 60
    images = {name: image("a") for name in (first, second)}
    with pytest.raises(InvalidArgument, match="2 image IDs begin so"):
        find(images, "abcd")
    assert find(images, "abcd0") is images[first]


def test_a_name_wins_over_a_beginning() -> None:
    images = by_id(image("b"), image("e", "docker.io/library/bbbb:latest"))
    assert find(images, "bbbb") is images[digest("e")]


def test_names_of_a_pull() -> None:
    record = named(A, parse("busybox:1"), digest("3"))
    assert record.repo_tags == ("docker.io/library/busybox:1", "docker.io/library/busybox:latest")
    assert record.repo_digests == (
        f"docker.io/library/busybox@{digest('1')}",
        f"docker.io/library/busybox@{digest('3')}",
    )
    by_number = named(image("f"), parse(f"busybox@{digest('3')}"), digest("3"))
    assert (by_number.repo_tags, by_number.repo_digests) == ((), (f"docker.io/library/busybox@{digest('3')}",))


def test_where_a_container_says_that_its_image_is_from() -> None:
    known = tuple(f"{name}@{digest(d)}" for name, d in (("a.io/x", "1"), ("b.io/x", "1"), ("b.io/x", "2")))
    several = replace(image("a", digests=known), manifest=digest("1"))
    assert origin(several, "a.io/x:1") == f"a.io/x@{digest('1')}"
    assert origin(several, "b.io/x:1") == f"b.io/x@{digest('2')}"
    assert origin(several, "c.io/x") == origin(several, several.id) == f"b.io/x@{digest('2')}"
    assert origin(image("a"), "a.io/x") == digest("a")


def test_an_image_is_known_by_a_manifests_digest() -> None:
    assert by_digest(KNOWN.values(), digest("1")) == A
    assert by_digest(KNOWN.values(), digest("2")) is None


def test_two_tags_of_one_image_merge() -> None:
    (merged,) = arrive(by_id(image("a", "r/x:1", created=5)), image("a", "r/x:2", created=9))
    assert (merged.repo_tags, merged.created_at) == (("r/x:1", "r/x:2"), 5)


def test_a_tag_that_moves_leaves_the_old_image_untagged() -> None:
    old = image("a", "r/x:1", "r/x:2", digests=(f"r/x@{digest('1')}",))
    new, loser = arrive(by_id(old, image("b", "r/y:1")), image("c", "r/x:1"))
    assert new.repo_tags == ("r/x:1",)
    assert (loser.id, loser.repo_tags, loser.repo_digests) == (old.id, ("r/x:2",), old.repo_digests)


def test_garbage_is_what_nobody_wants() -> None:
    layers = {
        record.chain_id: record for record in (layer("1"), layer("2", "1"), layer("3"), layer("4", "3"), layer("5"))
    }
    images = [image("a", layers="12")]
    blobs = [digest(letter) for letter in "a12345f"]
    dead_layers, dead_blobs = garbage(
        images, layers, blobs, held={digest("5"), digest("f")}, in_use={digest("4")}, keep_layer_blobs=True
    )
    assert dead_layers == set()
    assert dead_blobs == {digest("3"), digest("4")}
    dead_layers, dead_blobs = garbage(images, layers, blobs, held=(), in_use=(), keep_layer_blobs=False)
    assert dead_layers == {digest("3"), digest("4"), digest("5")}
    assert dead_blobs == set(blobs) - {digest("a")}


def test_ancestors() -> None:
    layers = {record.chain_id: record for record in (layer("1"), layer("2", "1"), layer("3", "2"))}
    assert with_ancestors([digest("3")], layers) == {digest("1"), digest("2"), digest("3")}
    assert with_ancestors([digest("9")], layers) == {digest("9")}
