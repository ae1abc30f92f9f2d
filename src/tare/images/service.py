"""The ImageService: what the rest of Tare asks about images. Pulling is `pull.py`, what is kept is `store.py`.

A pull that has begun goes on when its caller leaves; the next one for the same image finds what it has done.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import aiohttp

from tare import __version__
from tare.config import ImagesConfig
from tare.errors import TareError
from tare.images import hosts, names, platform
from tare.images.auth import RegistryAuth, credentials_for
from tare.images.errors import explain
from tare.images.pull import PULL_IMAGE, Pull
from tare.images.records import ImageConfig, ImageRecord, Usage
from tare.images.reference import Reference, parse
from tare.images.registry import Registry
from tare.images.store import ImageStore
from tare.images.threads import in_thread
from tare.images.tls import Tls
from tare.images.transport import Endpoint, Patience
from tare.images.workers import Workers
from tare.state.database import Database
from tare.state.operations import Operations

__all__ = ["ImageConfig", "ImageRecord", "ImageService", "RegistryAuth", "Usage"]

log = logging.getLogger(__name__)

IO_THREADS = 4
READ_BYTES = 512 << 10


class ImageService:
    """Images under one root directory. `in_use` gives the chain IDs of layers that containers stand on."""

    def __init__(
        self,
        database: Database,
        operations: Operations,
        root: Path,
        config: ImagesConfig,
        in_use: Callable[[], set[str]],
        patience: Patience | None = None,
    ) -> None:
        self._operations = operations
        self._config = config
        self._patience = patience or Patience(progress=config.progress_timeout)
        self._platform = platform.local()
        self._executor = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="images-io")
        self._store = ImageStore(database, root, keep_blobs=config.keep_blobs, in_use=in_use, executor=self._executor)
        self._workers = Workers(self._store)
        self._tls = Tls()
        self._session: aiohttp.ClientSession | None = None
        self._pulls: set[asyncio.Task[ImageRecord]] = set()

    def list(self) -> list[ImageRecord]:
        """All images."""
        return sorted(self._store.images().values(), key=lambda image: (image.repo_tags or ("~",), image.id))

    def find(self, reference: str) -> ImageRecord | None:
        """The image of that tag, digest, ID or unique beginning of an ID. Raises InvalidArgument for what is none of these."""
        return names.find(self._store.images(), reference)

    async def pull(self, reference: str, auth: RegistryAuth | None) -> ImageRecord:
        """The image, whole on the disk and recorded under the name, as its registry has it now and lets `auth` have it.

        Raises MalformedReference (InvalidArgument) or a PullError; nothing of a failed pull stays.
        """
        task = asyncio.create_task(self._pull(parse(reference), auth))
        self._pulls.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[ImageRecord]) -> None:
        self._pulls.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s", error)

    async def _pull(self, reference: Reference, auth: RegistryAuth | None) -> ImageRecord:
        started = time.monotonic()
        pull: Pull | None = None
        try:
            pull = self._subject(reference, await self._registry(reference, auth))
            await self._operations.run(PULL_IMAGE, pull, {"reference": str(reference)})
        except (TareError, OSError) as error:
            raise explain(str(reference), error) from error
        finally:
            if pull is not None:
                pull.release()
        if not self._config.keep_blobs:
            await self._store.collect()
        assert pull.image is not None
        seconds = time.monotonic() - started
        log.info("pulled %s: %s, %d layers, in %.1f s", reference, pull.image.id, len(pull.image.chain_ids), seconds)
        return pull.image

    def _subject(self, reference: Reference, registry: Registry) -> Pull:
        return Pull(reference, registry, self._workers, self._platform, self._config.parallel_layers)

    async def _registry(self, reference: Reference, auth: RegistryAuth | None) -> Registry:
        """The registry of a reference with its mirrors, as hosts.toml says now."""
        read = partial(hosts.read, Path(self._config.hosts_dir), reference.domain)
        places = await in_thread(self._executor, read)
        credentials = credentials_for(auth, reference.domain)
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                read_bufsize=READ_BYTES,
                headers={"User-Agent": f"tare/{__version__}"},
            )
        session = self._session
        endpoints = [Endpoint(session, host, credentials, self._tls, self._patience) for host in places]
        return Registry(reference, endpoints, self._patience, self._config.max_manifest_size, self._executor)

    async def remove(self, reference: str) -> None:
        """Remove the image with all its names, and what only it needed. Nothing happens where there is none. Raises InvalidArgument."""
        image = self.find(reference)
        if image is None:
            return
        self._store.drop(image.id)
        await self._store.collect()

    async def collect(self) -> None:
        """Remove layers and blobs that no image, no pull and no container needs."""
        await self._store.collect()

    def usage(self) -> Usage:
        """What images take on the disk."""
        return self._store.usage()

    def layer_paths(self, image: ImageRecord) -> tuple[Path, ...]:
        """The directories of an image's layers, TOP first, as overlayfs takes lower directories."""
        return tuple(self._store.layers.path(chain_id) for chain_id in reversed(image.chain_ids))

    async def recover(self) -> None:
        """Undo what the last process had under way, and make disk and records agree. Before the first pull."""
        await self._store.recover()
        await self._operations.recover(PULL_IMAGE, self._restored)
        await self._store.collect()

    def _restored(self, subject: Mapping[str, str]) -> Pull:
        """The subject of a pull of an earlier process: enough to undo it."""
        reference = parse(subject["reference"])
        registry = Registry(reference, (), self._patience, self._config.max_manifest_size, self._executor)
        return self._subject(reference, registry)

    async def close(self) -> None:
        """End pulls that are under way, undoing them, and all threads."""
        for task in self._pulls:
            task.cancel()
        if self._pulls:
            await asyncio.wait(self._pulls)
        if self._session is not None:
            await self._session.close()
        self._workers.close()
        self._executor.shutdown()
