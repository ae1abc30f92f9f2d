"""PullImage as an operation of named steps.

    resolve   the registry says, to these credentials, which digest the name stands for; every pull asks, cached or not
    fetch     index, manifest and configuration, each verified against its digest
    unpack    layers in parallel, each blob once: downloaded, verified, decompressed, unpacked and put in place
    record    the image and its names

A pull that fails is undone by collecting what nobody needs, so that layers which another image or another pull has a use
for stay. The record needs no undo: once it is written the image is whole, and stays even if the daemon dies right then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from tare.images.layers import chain_ids
from tare.images.manifest import ConfigDocument, Manifest, ManifestError, Platform, parse_config
from tare.images.names import by_digest, named
from tare.images.platform import choose, runs
from tare.images.records import ImageRecord
from tare.images.reference import Reference
from tare.images.registry import Registry
from tare.images.workers import Layer, Workers
from tare.state.operations import Operation, Step

MAX_NESTED_INDEXES = 4


@dataclass(slots=True, eq=False)
class Pull:
    """One PullImage: what was asked for, whom to ask, and what is known so far."""

    reference: Reference
    registry: Registry
    workers: Workers
    platform: Platform
    parallel_layers: int
    digest: str = ""
    image: ImageRecord | None = None
    layers: list[Layer] = field(default_factory=list)
    held: list[str] = field(default_factory=list)

    def hold(self, names: Iterable[str]) -> None:
        """Keep these from being collected while this pull needs them."""
        names = list(names)
        self.workers.store.hold(names)
        self.held += names

    def release(self) -> None:
        """Hold nothing any more."""
        self.workers.store.release(self.held)
        self.held = []


async def resolve(pull: Pull) -> None:
    """Ask which digest it is, and see whether that image is here, whole."""
    pull.digest = await pull.registry.resolve()
    known = by_digest(pull.workers.store.images().values(), pull.digest)
    if known is not None and pull.workers.store.whole(known):
        pull.image = known
        pull.hold((*known.chain_ids, *known.documents, *known.layer_digests))


async def fetch(pull: Pull) -> None:
    """Get the documents, and make of them the record that the image will have."""
    if pull.image is not None:
        return
    documents = [pull.digest]
    for _ in range(MAX_NESTED_INDEXES):
        pull.hold(documents[-1:])
        document = await pull.workers.document(documents[-1], pull.registry)
        if isinstance(document, Manifest):
            break
        documents.append(choose(document, pull.platform).digest)
    else:
        raise ManifestError("read manifest", cause=f"indexes nested more than {MAX_NESTED_INDEXES} deep")
    manifest = document
    documents.append(manifest.config.digest)
    pull.hold(documents[-1:])
    config = parse_config(await pull.workers.configuration(manifest.config, pull.registry))
    check(manifest, config, pull.platform)
    chain = chain_ids(config.diff_ids)
    pull.hold((*chain, *(layer.digest for layer in manifest.layers)))
    parent = None
    for descriptor, diff_id, chain_id in zip(manifest.layers, config.diff_ids, chain, strict=True):
        parent = Layer(descriptor, diff_id, chain_id, parent)
        pull.layers.append(parent)
    pull.image = ImageRecord(
        id=manifest.config.digest,
        repo_tags=(),
        repo_digests=(),
        size=manifest.config.size + sum(layer.size for layer in manifest.layers),
        config=config.config,
        chain_ids=chain,
        created_at=time.time_ns(),
        layer_digests=tuple(layer.digest for layer in manifest.layers),
        documents=tuple(sorted(documents)),
    )


def check(manifest: Manifest, config: ConfigDocument, platform: Platform) -> None:
    """Raise ManifestError where manifest and configuration do not fit each other, or this machine."""
    if len(manifest.layers) != len(config.diff_ids):
        cause = f"{len(manifest.layers)} layers in the manifest, {len(config.diff_ids)} diff IDs in the configuration"
        raise ManifestError("read image configuration", cause=cause)
    if not runs(platform, config.platform):
        raise ManifestError("choose platform", cause=f"the image is for {config.platform}, this machine is {platform}")


async def unpack(pull: Pull) -> None:
    """Bring all layers in place; the first that fails ends the others, save those that another pull waits for."""
    slots = asyncio.Semaphore(pull.parallel_layers)
    try:
        async with asyncio.TaskGroup() as group:
            for layer in pull.layers:
                group.create_task(pull.workers.layer(layer, pull.registry, slots))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def record(pull: Pull) -> None:
    """Note the image under its names."""
    store = pull.workers.store
    assert pull.image is not None
    pull.image = store.add(named(pull.image, pull.reference, pull.digest))


async def discard(pull: Pull) -> None:
    """Remove what only this pull needed."""
    pull.release()
    await pull.workers.store.collect()


PULL_IMAGE: Operation[Pull] = Operation(
    "PullImage",
    (
        Step("resolve", resolve),
        Step("fetch", fetch, discard),
        Step("unpack", unpack, discard),
        Step("record", record),
    ),
)
