"""`tare image verify` and `repair`: is what is stored of an image what its digests say, and if not, that part of it made anew.

    blobs    documents and layers' blobs, each read and hashed
    layers   each unpacked once more from its blob, beside it, and compared; a repair puts the fresh one in its place.
             An artifact's directory is made once more of its blobs.

A repair takes blobs from the store where they are sound and from the registry where they are not. A layer that containers stand
on is not replaced under them.
"""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from tare.errors import FailedPrecondition, NotFound
from tare.images.auth import RegistryAuth
from tare.images.compare import differences
from tare.images.importing import Absent
from tare.images.inherit import inherit
from tare.images.pull import Pull, fetch
from tare.images.records import ImageRecord, LayerRecord
from tare.images.reference import Reference, parse
from tare.images.registry import Registry
from tare.images.service import NAMELESS, ImageService
from tare.images.store import ImageStore
from tare.images.threads import in_thread
from tare.images.unpack import Unpacked
from tare.images.workers import Layer

SHOWN_DIFFERENCES = 3
PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of one look: `kind` is "blob" or "layer", `name` its digest or chain ID, `trouble` "" where all is well."""

    image_id: str
    kind: str
    name: str
    trouble: str = ""
    repaired: bool = False


class Verifier:
    """Over one image service."""

    def __init__(self, images: ImageService) -> None:
        self._images = images
        self._store = images.store

    async def verify(self, texts: Sequence[str]) -> AsyncGenerator[Finding]:
        """All that is stored of these images, of all images where none is named. Raises NotFound, InvalidArgument, OSError."""
        images = [self._image(text) for text in texts] or self._images.list()
        for image in images:
            pull = self._pull(image, Absent(NAMELESS, self._images.executor))
            pull.hold((*image.chain_ids, *image.documents, *image.layer_digests))
            try:
                async for finding in self._verify(image, pull):
                    yield finding
            finally:
                pull.release()

    async def _verify(self, image: ImageRecord, pull: Pull) -> AsyncGenerator[Finding]:
        damaged = set[str]()
        for digest in (*image.documents, *image.layer_digests):
            trouble = await in_thread(self._store.executor, partial(blob_trouble, self._store, digest))
            if trouble:
                damaged.add(digest)
                if self._store.content.size(digest) is None and not self._images.config.keep_blobs:
                    continue
            yield Finding(image.id, "blob", digest, trouble)
        if damaged.intersection(image.documents):
            return
        await fetch(pull)
        for layer in directories(image, pull):
            if layer.blob.digest not in damaged:
                directory, _, trouble = await self._compared(layer, pull)
                await in_thread(self._store.executor, partial(shutil.rmtree, directory))
                yield Finding(image.id, "layer", layer.chain_id, trouble)

    async def repair(self, text: str, auth: RegistryAuth | None) -> AsyncGenerator[Finding]:
        """Make what is damaged of an image anew; tells of what was. Raises NotFound, FailedPrecondition, PullError, OSError."""
        image = self._image(text)
        registry = await self._registry(image, auth)
        pull = self._pull(image, registry)
        pull.hold((*image.chain_ids, *image.documents, *image.layer_digests))
        try:
            async for finding in self._repair(image, pull):
                yield finding
        finally:
            pull.release()
            await self._store.collect()

    async def _repair(self, image: ImageRecord, pull: Pull) -> AsyncGenerator[Finding]:
        for digest in (*image.documents, *image.layer_digests):
            trouble = await in_thread(self._store.executor, partial(blob_trouble, self._store, digest))
            if trouble:
                self._store.content.forget(digest)
                if digest in image.documents:
                    yield Finding(image.id, "blob", digest, trouble, repaired=True)
        await fetch(pull)
        await self._documents(image, pull)
        slots = asyncio.Semaphore(pull.parallel_layers)
        kept = [layer.blob for layer in pull.layers] if self._images.config.keep_blobs else []
        for blob in pull.artifact.blobs if pull.artifact is not None else kept:
            if self._store.content.size(blob.digest) is None:
                await self._images.workers.blob(blob, pull.registry, slots)
                if pull.artifact is None:
                    yield Finding(image.id, "blob", blob.digest, "it was damaged or missing", repaired=True)
        for layer in directories(image, pull):
            directory, unpacked, trouble = await self._compared(layer, pull)
            try:
                if trouble:
                    await self._replace(layer, directory, unpacked)
                    yield Finding(image.id, "layer", layer.chain_id, trouble, repaired=True)
            finally:
                await in_thread(self._store.executor, partial(shutil.rmtree, directory, ignore_errors=True))

    async def _documents(self, image: ImageRecord, pull: Pull) -> None:
        """Indexes above the manifest, which `fetch` does not come by."""
        blobs = pull.artifact.blobs if pull.artifact is not None else ()
        others = {image.id, image.manifest, *(blob.digest for blob in blobs)}
        for digest in image.documents:
            if digest not in others and self._store.content.size(digest) is None:
                await self._images.workers.document(digest, pull.registry)

    async def _compared(self, layer: Layer, pull: Pull) -> tuple[Path, Unpacked, str]:
        """The layer made anew, and what is wrong with the one in place."""
        workers = self._images.workers
        if pull.artifact is not None:
            directory, unpacked = await workers.assembled(pull.artifact)
        else:
            directory, unpacked = await workers.unpacked(layer, pull.registry)
        try:
            below = [self._store.layers.path(chain_id) for chain_id in layer.below()]
            await in_thread(self._store.executor, partial(inherit, directory, unpacked.implied, below))
            here = self._store.layers.path(layer.chain_id)
            trouble = await in_thread(self._store.executor, partial(layer_trouble, here, directory, unpacked.implied))
        except BaseException:
            await in_thread(self._store.executor, partial(shutil.rmtree, directory, ignore_errors=True))
            raise
        return directory, unpacked, trouble

    async def _replace(self, layer: Layer, directory: Path, unpacked: Unpacked) -> None:
        store = self._store
        if layer.chain_id in store.in_use():
            raise FailedPrecondition(
                f"repair layer {layer.chain_id}", cause="containers stand on it", hint="remove them first"
            )
        await in_thread(store.executor, store.layers.sync)
        await in_thread(store.executor, partial(store.layers.place, directory, unpacked, layer.chain_id, layer.below()))
        store.layers.record(
            LayerRecord(
                chain_id=layer.chain_id,
                diff_id=layer.diff_id,
                parent=layer.parent.chain_id if layer.parent else "",
                size=unpacked.size,
                inodes=unpacked.inodes,
            )
        )

    def _image(self, text: str) -> ImageRecord:
        image = self._images.find(text)
        if image is None:
            raise NotFound(f"there is no image {text} here")
        return image

    async def _registry(self, image: ImageRecord, auth: RegistryAuth | None) -> Registry:
        """Where the image came from; nowhere for one that was loaded."""
        if not image.repo_digests:
            return Absent(NAMELESS, self._images.executor)
        return await self._images.registries.of(parse(image.repo_digests[0]), auth)

    def _pull(self, image: ImageRecord, registry: Registry) -> Pull:
        reference: Reference = registry.reference
        pull = self._images.subject(reference, registry)
        pull.digest = image.manifest
        return pull


def directories(image: ImageRecord, pull: Pull) -> list[Layer]:
    """The image's layers; for an artifact its one directory, in a layer's form."""
    if pull.artifact is None:
        return pull.layers
    return [Layer(pull.artifact.config, image.id, image.id, None)]


def blob_trouble(store: ImageStore, digest: str) -> str:
    """What is wrong with a blob, "" where nothing is. Blocks."""
    if store.content.size(digest) is None:
        return "it is missing"
    found = hashlib.new(digest.partition(":")[0])
    try:
        with store.content.path(digest).open("rb") as file:
            while data := file.read(PIECE):
                found.update(data)
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    actual = found.hexdigest()
    return "" if digest.endswith(f":{actual}") else f"its bytes have the digest {actual[:13]}…"


def layer_trouble(here: Path, fresh: Path, implied: frozenset[bytes]) -> str:
    """What is wrong with a layer's directory, "" where nothing is. Blocks."""
    if not here.is_dir():
        return "it is missing"
    try:
        found = list(islice(differences(here, fresh, implied), SHOWN_DIFFERENCES))
    except OSError as error:
        return f"it cannot be read: {error.strerror} {error.filename or ''}".rstrip()
    return "; ".join(found)
