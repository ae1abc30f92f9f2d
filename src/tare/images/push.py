"""`tare push`: an image's blobs and its manifest go to its registry (OCI distribution spec v1.1, "Push").

    blob       HEAD: there? ─► POST ?mount=…&from=… where another repository of that registry has it ─► POST, PUT
    manifest   after all that it names; an index after its manifests, under the tag; each keeps its digest

Blobs go several at a time, each in one piece. Of an index only this machine's image is here: where the whole of it is asked for, what
is missing is fetched from where the index came from, and is garbage afterwards.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

from tare.images.auth import Unauthorized
from tare.images.errors import PullError
from tare.images.manifest import Descriptor, ManifestError, document_type, parse_references
from tare.images.pull import MAX_NESTED_INDEXES
from tare.images.records import ImageRecord
from tare.images.reference import Reference, parse
from tare.images.registry import Registry
from tare.images.threads import in_thread, together
from tare.images.transport import Endpoint, Refused
from tare.images.workers import Workers

PIECE = 1 << 20
PARALLEL = 3
Progress = Callable[[str, int, int, str], None]


def elsewhere(images: Iterable[ImageRecord], target: Reference) -> dict[str, str]:
    """Which repository of the target's registry is known to have a blob, by the blob's digest."""
    found: dict[str, str] = {}
    for image in images:
        for name in map(parse, image.repo_digests):
            if name.domain == target.domain and name.path != target.path:
                found.update(dict.fromkeys((*image.layer_digests, *image.documents), name.path))
    return found


@dataclass(slots=True, eq=False)
class Push:
    """One push: to `registry`, of what is in the store or else comes from `origin`; `mounts` as `elsewhere` says.

    `progress` is told of each blob: its digest, bytes sent, bytes in all, and "downloading", "there", "mounted", "uploading" or "done".
    """

    workers: Workers
    registry: Registry
    progress: Progress
    origin: Registry | None = None
    mounts: Mapping[str, str] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)
    _pushed: set[str] = field(default_factory=set)  # manifests: an index may name one any number of times
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PARALLEL))
    _downloads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PARALLEL))

    async def manifest(self, digest: str, name: str, depth: int = 0) -> str:
        """Push a manifest or an index with all that it names, under `name`, a tag or its digest; returns the digest. Raises PullError."""
        if depth > MAX_NESTED_INDEXES:
            raise ManifestError("push index", cause=f"indexes nested more than {MAX_NESTED_INDEXES} deep")
        data = await self._document(digest)
        named = parse_references(data)
        for entry in named.manifests or ():
            if entry.digest not in self._pushed:
                await self.manifest(entry.digest, entry.digest, depth + 1)
        endpoint = self.registry.own()
        await together(self._blob(endpoint, blob) for blob in named.blobs())
        path = f"/{self.registry.reference.path}/manifests/{name}"
        headers = {"Content-Type": document_type(data)}
        put = partial(endpoint.request, "PUT", path, scope=self.registry.scope, step="PUT manifest", headers=headers)
        async with put(accept=(201,), body=lambda: data) as response:
            said = response.headers.get("Docker-Content-Digest", digest)
        if said != digest:
            raise PullError(f"push {self.registry.reference}", cause=f"the registry says that the manifest is {said}")
        self._pushed.add(digest)
        return digest

    def _hold(self, digest: str) -> None:
        self.workers.store.hold((digest,))
        self.held.append(digest)

    async def _document(self, digest: str) -> bytes:
        store = self.workers.store
        self._hold(digest)
        if store.content.size(digest) is not None:
            return await in_thread(store.executor, partial(store.content.read, digest))
        if self.origin is None:
            raise PullError(f"push manifest {digest}", cause="it is not here", hint="pull the image again")
        data, _ = await self.origin.document(digest)
        await in_thread(store.executor, partial(store.content.put, digest, data))
        return data

    async def _blob(self, endpoint: Endpoint, blob: Descriptor) -> None:
        path = f"/{self.registry.reference.path}/blobs/"
        ask = partial(endpoint.request, scope=self.registry.scope)
        async with self._slots:
            async with ask("HEAD", path + blob.digest, step="HEAD blob", accept=(200, 404)) as response:
                there = response.status == 200
            if there:
                self.progress(blob.digest, blob.size, blob.size, "there")
                return
            url = await self._mount(endpoint, blob)
            if url is None:
                self.progress(blob.digest, blob.size, blob.size, "mounted")
                return
            await self._here(blob)
            if not url:
                async with ask("POST", path + "uploads/", step="POST upload", accept=(202,)) as response:
                    url = endpoint.location(response, path + "uploads/")
            url += ("&" if "?" in url else "?") + f"digest={blob.digest}"
            headers = {"Content-Type": "application/octet-stream", "Content-Length": str(blob.size)}
            body = partial(self._pieces, blob)
            async with ask("PUT", url, step="PUT blob", headers=headers, accept=(201,), body=body):
                self.progress(blob.digest, blob.size, blob.size, "done")

    async def _mount(self, endpoint: Endpoint, blob: Descriptor) -> str | None:
        """Let the registry take a blob over from another of its repositories: None where it has.

        Else the address that it gives for the upload, "" where it gives none.
        """
        source = self.mounts.get(blob.digest)
        if (
            source is None
            and self.origin is not None
            and self.origin.reference.domain == self.registry.reference.domain
        ):
            source = self.origin.reference.path
        if source is None or source == self.registry.reference.path:
            return ""
        path = f"/{self.registry.reference.path}/blobs/uploads/?mount={blob.digest}&from={source}"
        scope = f"{self.registry.scope} repository:{source}:pull"
        try:
            async with endpoint.request("POST", path, scope=scope, step="mount blob", accept=(201, 202)) as response:
                return None if response.status == 201 else endpoint.location(response, path)
        except (Refused, Unauthorized):
            return ""  # then it is uploaded, which is for the registry to allow or not

    async def _here(self, blob: Descriptor) -> None:
        """See that a blob is in the store. Raises PullError."""
        if self.workers.store.content.size(blob.digest) == blob.size:
            return
        if self.origin is None:
            raise PullError(
                f"push layer {blob.digest}", cause="its blob is not here", hint="are blobs kept (setting keep_blobs)?"
            )
        self.progress(blob.digest, 0, blob.size, "downloading")
        self._hold(blob.digest)
        await self.workers.blob(blob, self.origin, self._downloads)

    async def _pieces(self, blob: Descriptor) -> AsyncIterator[bytes]:
        store = self.workers.store
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
                self.progress(blob.digest, offset, blob.size, "uploading")
        finally:
            os.close(descriptor)
