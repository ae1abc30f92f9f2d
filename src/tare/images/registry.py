"""One image's registry and its mirrors, as one pull speaks to them (OCI distribution spec v1.1, "Pull").

Hosts are asked in the order of hosts.toml; the next is asked when one fails, whatever the failure, and the error that is
raised in the end is the registry's own, with the mirrors' before it. A host that could not be reached is asked last from
then on. Every byte that is returned or written has been, or will be before anyone relies on it, checked against a digest.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from tare.images.errors import PullError, RegistryUnavailable
from tare.images.manifest import ACCEPTED, Descriptor
from tare.images.reference import Reference, is_digest
from tare.images.threads import in_thread, settled, together
from tare.images.transport import Endpoint, Patience, Refused, TooSlow, read_at_most
from tare.storage.content import Ingest, WrongContent

if TYPE_CHECKING:
    import aiohttp
else:
    from tare.images import later as aiohttp

log = logging.getLogger(__name__)
T = TypeVar("T")

MIN_WRITE = 128 << 10
MAX_WRITE = 512 << 10
PROGRESS_BYTES = 1 << 20  # as much as makes a broken transfer count as the first again


class WrongBytes(PullError):
    """A host sent other bytes than those of the digest; `hosts` are those that had a part in it."""

    def __init__(self, doing: str, hosts: frozenset[str], cause: str) -> None:
        super().__init__(doing, cause=cause)
        self.hosts = hosts


class Span:
    """A piece of a blob that is brought ahead of its turn: `position` is how far it is."""

    def __init__(self, ingest: Ingest, position: int, end: int) -> None:
        self.position = position
        self.end = end
        self._ingest = ingest

    def write(self, chunks: Sequence[bytes]) -> None:
        """Append. Raises WrongContent where there is more than was asked for."""
        size = sum(map(len, chunks))
        if self.position + size > self.end:
            raise WrongContent(f"blob {self._ingest.digest}", cause="a range was longer than it was asked for")
        self._ingest.write_at(self.position, chunks)
        self.position += size


class Pace:
    """Sees that a transfer brings at least `rate` bytes a second, over each `window` seconds spent on waiting for it."""

    def __init__(self, window: float, rate: int) -> None:
        self._window = window
        self._rate = rate
        self._waited = 0.0
        self._bytes = 0

    async def measured(self, read: Awaitable[bytes]) -> bytes:
        """What `read` brings. Raises TooSlow."""
        began = time.monotonic()
        data = await read
        self._waited += time.monotonic() - began
        self._bytes += len(data)
        if self._waited >= self._window:
            if self._bytes < self._rate * self._waited:
                raise TooSlow(f"it sends less than {self._rate} bytes a second")
            self._waited, self._bytes = 0.0, 0
        return data


class Registry:
    """Where the image `reference` is fetched."""

    def __init__(
        self,
        reference: Reference,
        endpoints: Sequence[Endpoint],
        patience: Patience,
        max_document: int,
        executor: Executor,
        *,
        actions: str = "pull",
    ) -> None:
        self.reference = reference
        self._actions = actions
        self._endpoints = tuple(endpoints)
        self._patience = patience
        self._max_document = max_document
        self._executor = executor
        self._unreachable: set[str] = set()
        self._scope = f"repository:{reference.path}:{actions}"

    def without(self, hosts: frozenset[str]) -> Registry | None:
        """The same without some hosts, None where none is left."""
        left = [endpoint for endpoint in self._endpoints if endpoint.host.name not in hosts]
        if not left:
            return None
        return Registry(self.reference, left, self._patience, self._max_document, self._executor, actions=self._actions)

    def own(self) -> Endpoint:
        """The registry itself, without its mirrors: where images are pushed. Raises PullError."""
        for endpoint in self._endpoints:
            if endpoint.host.upstream and "push" in endpoint.host.capabilities:
                return endpoint
        raise PullError(f"push {self.reference}", cause="hosts.toml does not give its registry the capability push")

    @property
    def scope(self) -> str:
        """What its tokens are for."""
        return self._scope

    async def resolve(self) -> str:
        """The digest that the reference stands for, by the word of a host that lets these credentials have it. Raises PullError."""
        target = self.reference.target

        async def ask(endpoint: Endpoint) -> str:
            try:
                async with self._manifest(endpoint, "HEAD", target) as response:
                    self._check_size(int(response.headers.get("Content-Length") or 0))
                    digest = response.headers.get("Docker-Content-Digest", "")
            except Refused as error:
                if error.status not in (404, 405, 501):
                    raise
                digest = ""  # there are registries that know no HEAD of manifests
            if self.reference.digest and digest:
                return self.reference.digest
            if is_digest(digest):
                return digest
            async with self._manifest(endpoint, "GET", target) as response:
                data = await self._body(endpoint, response, self._max_document)
            if self.reference.digest:
                check_digest(data, self.reference.digest, endpoint.host.name)
                return self.reference.digest
            return "sha256:" + hashlib.sha256(data).hexdigest()

        return await self._each("resolve", ask, by_tag=self.reference.digest is None)

    async def document(self, digest: str) -> tuple[bytes, str]:
        """A manifest or index by digest, verified, and the content type that it came with. Raises PullError."""

        async def ask(endpoint: Endpoint) -> tuple[bytes, str]:
            async with self._manifest(endpoint, "GET", digest) as response:
                self._check_size(response.content_length or 0)
                data = await self._body(endpoint, response, self._max_document)
                check_digest(data, digest, endpoint.host.name)
                return data, response.content_type

        return await self._each("fetch manifest", ask)

    async def tagged(self, tag: str) -> bytes | None:
        """The manifest or index of another tag in the repository, unverified; None where there is none. Raises PullError."""
        return await self._optional(f"/{self.reference.path}/manifests/{tag}", f"look for {tag}")

    async def referrers(self, digest: str) -> bytes | None:
        """The index of manifests that refer to a manifest; None where the registry keeps no such lists. Raises PullError."""
        return await self._optional(f"/{self.reference.path}/referrers/{digest}", "list referrers")

    async def _optional(self, path: str, step: str) -> bytes | None:
        async def ask(endpoint: Endpoint) -> bytes:
            headers = {"Accept": ", ".join((*ACCEPTED, "*/*;q=0.1"))}
            async with endpoint.request("GET", path, scope=self._scope, step=step, headers=headers) as response:
                return await self._body(endpoint, response, self._max_document)

        try:
            return await self._each(step, ask)
        except Refused as error:
            if error.status not in (400, 404, 405, 501):
                raise
            return None

    async def small_blob(self, descriptor: Descriptor) -> bytes:
        """A blob that is to be held in memory, verified. Raises PullError."""
        self._check_size(descriptor.size)

        async def ask(endpoint: Endpoint) -> bytes:
            async with self._blob(endpoint, descriptor, 0) as response:
                data = await self._body(endpoint, response, descriptor.size)
                check_digest(data, descriptor.digest, endpoint.host.name)
                return data

        return await self._each("fetch configuration", ask)

    async def copy_blob(self, descriptor: Descriptor, ingest: Ingest) -> None:
        """Bring a blob's bytes into `ingest` and commit it. Where a transfer breaks off the rest is asked for, here or from the next host.

        Raises WrongBytes where the bytes were not those of the digest, PullError where they could not be had.
        """
        contributors: set[str] = set()

        async def ask(endpoint: Endpoint) -> None:
            contributors.add(endpoint.host.name)
            if descriptor.size - ingest.written > self._patience.range_size:
                await self._copy_ranges(endpoint, descriptor, ingest)
            await self._copy_from(endpoint, descriptor, ingest)

        try:
            await self._each("fetch layer", ask)
            await in_thread(self._executor, ingest.commit)
        except WrongContent as error:
            hosts = ", ".join(sorted(contributors))
            raise WrongBytes(
                f"fetch layer {descriptor.digest} at {hosts}", frozenset(contributors), error.cause or "wrong content"
            ) from error

    async def _copy_ranges(self, endpoint: Endpoint, descriptor: Descriptor, ingest: Ingest) -> None:
        """Bring a big blob in ranges, several at a time. Returns early, with what there is then, where the host knows no ranges or breaks off."""
        size = self._patience.range_size
        first = ingest.written
        begins = iter([first, *range((first // size + 1) * size, descriptor.size, size)])
        able = True

        async def work() -> None:
            nonlocal able
            for begin in begins:
                span = Span(ingest, begin, min((begin // size + 1) * size, descriptor.size))
                try:
                    able = able and await self._copy_span(endpoint, descriptor, span)
                except (aiohttp.ClientError, TimeoutError) as error:
                    log.info("%s: a range of %s broke off: %s", endpoint.host.name, descriptor.digest, error)
                    able = False
                if not able:
                    return

        await together(work() for _ in range(self._patience.ranges))

    async def _copy_span(self, endpoint: Endpoint, descriptor: Descriptor, span: Span) -> bool:
        """One range; False where the host answers with the whole blob."""
        async with self._blob(endpoint, descriptor, span.position, span.end) as response:
            if response.status != 206:
                return False
            await self._pump(response, span, skip=0)
        return span.position == span.end

    async def _copy_from(self, endpoint: Endpoint, descriptor: Descriptor, ingest: Ingest) -> None:
        failures = 0
        while ingest.written < descriptor.size or descriptor.size == 0:
            start = ingest.written
            try:
                async with self._blob(endpoint, descriptor, start) as response:
                    await self._pump(response, ingest, skip=start if response.status == 200 else 0)
                if descriptor.size == 0:
                    return
                cut: Exception | None = None
            except (aiohttp.ClientError, TimeoutError) as error:
                cut = error
            if ingest.written >= descriptor.size:
                return
            failures = 1 if ingest.written - start >= PROGRESS_BYTES else failures + 1
            cut = cut or aiohttp.ClientPayloadError("too short")
            if failures >= self._patience.attempts or isinstance(cut, TimeoutError):
                where = f"after {ingest.written} of {descriptor.size} bytes"
                raise endpoint.interrupted(f"fetch layer {descriptor.digest} ({where})", cut) from cut
            log.info("%s: %s broke off after %d bytes, going on", endpoint.host.name, descriptor.digest, ingest.written)
            await asyncio.sleep(self._patience.pause * failures)

    async def _pump(self, response: aiohttp.ClientResponse, ingest: Ingest | Span, skip: int) -> None:
        """Write a body's bytes, but the first `skip`, in a thread: one batch is written while the next arrives."""
        loop = asyncio.get_running_loop()
        writing: asyncio.Future[None] | None = None
        batch: list[bytes] = []
        size = 0
        pace = Pace(self._patience.progress, self._patience.min_rate)
        try:
            while arrived := await pace.measured(response.content.readany()):
                chunk = arrived[skip:]
                skip -= len(arrived) - len(chunk)
                batch.append(chunk)
                size += len(chunk)
                if size >= MAX_WRITE or (size >= MIN_WRITE and (writing is None or writing.done())):
                    if writing is not None:
                        await settled(writing)
                        writing.result()
                    writing = loop.run_in_executor(self._executor, ingest.write, batch)
                    batch, size = [], 0
        finally:
            # What has arrived is kept, whatever broke off; nothing else may touch the ingest before the thread is done with it.
            if writing is not None:
                await settled(writing)
            if batch and (writing is None or writing.exception() is None):
                writing = loop.run_in_executor(self._executor, ingest.write, batch)
                await settled(writing)
        if writing is not None:
            writing.result()

    @asynccontextmanager
    async def _blob(
        self, endpoint: Endpoint, descriptor: Descriptor, start: int, end: int = 0
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A blob's bytes from `start` up to `end`, to its end if that is 0."""
        path = f"/{self.reference.path}/blobs/{descriptor.digest}"
        headers = {"Range": f"bytes={start}-{end - 1 if end else ''}"} if start or end else {}
        async with endpoint.request("GET", path, scope=self._scope, step="GET blob", headers=headers) as response:
            if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise PullError(
                    f"GET blob at {endpoint.host.name}", cause="it answered with another range than was asked for"
                )
            announced = response.content_length
            left = (end or descriptor.size) - start if response.status == 206 else descriptor.size
            if announced is not None and announced != left:
                cause = f"it announces {announced} bytes where {left} are expected"
                raise PullError(f"GET blob {descriptor.digest} at {endpoint.host.name}", cause=cause)
            yield response

    @asynccontextmanager
    async def _manifest(self, endpoint: Endpoint, method: str, target: str) -> AsyncIterator[aiohttp.ClientResponse]:
        path = f"/{self.reference.path}/manifests/{target}"
        headers = {"Accept": ", ".join((*ACCEPTED, "*/*;q=0.1"))}
        async with endpoint.request(
            method, path, scope=self._scope, step=f"{method} manifest", headers=headers
        ) as response:
            yield response

    async def _body(self, endpoint: Endpoint, response: aiohttp.ClientResponse, limit: int) -> bytes:
        try:
            return await read_at_most(response, limit)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise endpoint.interrupted("read answer", error) from error

    def _check_size(self, size: int) -> None:
        if size > self._max_document:
            raise PullError("fetch manifest", cause=f"it has {size} bytes; at most {self._max_document} are read")

    async def _each(self, step: str, ask: Callable[[Endpoint], Awaitable[T]], *, by_tag: bool = False) -> T:
        """Ask the hosts in order until one answers."""
        failures: list[tuple[Endpoint, PullError]] = []
        able = []
        for endpoint in self._endpoints:
            if endpoint.host.serves(by_tag=by_tag):
                able.append(endpoint)
            else:
                endpoint.note("not asked, for it may not " + ("resolve tags" if by_tag else "serve content"))
        for endpoint in sorted(able, key=lambda endpoint: endpoint.host.name in self._unreachable):
            try:
                return await ask(endpoint)
            except PullError as error:
                log.info("%s of %s failed: %s", step, self.reference, error)
                endpoint.note(f"{step} failed: {error.cause or error.doing}")
                failures.append((endpoint, error))
                if isinstance(error, RegistryUnavailable):
                    self._unreachable.add(endpoint.host.name)
        raise combined(step, self.reference, failures)


def combined(step: str, reference: Reference, failures: Sequence[tuple[Endpoint, PullError]]) -> PullError:
    """The error of several hosts: the registry's own, and what the mirrors said."""
    if not failures:
        return PullError(
            f"{step} {reference}", cause="no host in hosts.toml is allowed to do it", hint="give one the capability"
        )
    own = next((error for endpoint, error in failures if endpoint.host.upstream), failures[-1][1])
    others = [
        f"{error.doing.removeprefix('RegistryUnavailable: ')}: {error.cause}"
        for _, error in failures
        if error is not own
    ]
    if others:
        own.cause = f"{own.cause}; before: {'; '.join(others)}"
    return own


def check_digest(data: bytes, digest: str, host: str) -> None:
    """Raises WrongBytes where the data are not those of the digest."""
    algorithm = digest.partition(":")[0]
    actual = f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"
    if actual != digest:
        raise WrongBytes(
            f"fetch {digest} at {host}", frozenset({host}), f"the bytes that came have the digest {actual}"
        )
