"""Which tags have moved at their registries: one HEAD request for each, and nothing fetched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from tare.errors import NotFound, TareError, describe
from tare.images.auth import RegistryAuth, credentials_for
from tare.images.records import ImageRecord
from tare.images.reference import Reference, parse
from tare.images.service import ImageService

AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Freshness:
    """A tag, the image that has it, the digests that it stood for when that came and stands for now, or why one is not known."""

    name: str
    image_id: str
    here: str = ""
    there: str = ""
    trouble: str = ""


async def freshness(
    images: ImageService, texts: Sequence[str], auths: Sequence[RegistryAuth]
) -> AsyncGenerator[Freshness]:
    """Of the tags of these images (of all where none is named), in the order in which registries answer. Raises NotFound, InvalidArgument."""
    slots = asyncio.Semaphore(AT_ONCE)

    async def ask(image: ImageRecord, reference: Reference) -> Freshness:
        here = known_digest(image, reference)
        if not here:
            return Freshness(str(reference), image.id, trouble="it was not pulled from a registry")
        auth = next((auth for auth in auths if credentials_for(auth, reference.domain)), None)
        try:
            async with slots:
                registry = await images.registries.of(reference, auth)
                there = await registry.resolve()
        except (TareError, OSError) as error:
            return Freshness(str(reference), image.id, here, trouble=describe(error))
        return Freshness(str(reference), image.id, here, there)

    tasks = [asyncio.ensure_future(ask(image, reference)) for image, reference in tags(images, texts)]
    try:
        for task in asyncio.as_completed(tasks):
            yield await task
    finally:
        for pending in tasks:
            pending.cancel()


def tags(images: ImageService, texts: Sequence[str]) -> list[tuple[ImageRecord, Reference]]:
    """The tags that are asked about. Raises NotFound, InvalidArgument."""
    if not texts:
        return [(image, parse(tag)) for image in images.list() for tag in image.repo_tags]
    found = []
    for text in texts:
        image = images.find(text)
        if image is None:
            raise NotFound(f"there is no image {text} here")
        named = [] if image.id.removeprefix("sha256:").startswith(text.removeprefix("sha256:")) else [parse(text)]
        found += [(image, reference) for reference in named or map(parse, image.repo_tags)]
    return found


def known_digest(image: ImageRecord, reference: Reference) -> str:
    """What the repository of a reference stands for here; "" where the image did not come from it."""
    known = (parse(text) for text in image.repo_digests)
    return next((name.digest for name in known if name.name == reference.name and name.digest), "")
