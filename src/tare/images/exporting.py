"""`tare save`: images from the store as one tar archive, an OCI layout that keeps every digest (`archive.py`).

Of an index only this machine's image is there, which the layout's readers accept as long as they ask for no other. The bytes
of an archive depend on nothing but its images and their names.
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from tare.errors import NotFound
from tare.images import archive
from tare.images.manifest import Descriptor, Manifest, document_type, parse_manifest
from tare.images.records import ImageRecord
from tare.images.reference import Reference, parse
from tare.images.store import ImageStore
from tare.images.threads import in_thread

PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Saved:
    """An image and the names that it is to have in the archive."""

    image: ImageRecord
    names: tuple[Reference, ...]


def saved(images: Iterable[tuple[str, ImageRecord]]) -> list[Saved]:
    """The images that were asked for by these texts, each once: with the names asked for, or, where that was an ID, with all tags."""
    names: dict[str, tuple[ImageRecord, list[Reference]]] = {}
    for text, image in images:
        found = names.setdefault(image.id, (image, []))[1]
        asked = None if is_id(text, image) else parse(text)
        tags = [parse(tag) for tag in image.repo_tags] if asked is None else [asked]
        found += [name for name in tags if name not in found]
    return [Saved(image, tuple(found)) for image, found in names.values()]


def is_id(text: str, image: ImageRecord) -> bool:
    """Was the image named by (the beginning of) its ID?"""
    return image.id.removeprefix("sha256:").startswith(text.removeprefix("sha256:"))


def root_of(image: ImageRecord, name: Reference | None) -> str:
    """The digest that a name stood for at its registry, else that of the image's manifest."""
    known = {parse(text).name: parse(text).digest for text in image.repo_digests}
    if name is None:
        return next((digest for digest in known.values() if digest), image.manifest)
    return name.digest or known.get(name.name) or image.manifest


async def archive_of(store: ImageStore, images: Sequence[Saved], *, docker: bool) -> AsyncGenerator[bytes]:
    """The archive, piece by piece. All blobs must be in the store and held. Raises NotFound for one that is not."""
    index: list[tuple[Descriptor, Reference | None]] = []
    listed, blobs = [], set[str]()
    for item in images:
        image = item.image
        for name in item.names or (None,):
            digest = root_of(image, name)
            data = await in_thread(store.executor, partial(store.content.read, digest))
            index.append((Descriptor(digest=digest, size=len(data), media_type=document_type(data)), name))
        manifest = await in_thread(store.executor, partial(manifest_of, store, image))
        layers = [layer.digest for layer in manifest.layers]
        blobs.update((*image.documents, *layers))
        listed.append((image.id, layers, [name.tagged for name in item.names if name.tagged]))
    yield member("oci-layout", archive.LAYOUT)
    yield member("index.json", archive.made_index(index))
    if docker:
        yield member("manifest.json", archive.made_docker(listed))
    for digest in sorted(blobs):
        async for piece in blob_pieces(store, digest):
            yield piece
    yield bytes(2 * archive.BLOCK)


def manifest_of(store: ImageStore, image: ImageRecord) -> Manifest:
    """An image's manifest, from the store. Raises NotFound, ManifestError. Blocks."""
    document = parse_manifest(store.content.read(image.manifest))
    if not isinstance(document, Manifest):
        raise NotFound(f"manifest of image {image.id}")
    return document


def member(path: str, data: bytes) -> bytes:
    """A small file of the archive."""
    return archive.tar_header(path, len(data)) + data + bytes(-len(data) % archive.BLOCK)


async def blob_pieces(store: ImageStore, digest: str) -> AsyncGenerator[bytes]:
    """A blob as a file of the archive. Raises NotFound."""
    size = store.content.size(digest)
    if size is None:
        raise NotFound(f"blob {digest}", cause="it is not kept here (setting keep_blobs)")
    yield archive.tar_header(archive.blob_path(digest), size)
    descriptor = os.open(store.content.path(digest), os.O_RDONLY | os.O_CLOEXEC)
    try:
        offset = 0
        while offset < size:
            piece = await in_thread(store.executor, partial(os.pread, descriptor, PIECE, offset))
            if not piece:
                raise NotFound(f"blob {digest}", cause=f"its file ends after {offset} of {size} bytes")
            yield piece
            offset += len(piece)
    finally:
        os.close(descriptor)
    if size % archive.BLOCK:
        yield bytes(-size % archive.BLOCK)
