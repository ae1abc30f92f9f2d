"""The service tare.v1.Images: each method translates its request, makes one call on the image rooms, and translates what comes back.

Methods bear the proto's names, since `cri.dispatch` finds them by those. A pull goes on when its caller leaves; everything else ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import TypeVar

from tare.api.v1 import tare_pb2 as pb
from tare.images.auth import RegistryAuth
from tare.images.explain import explain
from tare.images.freshness import freshness
from tare.images.manifest import Descriptor
from tare.images.pull import Pull
from tare.images.service import ImageService
from tare.images.transfers import Transfers
from tare.images.verify import Finding, Verifier
from tare.images.workers import Workers

GLANCE_SECONDS = 0.1  # between two looks at how far a pull is
T = TypeVar("T")


def credentials(message: pb.Credentials) -> RegistryAuth | None:
    """Credentials; None where there are none in it."""
    auth = RegistryAuth(
        username=message.username,
        password=message.password,
        server_address=message.server_address,
        identity_token=message.identity_token,
        registry_token=message.registry_token,
    )
    return auth if auth.username or auth.identity_token or auth.registry_token else None


def states(workers: Workers, pulls: Iterable[Pull]) -> list[tuple[str, Descriptor, tuple[int, str]]]:
    """How far each layer of pulls, or each blob of an artifact, is; with a key that tells layers of one blob apart."""
    found = []
    for pull in pulls:
        found += [(layer.chain_id, layer.blob, workers.progress(layer)) for layer in pull.layers]
        if pull.artifact is not None:
            found += [(blob.digest, blob, workers.coming(blob)) for blob in pull.artifact.layers]
    return found


class Images:
    """Over one image service."""

    lasting: frozenset[str] = frozenset()

    def __init__(self, images: ImageService, transfers: Transfers) -> None:
        self._images = images
        self._transfers = transfers
        self._verifier = Verifier(images)

    async def Pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Progress]:
        """How far each layer is, whenever that changes, and in the end the image."""
        pulls: list[Pull] = []
        task = asyncio.ensure_future(self._images.pull(request.image, credentials(request.auth), pulls.append))
        shown: dict[str, tuple[int, str]] = {}
        while True:
            ended, _ = await asyncio.wait((task,), timeout=GLANCE_SECONDS)
            for key, blob, state in states(self._images.workers, pulls):
                if ended and not task.exception():
                    state = (blob.size, "done")
                if shown.get(key) != state:
                    shown[key] = state
                    yield pb.Progress(blob=blob.digest, done=state[0], total=blob.size, state=state[1])
            if ended:
                image = task.result()
                yield pb.Progress(image_id=image.id, digest=pulls[0].digest if pulls else "")
                return

    async def Push(self, request: pb.PushRequest) -> AsyncIterator[pb.Progress]:
        """How far each blob is, and in the end the manifest's digest."""

        async def work(tell: Callable[[pb.Progress], None]) -> pb.Progress:
            digest = await self._transfers.push(
                request.image,
                request.target,
                credentials(request.auth),
                lambda blob, done, total, state: tell(pb.Progress(blob=blob, done=done, total=total, state=state)),
                whole=request.whole,
                origin_auth=credentials(request.origin_auth),
            )
            return pb.Progress(digest=digest)

        async for message in told(work):
            yield message

    async def Tag(self, request: pb.TagRequest) -> pb.ImageReply:
        """One more name."""
        image, name = self._transfers.tag(request.image, request.name)
        return pb.ImageReply(image_id=image.id, name=name)

    async def Save(self, request: pb.SaveRequest) -> AsyncIterator[pb.Chunk]:
        """The archive."""
        async for piece in self._transfers.save(list(request.images), docker=request.docker):
            yield pb.Chunk(data=piece)

    async def Load(self, requests: AsyncIterator[pb.LoadRequest]) -> pb.LoadReply:
        """What was in the archive."""
        first = await anext(aiter(requests), None)
        if first is None:
            first = pb.LoadRequest()

        async def pieces() -> AsyncIterator[bytes]:
            yield first.data
            async for request in requests:
                yield request.data

        loaded = await self._transfers.load(pieces(), first.name or None)
        return pb.LoadReply(images=[pb.LoadedImage(image_id=image.id, names=image.repo_tags) for image in loaded])

    async def History(self, request: pb.ImageRequest) -> pb.HistoryReply:
        """The steps."""
        return pb.HistoryReply(
            entries=[
                pb.HistoryEntry(
                    created=made.step.created,
                    created_by=made.step.created_by,
                    comment=made.step.comment,
                    size=made.size,
                    layer=made.layer,
                )
                for made in await self._transfers.history(request.image)
            ]
        )

    async def Verify(self, request: pb.VerifyRequest) -> AsyncIterator[pb.Finding]:
        """What was looked at, as it is."""
        async with aclosing(self._verifier.verify(list(request.images))) as findings:
            async for item in findings:
                yield finding(item)

    async def Repair(self, request: pb.RepairRequest) -> AsyncIterator[pb.Finding]:
        """What was made anew."""
        async with aclosing(self._verifier.repair(request.image, credentials(request.auth))) as findings:
            async for item in findings:
                yield finding(item)

    async def ExplainPull(self, request: pb.ExplainRequest) -> AsyncIterator[pb.Explanation]:
        """The trace."""
        async with aclosing(explain(self._images, request.image, credentials(request.auth))) as lines:
            async for depth, text in lines:
                yield pb.Explanation(depth=depth, text=text)

    async def Outdated(self, request: pb.OutdatedRequest) -> AsyncIterator[pb.Freshness]:
        """Each tag, when its registry has answered."""
        auths = [auth for auth in map(credentials, request.auth) if auth is not None]
        async with aclosing(freshness(self._images, list(request.images), auths)) as found:
            async for item in found:
                yield pb.Freshness(
                    name=item.name, image_id=item.image_id, here=item.here, there=item.there, trouble=item.trouble
                )


def finding(item: Finding) -> pb.Finding:
    """A finding as a message."""
    return pb.Finding(
        image_id=item.image_id, kind=item.kind, name=item.name, trouble=item.trouble, repaired=item.repaired
    )


async def told(work: Callable[[Callable[[T], None]], Awaitable[T]]) -> AsyncIterator[T]:
    """What `work` tells while it goes on, and then its result. It is cancelled when nobody listens any more."""
    queue: asyncio.Queue[T | None] = asyncio.Queue()
    task = asyncio.ensure_future(work(queue.put_nowait))
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (item := await queue.get()) is not None:
            yield item
        yield task.result()
    finally:
        task.cancel()
        await asyncio.wait((task,))
