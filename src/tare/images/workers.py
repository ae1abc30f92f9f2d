"""What pulls share: documents and layers that are being made, each once however many images have it."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tare.errors import NotFound, TareError
from tare.images.artifacts import DamagedBlob, assemble, names
from tare.images.auth import Unauthorized
from tare.images.downloads import Downloads, TryAgain
from tare.images.encryption import ENCRYPTED, Secret, unwrap
from tare.images.layers import unpack_blob
from tare.images.manifest import Descriptor, Index, Manifest, parse_manifest
from tare.images.records import LayerRecord
from tare.images.registry import Registry, WrongBytes, check_digest
from tare.images.store import ImageStore
from tare.images.threads import Shared, Syncer, in_thread, together
from tare.images.unpack import Limits, Unpacked

log = logging.getLogger(__name__)

UNPACKING = 8  # layers unpacked at one time, of all pulls together


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer of an image: its blob, its archive's digest, its place on the layers below, and what it takes to read it if it is encrypted."""

    blob: Descriptor
    diff_id: str
    chain_id: str
    parent: Layer | None
    secret: Secret | None = None

    def below(self) -> list[str]:
        """Chain IDs of the layers below, topmost first."""
        found, layer = [], self.parent
        while layer is not None:
            found.append(layer.chain_id)
            layer = layer.parent
        return found


