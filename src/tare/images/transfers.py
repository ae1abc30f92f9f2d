"""What is done with images besides pulling and removing them: tag, history, save, load, push. Nothing of CRI's; the command line asks for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from tare.errors import InvalidArgument, NotFound, TareError
from tare.images import exporting, importing, manifest
from tare.images.archive import ArchiveError, Found
from tare.images.auth import RegistryAuth
from tare.images.chunks import Abandoned, Channel
from tare.images.errors import PullError, explain
from tare.images.push import Progress, Push, elsewhere
from tare.images.records import ImageRecord
from tare.images.reference import parse
from tare.images.registry import Registry
from tare.images.service import ImageService
from tare.images.threads import in_thread

LOADS = 2  # at one time; each takes two threads


@dataclass(frozen=True, slots=True)
class Made:
    """One step of an image's history and what it made: a layer's diff ID and its blob's size, "" and 0 where it made none."""

    step: manifest.Step
    layer: str
    size: int


class Transfers:
    """Over one image service."""

    def __init__(self, images: ImageService) -> None:
        self._images = images
        self._store = images.store
        self._loads = asyncio.Semaphore(LOADS)
        self._feeders = ThreadPoolExecutor(2 * LOADS, thread_name_prefix="images-archive")

    def close(self) -> None:
        """End the threads; after the last call."""
        self._feeders.shutdown()

    def image(self, text: str) -> ImageRecord:
        """The image of that name or ID. Raises NotFound, InvalidArgument."""
        image = self._images.find(text)
        if image is None:
            raise NotFound(f"there is no image {text} here")
        return image

    @contextmanager
    def _held(self, images: Sequence[ImageRecord]) -> Iterator[None]:
        names = [n for image in images for n in (*image.chain_ids, *image.documents, *image.layer_digests)]
        self._store.hold(names)
        try:
            yield
        finally:
            self._store.release(names)

    def tag(self, text: str, name: str) -> tuple[ImageRecord, str]:
        """Give an image one more tag; the tag as it is noted. Raises NotFound, InvalidArgument."""
        image, tag = self.image(text), parse(name).tagged
        if tag is None:
            raise InvalidArgument(
                f"tag image {text}", cause=f"{name} has a digest", hint="a digest cannot be given away"
            )
        return self._store.tag(image.id, tag), tag

    async def history(self, text: str) -> list[Made]:
        """How an image was made, the newest step first. Raises NotFound, PullError."""
        image = self.image(text)
        with self._held([image]):
            data = await in_thread(self._store.executor, partial(self._store.content.read, image.id))
            layers = (await in_thread(self._store.executor, partial(exporting.manifest_of, self._store, image))).layers
        diff_ids = manifest.parse_config(data).diff_ids
        made, number = [], 0
        for step in manifest.parse_history(data):
            if step.empty_layer or number >= len(layers):
                made.append(Made(step, "", 0))
                continue
            made.append(Made(step, diff_ids[number], layers[number].size))
            number += 1
        made += [Made(manifest.Step(), diff_ids[n], layers[n].size) for n in range(number, len(layers))]
        return made[::-1]

    async def save(self, texts: Sequence[str], *, docker: bool) -> AsyncGenerator[bytes]:
        """Images as one archive, piece by piece. Raises NotFound, InvalidArgument."""
        if not texts:
            raise InvalidArgument("save images", cause="none is named")
        images = exporting.saved([(text, self.image(text)) for text in texts])
        with self._held([item.image for item in images]):
            async for piece in exporting.archive_of(self._store, images, docker=docker):
                yield piece

    async def push(
        self,
        text: str,
        target: str,
        auth: RegistryAuth | None,
        progress: Progress,
        *,
        whole: bool = False,
        origin_auth: RegistryAuth | None = None,
    ) -> str:
        """Push an image under `target`, or under the name that it was asked for by; the digest there. Raises NotFound, PullError.

        With `whole` the index that it is from, with the images of all platforms: what is missing comes from there, with `origin_auth`.
        """
        image = self.image(text)
        if not target and exporting.is_id(text, image):
            if len(image.repo_tags) != 1:
                raise InvalidArgument(f"push image {text}", cause="it has not one name", hint="say under which")
            target = image.repo_tags[0]
        reference = parse(target or text)
        mounts = elsewhere(self._store.images().values(), reference)
        pushing: Push | None = None
        try:
            registry = await self._images.registries.of(reference, auth, actions="pull,push")
            pushing = Push(self._images.workers, registry, progress, mounts=mounts)
            digest = image.manifest
            if whole:
                digest, pushing.origin = await self._whole(text, image, origin_auth)
            with self._held([image]):
                return await pushing.manifest(digest, reference.tag or digest)
        except (TareError, OSError) as error:
            raise explain(str(reference), error, "push") from error
        finally:
            if pushing is not None:
                self._store.release(pushing.held)
            if whole:
                await self._store.collect()

    async def _whole(self, text: str, image: ImageRecord, auth: RegistryAuth | None) -> tuple[str, Registry | None]:
        """What the image's name stands for, with all platforms, and where that came from."""
        name = None if exporting.is_id(text, image) else parse(text)
        digest = exporting.root_of(image, name)
        source = next((known for known in map(parse, image.repo_digests) if known.digest == digest), None)
        return digest, None if source is None else await self._images.registries.of(source, auth)

    async def load(self, pieces: AsyncIterable[bytes], name: str | None) -> list[ImageRecord]:
        """The images of an archive, which comes in pieces. Nothing stays of one that is damaged. Raises PullError, InvalidArgument."""
        held: list[str] = []
        try:
            async with self._loads:
                found = await self._read(pieces, name, held)
            if not found:
                raise ArchiveError("read archive", cause="there is no image in it")
            return [await self._load(image) for image in found]
        except (TareError, OSError) as error:
            raise explain("from an archive", error, "load") from error
        finally:
            self._store.release(held)
            await self._store.collect()

    async def _read(self, pieces: AsyncIterable[bytes], name: str | None, held: list[str]) -> list[Found]:
        """Store an archive's blobs, holding them, and see what images it has."""
        loop, channel = asyncio.get_running_loop(), Channel()

        def hold(digest: str) -> None:
            done = threading.Event()

            def note() -> None:
                self._store.hold((digest,))
                held.append(digest)
                done.set()

            loop.call_soon_threadsafe(note)
            done.wait()

        def work() -> list[Found]:
            try:
                members = importing.read_members(
                    channel.get, self._store.content, hold, self._images.config.max_manifest_size
                )
                return importing.images_of(members, self._store.content, hold, name)
            finally:
                channel.abandon()

        feeding = asyncio.ensure_future(feed(pieces, channel, self._feeders))
        try:
            return await in_thread(self._feeders, work, channel.abandon)
        finally:
            channel.abandon()
            feeding.cancel()
            await asyncio.wait((feeding,))

    async def _load(self, found: Found) -> ImageRecord:
        load = self._images.loading(found)
        try:
            await self._images.operations.run(importing.LOAD_IMAGE, load, {"digest": found.digest})
        finally:
            load.release()
        if load.image is None:
            raise PullError("load image", cause=f"{found.digest} is no image")
        return load.image


async def feed(pieces: AsyncIterable[bytes], channel: Channel, executor: ThreadPoolExecutor) -> None:
    """Hand what arrives to the thread that reads it; how the pieces end is how the channel ends."""
    put: Callable[[bytes], None] = channel.put
    try:
        async for piece in pieces:
            if piece:
                await in_thread(executor, partial(put, piece), channel.abandon)
    except Abandoned:
        return
    except asyncio.CancelledError:
        channel.finish(ArchiveError("read archive", cause="it stopped coming"))
        raise
    except Exception as error:  # noqa: BLE001 - it is raised in the thread that takes the pieces
        channel.finish(error)
    else:
        channel.finish()
