"""What of images is on this machine: their records, their layers, their blobs, and who needs what.

Used from the event loop, which owns the database; what blocks goes to threads from here. A pull `hold`s the digests and
chain IDs that it works on, so that nothing is collected under it, and notes what it `expect`s: what a killed process has brought of that
waits for the next pull that wants it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path

from tare.config import ImagesConfig
from tare.images.collect import excess, garbage, victims
from tare.images.errors import PullError
from tare.images.layers import LayerStore
from tare.images.names import arrive, pinned
from tare.images.records import Expected, ImageRecord, Usage
from tare.images.threads import in_thread
from tare.state.database import Database
from tare.state.operations import Operation, Operations, Step
from tare.storage.content import ContentStore

log = logging.getLogger(__name__)

PARTIAL_SECONDS = (
    24 * 3600.0
)  # for so long what a pull that was cut off has brought waits for somebody to go on with it
USED_GRAIN = 60_000_000_000  # that an image is used is noted at most once in so many ns


class ImageStore:
    """Images, layers and blobs under one root directory. `in_use` gives the chain IDs of layers that containers stand on."""

    def __init__(
        self,
        database: Database,
        root: Path,
        config: ImagesConfig,
        operations: Operations,
        *,
        in_use: Callable[[], set[str]],
        executor: Executor,
    ) -> None:
        self.content = ContentStore(root)
        self.layers = LayerStore(root, database)
        self.executor = executor
        self._operations = operations
        self._root = root
        self._database = database
        self._config = config
        self._in_use = in_use
        self._table = database.table("images", ImageRecord)
        self._images = {key: pinned(image, config.pinned) for key, image in self._table.items()}
        self._held: Counter[str] = Counter()
        self._expected = database.table("expected", Expected)
        self._left = dict(self._expected.items())  # of pulls that ended with their process

    def images(self) -> dict[str, ImageRecord]:
        """All images by ID."""
        return dict(self._images)

    def whole(self, image: ImageRecord) -> bool:
        """Are all of its layers here?"""
        return all(self.layers.get(chain_id) is not None for chain_id in image.chain_ids)

    def add(self, image: ImageRecord) -> ImageRecord:
        """Note an image whose layers are in place; returns its record, merged with what was known."""
        changed = [pinned(record, self._config.pinned) for record in arrive(self._images, image)]
        with self._database.transaction():
            for record in changed:
                self._table.put(record.id, record)
        self._images.update((record.id, record) for record in changed)
        return changed[0]

    def tag(self, image_id: str, tag: str) -> ImageRecord:
        """Give an image one more tag (repository:tag), which another may lose by it."""
        return self.add(replace(self._images[image_id], repo_tags=(tag,)))

    def in_use(self) -> set[str]:
        """Chain IDs of layers that containers stand on."""
        return self._in_use()

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

    def held(self) -> set[str]:
        """Digests and chain IDs that pulls work on, and blobs that wait for the next pull."""
        return {*self._held, *self._left_over()}

    def expect(self, key: str, digests: Iterable[str]) -> None:
        """A pull brings these blobs; what an earlier process left of them is its own now."""
        digests = tuple(digests)
        for other, row in list(self._left.items()):
            if not set(digests).isdisjoint(row.digests):
                self._give_up(other)
        self._expected.put(key, Expected(digests=digests, since=time.time_ns()))

    def arrived(self, key: str) -> None:
        """The pull is over. Where it ends because the process does, the note stays for the next one."""
        if not self.content.suspended:
            self._expected.delete(key)

    def _give_up(self, key: str) -> None:
        del self._left[key]
        self._expected.delete(key)

    def _left_over(self) -> set[str]:
        """Blobs that killed pulls have brought lately."""
        oldest = time.time_ns() - int(PARTIAL_SECONDS * 1e9)
        for key, row in list(self._left.items()):
            if row.since < oldest:
                self._give_up(key)
        return {digest for row in self._left.values() for digest in row.digests}

    async def collect(self) -> None:
        """Remove layers and blobs that nobody needs."""
        if (
            not self.content.suspended
        ):  # the process ends: what pulls have brought is for the next one, which collects the rest
            await self._operations.run(COLLECT, self, {})

    async def sweep(self) -> None:
        """The same before the first call, when whatever is there of it is all that there is."""
        for step in COLLECT.steps:
            await step.action(self)

    async def forget_garbage(self) -> None:
        """No record names what nobody needs."""
        layers, blobs = garbage(
            self._images.values(),
            self.layers.records(),
            self.content.sizes(),
            held=self._held.keys() | self._left_over(),
            in_use=self._in_use(),
            keep_layer_blobs=self._config.keep_blobs,
        )
        # No await between the decision and the forgetting: who looks now finds them gone.
        with self._database.transaction():
            for chain_id in layers:
                self.layers.forget(chain_id)
        for digest in blobs:
            self.content.forget(digest)
        if layers or blobs:
            log.info("collected %d layers and %d blobs", len(layers), len(blobs))

    async def drop_partial(self) -> None:
        """What came of blobs long ago that nobody goes on with goes."""
        await in_thread(self.executor, partial(self.content.drop_partial, time.time() - PARTIAL_SECONDS))

    async def empty_trash(self) -> None:
        """What no record names leaves the disk."""
        await asyncio.gather(
            in_thread(self.executor, self.layers.empty_trash), in_thread(self.executor, self.content.empty_trash)
        )

    def used(self, image: ImageRecord) -> None:
        """A container is being made from it."""
        known = self._images.get(image.id)
        now = time.time_ns()
        if known is not None and now - known.used_at > USED_GRAIN:
            self._images[image.id] = record = replace(known, used_at=now)
            self._table.put(image.id, record)

    async def make_room(self, *, tagged_too: bool) -> list[str]:
        """Where the disk is too full, remove images that were not used for longest; returns the IDs of those removed.

        Only untagged ones unless `tagged_too`. Never one that is pinned, in use, being pulled or too young.
        """
        status = await in_thread(self.executor, partial(os.statvfs, self._root))
        capacity, available = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
        needed = excess(capacity, available, self._config.gc_high, self._config.gc_low)
        if needed:
            needed -= await in_thread(self.executor, partial(self.content.drop_partial, time.time()))
        if needed > 0 and self._left:
            before = sum(self.content.sizes().values())
            for key in list(self._left):
                self._give_up(key)
            await self.collect()
            needed -= before - sum(self.content.sizes().values())
        if needed <= 0:
            return []
        in_use = self._in_use()
        for image in self.images().values():
            if image.chain_ids and image.chain_ids[-1] in in_use:
                self.used(image)
        chosen = victims(
            (image for image in self._images.values() if not self._held.keys() & {*image.chain_ids, *image.documents}),
            self.layers.records(),
            self.content.sizes(),
            in_use=in_use,
            needed=needed,
            before=time.time_ns() - int(self._config.gc_min_age * 1e9),
            tagged_too=tagged_too,
        )
        for image_id in chosen:
            names = ", ".join(self._images[image_id].repo_tags) or image_id
            log.info("the disk is more than %g %% full: removing image %s", self._config.gc_high, names)
            self.drop(image_id)
        if chosen:
            await self.collect()
        return chosen

    async def check_space(self, needed: int) -> None:
        """Raise PullError where the disk has not so many bytes free beside the reserve."""
        status = await in_thread(self.executor, partial(os.statvfs, self._root))
        available = status.f_bavail * status.f_frsize - self._config.disk_reserve
        if needed > available:
            cause = f"about {needed >> 20} MiB are needed, and {max(available, 0) >> 20} MiB may be used of what is free on {self._root}"
            raise PullError("look for free space", cause=cause, hint="free some space on the image disk")

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
        cut_off = await in_thread(self.executor, partial(self.content.recover, time.time() - PARTIAL_SECONDS))
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
        for key, row in list(self._left.items()):
            if any(set(row.digests) <= {*image.layer_digests, *image.documents} for image in self._images.values()):
                self._give_up(key)  # it was killed when all was done
        if cut_off or leftovers or missing:
            log.info(
                "recovered: %d partial blobs, %d partial layers, %d lost layers", cut_off, len(leftovers), len(missing)
            )


COLLECT: Operation[ImageStore] = Operation(
    "CollectImages",
    (
        Step("forget", ImageStore.forget_garbage),
        Step("partial", ImageStore.drop_partial),
        Step("trash", ImageStore.empty_trash),
    ),
    finish=True,
)
