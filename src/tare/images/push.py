"""`tare push`: an image's blobs and its manifest go to its registry (OCI distribution spec v1.1, "Push").

What the registry has already is not sent again. Blobs go several at a time, each in one piece; the manifest goes last, under the
tag, and keeps its digest. Of an index only this machine's image is here: so it is the image's own manifest that is pushed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from functools import partial

from tare.images.errors import PullError
from tare.images.exporting import manifest_of
from tare.images.manifest import Descriptor, document_type
from tare.images.records import ImageRecord
from tare.images.registry import Registry
from tare.images.store import ImageStore
from tare.images.threads import in_thread, together
from tare.images.transport import Endpoint

PIECE = 1 << 20
PARALLEL = 3
Progress = Callable[[str, int, int, str], None]


async def push(store: ImageStore, image: ImageRecord, registry: Registry, progress: Progress) -> str:
    """Push an image whose blobs are in the store and held to the registry of its new name; returns the manifest's digest.

    `progress` is told of each blob: its digest, bytes sent, bytes in all, and "there", "uploading" or "done". Raises PullError.
    """
    endpoint = registry.own()
    manifest = await in_thread(store.executor, partial(manifest_of, store, image))
    blobs = {blob.digest: blob for blob in (*manifest.layers, manifest.config)}
    slots = asyncio.Semaphore(PARALLEL)
    await together(_blob(store, blob, registry, endpoint, slots, progress) for blob in blobs.values())
    data = await in_thread(store.executor, partial(store.content.read, image.manifest))
    path = f"/{registry.reference.path}/manifests/{registry.reference.tag or image.manifest}"
    async with endpoint.request(
        "PUT",
        path,
        scope=registry.scope,
        step="PUT manifest",
        headers={"Content-Type": document_type(data)},
        accept=(201,),
        body=lambda: data,
    ) as response:
        digest = response.headers.get("Docker-Content-Digest", image.manifest)
    if digest != image.manifest:
        raise PullError(f"push {registry.reference}", cause=f"the registry says that the manifest is {digest}")
    return digest


async def _blob(
    store: ImageStore,
    blob: Descriptor,
    registry: Registry,
    endpoint: Endpoint,
    slots: asyncio.Semaphore,
    progress: Progress,
) -> None:
    path = f"/{registry.reference.path}/blobs/"
    ask = partial(endpoint.request, scope=registry.scope)
    async with slots:
        async with ask("HEAD", path + blob.digest, step="HEAD blob", accept=(200, 404)) as response:
            there = response.status == 200
        if there:
            progress(blob.digest, blob.size, blob.size, "there")
            return
        if store.content.size(blob.digest) != blob.size:
            raise PullError(
                f"push layer {blob.digest}", cause="its blob is not here", hint="are blobs kept (setting keep_blobs)?"
            )
        async with ask("POST", path + "uploads/", step="POST upload", accept=(202,)) as response:
            url = endpoint.location(response, path + "uploads/")
        url += ("&" if "?" in url else "?") + f"digest={blob.digest}"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)}
        body = partial(_pieces, store, blob, progress)
        async with ask("PUT", url, step="PUT blob", headers=headers, accept=(201,), body=body):
            progress(blob.digest, blob.size, blob.size, "done")


async def _pieces(store: ImageStore, blob: Descriptor, progress: Progress) -> AsyncIterator[bytes]:
    descriptor = os.open(store.content.path(blob.digest), os.O_RDONLY | os.O_CLOEXEC)
    try:
        offset = 0
        while offset < blob.size:
            piece = await in_thread(store.executor, partial(os.pread, descriptor, PIECE, offset))
            if not piece:
                raise PullError(
                    f"push layer {blob.digest}", cause="its blob here is cut short", hint="tare image repair"
                )
            yield piece
            offset += len(piece)
            progress(blob.digest, offset, blob.size, "uploading")
    finally:
        os.close(descriptor)
