"""Which image a name means, and what happens to names when an image comes or is tagged. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from tare.errors import InvalidArgument
from tare.images.records import ImageRecord
from tare.images.reference import Reference, parse

SHORTEST_PREFIX = 4
_ID = re.compile(r"(?:sha256:)?([0-9a-f]{64})")
_PREFIX = re.compile(rf"(?:sha256:)?([0-9a-f]{{{SHORTEST_PREFIX},63}})")


def find(images: Mapping[str, ImageRecord], text: str) -> ImageRecord | None:
    """The image (by ID in `images`) that `text` means: its ID, a tag, a digest, or, where no name fits, the only ID that begins so.

    Raises InvalidArgument for what is no name, and for a beginning of several IDs.
    """
    if whole := _ID.fullmatch(text):
        return images.get(f"sha256:{whole[1]}")
    prefix = _PREFIX.fullmatch(text)
    reference = parse(text)
    for image in images.values():
        if reference.tagged in image.repo_tags or (
            reference.digest and reference.at(reference.digest) in image.repo_digests
        ):
            return image
    if prefix is None:
        return None
    fitting = [image for image_id, image in images.items() if image_id.startswith(f"sha256:{prefix[1]}")]
    if len(fitting) > 1:
        raise InvalidArgument(
            f"find image {text}",
            cause=f"{len(fitting)} image IDs begin so: {', '.join(image.id[:23] for image in fitting[:4])}",
            hint="write more of the ID",
        )
    return fitting[0] if fitting else None


def by_digest(images: Iterable[ImageRecord], digest: str) -> ImageRecord | None:
    """The image that a registry's name once stood for by this digest of a manifest or an index."""
    suffix = f"@{digest}"
    return next((image for image in images if any(name.endswith(suffix) for name in image.repo_digests)), None)


def origin(image: ImageRecord, asked: str) -> str:
    """repository@digest: what the repository that was asked for stood for, or, where the image is not known by that, another's; else its ID.

    This is what CRI calls ContainerStatus.image_ref; a kubelet shows it as the container's imageID.
    """
    try:
        name = parse(asked).name
    except InvalidArgument:
        name = ""
    # That repository's first, and of its digests an index's before that of the manifest in it.
    order = {text: (text.partition("@")[0] != name, text.endswith(f"@{image.manifest}")) for text in image.repo_digests}
    return min(order, key=lambda text: order[text], default=image.id)


def named(image: ImageRecord, reference: Reference, digest: str) -> ImageRecord:
    """The image with the names that a pull of `reference`, which stood for `digest`, gives it."""
    tags = {*image.repo_tags, reference.tagged} - {None}
    return replace(
        image,
        repo_tags=tuple(sorted(tag for tag in tags if tag)),
        repo_digests=tuple(sorted({*image.repo_digests, reference.at(digest)})),
    )


def arrive(images: Mapping[str, ImageRecord], new: ImageRecord) -> list[ImageRecord]:
    """The records to write when `new` has come: itself, merged with what was known of it, and those that lose a tag to it."""
    changed = []
    for image in images.values():
        kept = tuple(tag for tag in image.repo_tags if tag not in new.repo_tags)
        if image.id != new.id and kept != image.repo_tags:
            changed.append(replace(image, repo_tags=kept))
    known = images.get(new.id)
    if known is not None:
        new = replace(
            new,
            repo_tags=tuple(sorted({*known.repo_tags, *new.repo_tags})),
            repo_digests=tuple(sorted({*known.repo_digests, *new.repo_digests})),
            documents=tuple(sorted({*known.documents, *new.documents})),
            created_at=known.created_at,
            used_at=known.used_at,
        )
    return [new, *changed]


def pinned(image: ImageRecord, globs: Iterable[str]) -> ImageRecord:
    """The image with `pinned` as these globs have it, each matched against its tags, its digests and its ID."""
    names = (*image.repo_tags, *image.repo_digests, image.id)
    return replace(image, pinned=any(fnmatchcase(name, glob) for glob in globs for name in names))
