"""What of images is on this machine: their records, their layers, their blobs, and who needs what.

Used from the event loop, which owns the database; what blocks goes to threads from here. A pull `hold`s the digests and
chain IDs that it works on, so that nothing is collected under it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from functools import partial
from pathlib import Path

from tare.images.collect import garbage
from tare.images.layers import LayerStore
from tare.images.names import arrive
from tare.images.records import ImageRecord, Usage
from tare.images.threads import in_thread
from tare.state.database import Database
from tare.storage.content import ContentStore

log = logging.getLogger(__name__)


class ImageStore:
    """Images, layers and blobs under one root directory. `in_use` gives the chain IDs of layers that containers stand on."""

    def __init__(
        self, database: Database, root: Path, *, keep_blobs: bool, in_use: Callable[[], set[str]], executor: Executor
    ) -> None:
        self.content = ContentStore(root)
        self.layers = LayerStore(root, database)
        self.executor = executor
        self._root = root
        self._database = database
        self._keep_blobs = keep_blobs
        self._in_use = in_use
        self._table = database.table("images", ImageRecord)
        self._images = dict(self._table.items())
        self._held: Counter[str] = Counter()

    def images(self) -> dict[str, ImageRecord]:
        """All images by ID."""
        return dict(self._images)

    def whole(self, image: ImageRecord) -> bool:
        """Are all of its layers here?"""
        return all(self.layers.get(chain_id) is not None for chain_id in image.chain_ids)

    def add(self, image: ImageRecord) -> ImageRecord:
        """Note an image whose layers are in place; returns its record, merged with what was known."""
        changed = arrive(self._images, image)
        with self._database.transaction():
            for record in changed:
                self._table.put(record.id, record)
        self._images.update((record.id, record) for record in changed)
        return changed[0]

    def drop(self, image_id: str) -> None:
        """An image is no more; what it alone needed is garbage."""
        self._table.delete(image_id)
        self._images.pop(image_id, None)

    def hold(self, names: Iterable[str]) -> None:
        """Keep these digests and chain IDs until they are released as often."""
        self._held.update(names)

    def release(self, names: Iterable[str]) -> None:
        """Undo a `hold`."""
        self._held.subtract(names)
        self._held = +self._held

    async def collect(self) -> None:
        """Remove layers and blobs that nobody needs."""
        layers, blobs = garbage(
            self._images.values(),
            self.layers.records(),
            self.content.sizes(),
            held=self._held,
            in_use=self._in_use(),
            keep_layer_blobs=self._keep_blobs,
        )
        # No await between the decision and the forgetting: who looks now finds them gone.
        with self._database.transaction():
            for chain_id in layers:
                self.layers.forget(chain_id)
        for digest in blobs:
            self.content.forget(digest)
        if layers or blobs:
            log.info("collected %d layers and %d blobs", len(layers), len(blobs))
        await asyncio.gather(
            in_thread(self.executor, self.layers.empty_trash), in_thread(self.executor, self.content.empty_trash)
        )

    def usage(self) -> Usage:
        """Bytes and inodes of blobs and layers, from records."""
        sizes = self.content.sizes().values()
        layers = self.layers.records().values()
        pages = sum((size + 4095) // 4096 * 4096 for size in sizes)
        return Usage(
            path=str(self._root),
            bytes=pages + sum(layer.size for layer in layers),
            inodes=len(sizes) + sum(layer.inodes for layer in layers),
        )

    async def recover(self) -> None:
        """Make disk and records agree after whatever ended the last process. Before the first pull."""
        cut_off = await in_thread(self.executor, self.content.recover)
        leftovers = await in_thread(self.executor, self.layers.leftovers)
        for path in leftovers:
            await in_thread(self.executor, partial(shutil.rmtree, path, ignore_errors=True))
        missing = await in_thread(self.executor, self.layers.missing)
        for chain_id in missing:
            self.layers.forget(chain_id)
        for image in self.images().values():
            if not self.whole(image):
                names = ", ".join(image.repo_tags) or image.id
                log.warning("image %s has lost a layer from the disk; it must be pulled again", names)
                self.drop(image.id)
        if cut_off or leftovers or missing:
            log.info(
                "recovered: %d partial blobs, %d partial layers, %d lost layers", cut_off, len(leftovers), len(missing)
            )
