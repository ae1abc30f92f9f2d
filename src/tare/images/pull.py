"""PullImage as an operation of named steps.

    policy    what is asked of the repository's images: nothing, signatures, or to stay away
    resolve   the registry says, to these credentials, which digest the name stands for; every pull asks, cached or not
    fetch     index, manifest and configuration, each verified against its digest, and the keys of encrypted layers
    trust     the signatures that the policy asks for
    unpack    layers in parallel, each blob once: downloaded, verified, decompressed, unpacked and put in place
    record    the image and its names

A pull that fails is undone by collecting what nobody needs, so that layers which another image or another pull has a use
for stay. The record needs no undo: once it is written the image is whole, and stays even if the daemon dies right then. Of a pull that
dies with its process, the blobs stay for a day.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from tare.images.layers import chain_ids
from tare.images.manifest import ConfigDocument, Descriptor, Manifest, ManifestError, Platform, parse_config
from tare.images.names import by_digest, named
from tare.images.platform import choose, runs
from tare.images.policy import Rule
from tare.images.records import ImageConfig, ImageRecord
from tare.images.reference import Reference
from tare.images.registry import Registry
from tare.images.threads import together
from tare.images.trust import SignatureRecord, Trust
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
    trust: Trust
    rule: Rule | None = None
    digest: str = ""
    image: ImageRecord | None = None
    layers: list[Layer] = field(default_factory=list)
    artifact: Manifest | None = None
    signatures: list[SignatureRecord] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    key: str = field(default_factory=lambda: os.urandom(8).hex())

    def hold(self, names: Iterable[str]) -> None:
        """Keep these from being collected while this pull needs them."""
        names = list(names)
        self.workers.store.hold(names)
        self.held += names

    def release(self) -> None:
        """Hold and expect nothing any more."""
        self.workers.store.release(self.held)
        self.workers.store.arrived(self.key)
        self.held = []

    def expect(self, blobs: Iterable[Descriptor]) -> None:
        """Note which blobs are going to come."""
        self.workers.store.expect(self.key, dict.fromkeys(blob.digest for blob in blobs))


async def ask_policy(pull: Pull) -> None:
    """Stop here where images of this repository are rejected, whatever they are."""
    pull.rule = await pull.trust.rule(pull.reference.name)


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
    documents, manifest = await find_manifest(pull)
    if manifest.artifact_type:
        pull.artifact = manifest
        pull.image = artifact_record(documents, manifest)
        pull.hold((*pull.image.chain_ids, *pull.image.documents))
        return
    documents.append(manifest.config.digest)
    pull.hold(documents[-1:])
    config = parse_config(await pull.workers.configuration(manifest.config, pull.registry))
    check(manifest, config, pull.platform)
    chain = chain_ids(config.diff_ids)
    pull.hold((*chain, *(layer.digest for layer in manifest.layers)))
    parent = None
    for descriptor, diff_id, chain_id in zip(manifest.layers, config.diff_ids, chain, strict=True):
        secret = await pull.workers.secret(descriptor)
        parent = Layer(descriptor, diff_id, chain_id, parent, secret)
        pull.layers.append(parent)
    pull.image = image_record(documents, manifest, config, chain)


async def find_manifest(pull: Pull) -> tuple[list[str], Manifest]:
    """The manifest that the digest leads to on this platform, with the digests on the way, its own last."""
    documents = [pull.digest]
    for _ in range(MAX_NESTED_INDEXES):
        pull.hold(documents[-1:])
        document = await pull.workers.document(documents[-1], pull.registry)
        if isinstance(document, Manifest):
            return documents, document
        documents.append(choose(document, pull.platform).digest)
    raise ManifestError("read manifest", cause=f"indexes nested more than {MAX_NESTED_INDEXES} deep")


def image_record(
    documents: list[str], manifest: Manifest, config: ConfigDocument, chain: tuple[str, ...]
) -> ImageRecord:
    """An image, without names. `documents`: indexes, its manifest, its configuration."""
    return ImageRecord(
        id=manifest.config.digest,
        repo_tags=(),
        repo_digests=(),
        size=manifest.config.size + sum(layer.size for layer in manifest.layers),
        config=config.config,
        chain_ids=chain,
        created_at=time.time_ns(),
        layer_digests=tuple(layer.digest for layer in manifest.layers),
        documents=tuple(sorted(documents)),
        manifest=documents[-2],
        annotations=manifest.annotations or {},
    )


def artifact_record(documents: list[str], manifest: Manifest) -> ImageRecord:
    """An artifact, without names: its ID is its manifest's digest, and its blobs are kept like documents, since its directory links to them."""
    sizes = {blob.digest: blob.size for blob in manifest.blobs}
    return ImageRecord(
        id=documents[-1],
        repo_tags=(),
        repo_digests=(),
        size=sum(sizes.values()),
        config=ImageConfig(),
        chain_ids=(documents[-1],),
        created_at=time.time_ns(),
        documents=tuple(sorted({*documents, *sizes})),
        manifest=documents[-1],
        annotations=manifest.annotations or {},
        artifact_type=manifest.artifact_type,
    )


async def ask_for_signatures(pull: Pull) -> None:
    """See that the image is signed, where the policy asks for that."""
    assert pull.image is not None and pull.rule is not None
    digests = dict.fromkeys((pull.digest, pull.image.manifest or pull.digest))
    known = pull.workers.store.images().get(pull.image.id, pull.image).documents
    pull.signatures = await pull.trust.verify(pull.rule, pull.registry, list(digests), known)


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
    blobs = [layer.blob for layer in pull.layers] if pull.artifact is None else pull.artifact.blobs
    pull.expect(blobs)
    needed = pull.workers.space(pull.layers) if pull.artifact is None else pull.workers.missing(blobs)
    await pull.workers.store.check_space(needed)
    if pull.artifact is not None and pull.image is not None:
        await pull.workers.artifact(pull.image.id, pull.artifact, pull.registry, slots)
    await together(pull.workers.layer(layer, pull.registry, slots) for layer in pull.layers)


async def record(pull: Pull) -> None:
    """Note the image under its names."""
    store = pull.workers.store
    assert pull.image is not None
    pull.trust.keep(pull.signatures)
    pull.image = store.add(named(pull.image, pull.reference, pull.digest))


async def discard(pull: Pull) -> None:
    """Remove what only this pull needed."""
    pull.release()
    await pull.workers.store.collect()


PULL_IMAGE: Operation[Pull] = Operation(
    "PullImage",
    (
        Step("policy", ask_policy),
        Step("resolve", resolve),
        Step("fetch", fetch, discard),
        Step("trust", ask_for_signatures, discard),
        Step("unpack", unpack, discard),
        Step("record", record),
    ),
)
