"""What pulls share: documents and layers that are being made, each once however many images have it."""

from __future__ import annotations

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tare.errors import NotFound, TareError
from tare.images.auth import Unauthorized
from tare.images.downloads import Downloads, OthersRefusal
from tare.images.layers import unpack_blob
from tare.images.manifest import Descriptor, Index, Manifest, parse_manifest
from tare.images.records import LayerRecord
from tare.images.registry import Registry, WrongBytes, check_digest
from tare.images.store import ImageStore
from tare.images.threads import Shared, Syncer, in_thread
from tare.images.unpack import Unpacked

UNPACKING = 8  # layers unpacked at one time, of all pulls together


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer of an image: its blob, its archive's digest, and its place on the layers below."""

    blob: Descriptor
    diff_id: str
    chain_id: str
    parent: Layer | None

    def below(self) -> list[str]:
        """Chain IDs of the layers below, topmost first."""
        found, layer = [], self.parent
        while layer is not None:
            found.append(layer.chain_id)
            layer = layer.parent
        return found


class Workers:
    """Makes documents and layers come to be in one store."""

    def __init__(self, store: ImageStore) -> None:
        self.store = store
        self._unpackers = ThreadPoolExecutor(UNPACKING, thread_name_prefix="images-unpack")
        self._downloads = Downloads(store.content, store.executor)
        self._syncer = Syncer(store.layers.sync, store.executor)
        self._documents: Shared[tuple[bytes, str]] = Shared()
        self._layers: Shared[None] = Shared()

    def close(self) -> None:
        """End the threads; after the last pull."""
        self._unpackers.shutdown()

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
        store.layers.record(
            LayerRecord(
                chain_id=layer.chain_id,
                diff_id=layer.diff_id,
                parent=layer.parent.chain_id if layer.parent else "",
                size=unpacked.size,
                inodes=unpacked.inodes,
            )
        )

    async def _unpack(self, layer: Layer, registry: Registry, directory: Path) -> Unpacked:
        """Download and unpack; from other hosts where one sends wrong bytes, and anew where the store's own copy is damaged."""
        while True:
            stored = self.store.content.size(layer.blob.digest) is not None
            try:
                async with self._downloads.reading(layer.blob, registry) as reader:
                    work = partial(unpack_blob, reader, layer.diff_id, directory)
                    unpacked = await in_thread(self._unpackers, work, reader.stop)
                return unpacked
            except OthersRefusal:
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
