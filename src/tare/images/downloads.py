"""Blobs on their way: each digest comes over the wire once, however many pulls want it, and can be read while it comes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial

from tare.images.auth import Unauthorized
from tare.images.errors import PullError
from tare.images.manifest import Descriptor
from tare.images.registry import Registry, WrongBytes
from tare.images.threads import in_thread, settled
from tare.storage.content import ContentStore, Ingest, Reader

log = logging.getLogger(__name__)


class TryAgain(PullError):
    """It did not come, for a reason that does not hold for the next attempt."""


class OthersRefusal(TryAgain):
    """Another pull, whose download this one had joined, was refused; it says nothing of this one's right."""


class Stale(TryAgain):
    """What an earlier process had of the blob was damaged, and is gone now."""


@dataclass(slots=True)
class _Download:
    ingest: Ingest
    registry: Registry
    task: asyncio.Task[None]
    readers: int = 0


class Downloads:
    """What is coming into one content store; `received` counts the bytes that have come."""

    def __init__(self, content: ContentStore, executor: Executor) -> None:
        self.received = 0
        self._content = content
        self._executor = executor
        self._coming: dict[str, _Download] = {}

    @asynccontextmanager
    async def reading(self, descriptor: Descriptor, registry: Registry) -> AsyncIterator[Reader]:
        """A reader of a blob that is here, or comes meanwhile. Leaving the block waits for the blob to be complete and verified.

        The first to want it brings the registry that it comes from; the last to leave early gives it up. Raises PullError or
        OSError where it does not come. The reader then raises Interrupted in the block, and leaving replaces that by the cause.
        Raises TryAgain where to try again is right.
        """
        if self._content.size(descriptor.digest) is not None:
            reader = self._content.open(descriptor.digest)
            try:
                yield reader
            finally:
                reader.close()
            return
        download = self._join(descriptor, registry)
        reader = download.ingest.follow()
        try:
            yield reader
            await asyncio.wait((download.task,))
        except Exception:
            # Wrong bytes break the reader's work before they are known to be wrong: the download's own error is the one to tell.
            await asyncio.wait((download.task,))
            _outcome(download, registry)
            raise
        finally:
            reader.close()
            await self._leave(download)
        _outcome(download, registry)

    def progress(self, digest: str) -> int | None:
        """How many bytes of a blob have come; None where it is not coming."""
        download = self._coming.get(digest)
        return None if download is None else download.ingest.written

    def _join(self, descriptor: Descriptor, registry: Registry) -> _Download:
        download = self._coming.get(descriptor.digest)
        if download is None:
            ingest = self._content.ingest(descriptor.digest, descriptor.size)
            download = _Download(ingest, registry, asyncio.create_task(self._fetch(descriptor, registry, ingest)))
            self._coming[descriptor.digest] = download
            download.task.add_done_callback(partial(self._ended, download))
        download.readers += 1
        return download

    def _ended(self, download: _Download, _: object = None) -> None:
        if self._coming.get(download.ingest.digest) is download:
            del self._coming[download.ingest.digest]

    async def _leave(self, download: _Download) -> None:
        download.readers -= 1
        if download.readers:
            return
        self._ended(download)
        download.task.cancel()
        await settled(download.task)
        await in_thread(self._executor, lambda: download.ingest.abort(asyncio.CancelledError()))

    async def _fetch(self, descriptor: Descriptor, registry: Registry, ingest: Ingest) -> None:
        try:
            await in_thread(self._executor, ingest.restore)
            if ingest.restored:
                log.info("going on with %s after %d bytes", descriptor.digest, ingest.restored)
            await registry.copy_blob(descriptor, ingest)
            log.info("fetched %s of %s: %d bytes", descriptor.digest, registry.reference, descriptor.size)
        except WrongBytes as error:
            failure: BaseException = error
            await in_thread(self._executor, lambda: ingest.abort(failure))
            if ingest.restored:
                raise Stale(error.doing, cause=error.cause) from error
            raise
        except BaseException as error:
            failure = error
            await in_thread(self._executor, lambda: ingest.abort(failure))
            raise
        finally:
            self.received += ingest.written - ingest.restored


def _outcome(download: _Download, registry: Registry) -> None:
    """Raise what an ended download failed with."""
    try:
        download.task.result()
    except Unauthorized as error:
        if download.registry is registry:
            raise
        raise OthersRefusal(error.doing, cause=error.cause) from error