class Workers:
    """Makes documents and layers come to be in one store. `keys_dir` has the private keys that encrypted layers are read with."""

    def __init__(self, store: ImageStore, keys_dir: Path, limits: Limits) -> None:
        self._limits = limits
        self.store = store
        self._keys_dir = keys_dir
        self._unpackers = ThreadPoolExecutor(UNPACKING, thread_name_prefix="images-unpack")
        self._downloads = Downloads(store.content, store.executor)
        self._syncer = Syncer(store.layers.sync, store.executor)
        self._documents: Shared[tuple[bytes, str]] = Shared()
        self._layers: Shared[None] = Shared()

    def close(self) -> None:
        """End the threads; after the last pull."""
        self._unpackers.shutdown()

    @property
    def received(self) -> int:
        """How many bytes of blobs have come since the daemon began."""
        return self._downloads.received

    @property
    def backlog(self) -> int:
        """How many layers wait for a thread to unpack them."""
        return self._unpackers._work_queue.qsize()

    async def document(self, digest: str, registry: Registry) -> Manifest | Index:
        """A manifest or index, from the store or the registry. Raises PullError."""
        data, content_type = await self._documents.run(digest, partial(self._document, digest, registry), Unauthorized)
        return parse_manifest(data, content_type)

    async def _document(self, digest: str, registry: Registry) -> tuple[bytes, str]:
        if (stored := await self._stored(digest)) is not None:
            return stored, ""
        data, content_type = await registry.document(digest)
        parse_manifest(data, content_type)  # what is none is not kept
        await in_thread(self.store.executor, partial(self.store.content.put, digest, data))
        return data, content_type

    async def configuration(self, descriptor: Descriptor, registry: Registry) -> bytes:
        """An image's configuration, from the store or the registry. Raises PullError."""
        work = partial(self._configuration, descriptor, registry)
        data, _ = await self._documents.run(descriptor.digest, work, Unauthorized)
        return data

    async def _configuration(self, descriptor: Descriptor, registry: Registry) -> tuple[bytes, str]:
        if (stored := await self._stored(descriptor.digest)) is not None:
            return stored, ""
        data = await registry.small_blob(descriptor)
        await in_thread(self.store.executor, partial(self.store.content.put, descriptor.digest, data))
        return data, ""

    async def _stored(self, digest: str) -> bytes | None:
        """A document that is in the store and undamaged."""
        if self.store.content.size(digest) is None:
            return None
        try:
            data = await in_thread(self.store.executor, partial(self.store.content.read, digest))
            check_digest(data, digest, "the store")
        except (NotFound, WrongBytes):
            self.store.content.forget(digest)
            return None
        return data

    async def secret(self, blob: Descriptor) -> Secret | None:
        """What it takes to read a layer; None where it is not encrypted. Raises Undecipherable."""
        if not blob.media_type.endswith(ENCRYPTED):
            return None
        return await in_thread(
            self.store.executor, partial(unwrap, blob.digest, blob.annotations or {}, self._keys_dir)
        )

    async def artifact(self, digest: str, manifest: Manifest, registry: Registry, slots: asyncio.Semaphore) -> None:
        """An artifact's directory in place, under the digest of its manifest. `slots` as for `layer`. Raises PullError, OSError."""
        if self.store.layers.get(digest) is None:
            await self._layers.run(digest, partial(self._artifact, digest, manifest, registry, slots), Unauthorized)

    async def _artifact(self, digest: str, manifest: Manifest, registry: Registry, slots: asyncio.Semaphore) -> None:
        store, blobs = self.store, {blob.digest: blob for blob in manifest.blobs}
        names(manifest.layers)  # titles that cannot be are refused before anything comes
        while True:
            stored = set(store.content.sizes())
            await together(self.blob(blob, registry, slots) for blob in blobs.values())
            try:
                directory, made = await self.assembled(manifest)
                break
            except DamagedBlob as error:
                if error.digest not in stored:
                    raise
                store.content.forget(error.digest)
        try:
            await self._syncer.sync()
            await in_thread(store.executor, partial(store.layers.place, directory, made, digest, ()))
        except BaseException:
            await in_thread(store.executor, partial(shutil.rmtree, directory, ignore_errors=True))
            raise
        store.layers.record(LayerRecord(chain_id=digest, diff_id=digest, parent="", size=made.size, inodes=made.inodes))

    async def assembled(self, manifest: Manifest) -> tuple[Path, Unpacked]:
        """An artifact made of the store's blobs in a directory of its own, which is the caller's to remove. Raises DamagedBlob, OSError."""
        directory, store = self.store.layers.new_directory(), self.store
        listed = [(path, blob.digest, store.content.path(blob.digest)) for path, blob in names(manifest.layers).items()]
        return directory, await in_thread(self._unpackers, partial(assemble, directory, listed))

    async def blob(self, blob: Descriptor, registry: Registry, slots: asyncio.Semaphore) -> None:
        """A blob in the content store, from other hosts where one sends wrong bytes."""
        while True:
            try:
                async with slots, self._downloads.reading(blob, registry):
                    return
            except TryAgain:
                continue
            except WrongBytes as error:
                left = registry.without(error.hosts)
                if left is None:
                    raise
                registry = left

    def space(self, layers: Iterable[Layer]) -> int:
        """About how many bytes it takes to bring these layers: what is missing of their blobs, and no less than so much again unpacked."""
        lacking = [layer.blob for layer in layers if self.store.layers.get(layer.chain_id) is None]
        return sum(blob.size for blob in lacking) + self.missing(lacking)

    def missing(self, blobs: Iterable[Descriptor]) -> int:
        """How many bytes of blobs are not in the store."""
        return sum({blob.digest: blob.size for blob in blobs if self.store.content.size(blob.digest) is None}.values())

    def progress(self, layer: Layer) -> tuple[int, str]:
        """How many bytes of a layer's blob are here, and whether it is "waiting", "downloading", "unpacking" or "done"."""
        size, written = layer.blob.size, self._downloads.progress(layer.blob.digest)
        if self.store.layers.get(layer.chain_id) is not None:
            return size, "done"
        if written is not None and written < size:
            return written, "downloading"
        if written is not None or self.store.content.size(layer.blob.digest) is not None:
            return size, "unpacking" if layer.chain_id in self._layers.running() else "waiting"
        return 0, "waiting"

    def coming(self, blob: Descriptor) -> tuple[int, str]:
        """As `progress`, of a blob that is not unpacked: an artifact's."""
        if self.store.content.size(blob.digest) is not None:
            return blob.size, "done"
        written = self._downloads.progress(blob.digest)
        return (0, "waiting") if written is None else (written, "downloading")

    async def layer(self, layer: Layer, registry: Registry, slots: asyncio.Semaphore) -> None:
        """A layer, and those below it, in place. `slots` bounds how many layers this pull has coming at one time. Raises PullError, OSError."""
        if self.store.layers.get(layer.chain_id) is None:
            await self._layers.run(layer.chain_id, partial(self._layer, layer, registry, slots), Unauthorized)

    async def _layer(self, layer: Layer, registry: Registry, slots: asyncio.Semaphore) -> None:
        store = self.store
        directory = store.layers.new_directory()
        try:
            async with slots:
                unpacked = await self._unpack(layer, registry, directory)
            await self._syncer.sync()
            if layer.parent is not None:
                await self.layer(layer.parent, registry, slots)
            place = partial(store.layers.place, directory, unpacked, layer.chain_id, layer.below())
            await in_thread(store.executor, place)
        except BaseException:
            await in_thread(store.executor, partial(shutil.rmtree, directory, ignore_errors=True))
            raise
        log.info("layer %s: unpacked, %d bytes from a blob of %d", layer.chain_id, unpacked.size, layer.blob.size)
        store.layers.record(
            LayerRecord(
                chain_id=layer.chain_id,
                diff_id=layer.diff_id,
                parent=layer.parent.chain_id if layer.parent else "",
                size=unpacked.size,
                inodes=unpacked.inodes,
            )
        )

    async def unpacked(self, layer: Layer, registry: Registry) -> tuple[Path, Unpacked]:
        """A layer unpacked once more, in a directory of its own that is the caller's to remove. Raises PullError, OSError."""
        directory = self.store.layers.new_directory()
        return directory, await self._unpack(layer, registry, directory)

    async def _unpack(self, layer: Layer, registry: Registry, directory: Path) -> Unpacked:
        """Download and unpack; from other hosts where one sends wrong bytes, and anew where the store's own copy is damaged."""
        while True:
            stored = self.store.content.size(layer.blob.digest) is not None
            try:
                async with self._downloads.reading(layer.blob, registry) as reader:
                    work = partial(unpack_blob, reader, layer.diff_id, directory, layer.secret, self._limits)
                    unpacked = await in_thread(self._unpackers, work, reader.stop)
                return unpacked
            except TryAgain:
                pass
            except WrongBytes as error:
                left = registry.without(error.hosts)
                if left is None:
                    raise
                registry = left
            except TareError:
                if not stored:
                    raise
                self.store.content.forget(layer.blob.digest)
            await in_thread(self.store.executor, partial(shutil.rmtree, directory, ignore_errors=True))
