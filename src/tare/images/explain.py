"""`tare explain-pull`: what a pull would do and why, without fetching a layer. Each host that is asked, each answer, each choice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from tare.errors import TareError, describe
from tare.images.auth import RegistryAuth
from tare.images.errors import explain as explained
from tare.images.manifest import Index
from tare.images.platform import acceptable, choose
from tare.images.pull import Pull, fetch, resolve
from tare.images.reference import parse
from tare.images.service import ImageService
from tare.images.transport import Trace

Line = tuple[int, str]


async def explain(images: ImageService, text: str, auth: RegistryAuth | None) -> AsyncGenerator[Line]:
    """Lines with their depth, as things come about. Raises MalformedReference, and PullError where the pull would fail."""
    lines: asyncio.Queue[Line | None] = asyncio.Queue()
    task = asyncio.ensure_future(_explain(images, text, auth, lines))
    task.add_done_callback(lambda _: lines.put_nowait(None))
    try:
        while (line := await lines.get()) is not None:
            yield line
        task.result()
    finally:
        task.cancel()
        await asyncio.wait((task,))


async def _explain(
    images: ImageService, text: str, auth: RegistryAuth | None, lines: asyncio.Queue[Line | None]
) -> None:
    def say(depth: int, words: str) -> None:
        lines.put_nowait((depth, words))

    reference = parse(text)
    say(0, f"{text} means {reference}")
    pull: Pull | None = None
    try:
        registry = await images.registries.of(reference, auth, trace=say)
        pull = images.subject(reference, registry)
        say(0, "which digest is it?")
        await resolve(pull)
        say(0, f"it is {pull.digest}" + (", which is here already and whole" if pull.image else ""))
        known, pull.image = pull.image, None
        await _documents(images, pull, say)
        for layer in pull.layers:
            _, state = images.workers.progress(layer)
            here = images.store.content.size(layer.blob.digest) is not None
            what = "unpacked already" if state == "done" else "would be unpacked" if here else "would be fetched"
            say(1, f"layer {layer.blob.digest} ({layer.blob.size} bytes): {what}")
        say(0, "nothing would be fetched" if known else "the image would be pulled")
    except (TareError, OSError) as error:
        say(0, f"it fails: {describe(error)}")
        raise explained(str(reference), error) from error
    finally:
        if pull is not None:
            pull.release()
        await images.store.collect()


async def _documents(images: ImageService, pull: Pull, say: Trace) -> None:
    say(0, "what is it made of?")
    document = await images.workers.document(pull.digest, pull.registry)
    if isinstance(document, Index):
        offered = ", ".join(str(entry.platform or "any") for entry in document.manifests)
        wanted = ", ".join("/".join(filter(None, pair)) for pair in acceptable(pull.platform))
        say(1, f"an index of {offered}; this machine takes, in this order, {wanted}")
        say(1, f"chosen: {choose(document, pull.platform).digest}")
    await fetch(pull)
    assert pull.image is not None
    say(0, f"image {pull.image.id}, {len(pull.layers)} layers")
