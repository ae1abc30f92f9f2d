"""Asking the policy, at every pull and again for every container: what an image's signatures are looked for in, and what is kept of them.

    pull       rule of the repository ─► reject, accept, or: kept signatures hold? ─► else the registry's, by tag and by referrers
    container  rule of each repository that the image is known by ─► kept signatures alone, with the keys that the policy has now

Signatures that held are kept in `state.db` (table `signatures`, by the manifest's digest) as they were found, and checked again
each time. One for an index holds for what the index leads to, since every step down is by digest.
Sources: cosign, "Signature spec" (tag sha256-<hex>.sig); OCI distribution spec v1.1, "Listing Referrers" and "Referrers Tag Schema".
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from tare.errors import InvalidArgument
from tare.images import policy
from tare.images.errors import SignatureValidationFailed
from tare.images.manifest import Descriptor
from tare.images.policy import Rule, Verdict
from tare.images.records import ImageRecord
from tare.images.reference import parse
from tare.images.registry import Registry
from tare.images.signatures import (
    BUNDLE_TYPE,
    SIGNATURE,
    SIMPLE_ARTIFACT,
    SIMPLE_TYPE,
    Doubtful,
    Evidence,
    bundled,
    doubts,
    simple,
)
from tare.state.database import Database

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_REFERRERS = 16
MAX_SIGNATURES = 64
MAX_DOCUMENT = 64 << 10  # bytes of what is signed, or of a bundle
HINT_PULL = "pull it again: its signatures are then looked for"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignatureRecord:
    """What is kept of a manifest's signatures."""

    digest: str
    evidence: tuple[Evidence, ...]


class _SignatureManifest(msgspec.Struct, frozen=True, kw_only=True):
    layers: tuple[Descriptor, ...] = ()


class _Referrers(msgspec.Struct, frozen=True, kw_only=True):
    manifests: tuple[Descriptor, ...] = ()


class Trust:
    """The policy of the file `path`, which may be absent where it is `optional`, and the signatures kept in `database`."""

    def __init__(self, path: Path, *, optional: bool, database: Database) -> None:
        self._path = path
        self._optional = optional
        self._table = database.table("signatures", SignatureRecord)
        self._kept = dict(self._table.items())

    async def rule(self, repository: str) -> Rule:
        """What is asked of a repository's images, by the file as it is now. Raises SignatureValidationFailed where it refuses them all."""
        found = await self._rules((repository,))
        if found[0].verdict is Verdict.REJECT:
            raise SignatureValidationFailed(
                f"use an image of {repository}", cause=f"{found[0]} in the policy {self._path} rejects it"
            )
        return found[0]

    async def _rules(self, repositories: Sequence[str]) -> list[Rule]:
        current = policy.ACCEPT_ALL
        if not self._optional or os.path.lexists(self._path):  # a node without a policy pays nothing for it
            current = await asyncio.to_thread(policy.read, self._path, optional=self._optional)
        return [current.rule(repository) for repository in repositories]

    async def verify(
        self, rule: Rule, registry: Registry, digests: Sequence[str], known: Collection[str]
    ) -> list[SignatureRecord]:
        """The signatures, to be kept, by which an image may be used: one of these digests of it, index first, is signed.

        What is kept already holds for any document of the same image that is here (`known`).

        Raises SignatureValidationFailed, or PullError where the registry cannot be asked.
        """
        if rule.verdict is not Verdict.SIGNED:
            return []
        repository, reasons = registry.reference.name, list[str]()
        known = {*digests, *known}
        if await self._doubts(rule, self._evidence(known), known, repository) is None:
            return []
        for digest in digests:
            found = await gather(registry, digest)
            problem = await self._doubts(rule, found, (digest,), repository)
            if problem is None:
                return [SignatureRecord(digest=digest, evidence=tuple(found))]
            reasons += [f"{reason} ({digest})" for reason in problem]
        cause = "; ".join(reasons)
        raise SignatureValidationFailed(
            f"trust an image of {repository}", cause=f"{rule} asks for a signature: {cause}"
        )

    async def _doubts(
        self, rule: Rule, found: Sequence[Evidence], digests: Collection[str], repository: str
    ) -> list[str] | None:
        try:
            return await asyncio.to_thread(doubts, found, rule.keys, digests, repository)
        except Doubtful as error:
            cause = f"{rule}: {error}"
            raise SignatureValidationFailed(f"trust an image of {repository}", cause=cause) from error

    def _evidence(self, digests: Iterable[str]) -> list[Evidence]:
        kept = (self._kept.get(digest) for digest in digests)
        return [item for record in kept if record is not None for item in record.evidence]

    def keep(self, records: Iterable[SignatureRecord]) -> None:
        """Signatures of an image that is about to be recorded."""
        for record in records:
            self._table.put(record.digest, record)
            self._kept[record.digest] = record

    def prune(self, images: Iterable[ImageRecord]) -> None:
        """Forget the signatures of what is none of these images."""
        wanted = {digest for image in images for digest in image.documents}
        for digest in [digest for digest in self._kept if digest not in wanted]:
            self._table.delete(digest)
            del self._kept[digest]

    async def check(self, image: ImageRecord, asked: str) -> None:
        """May a container have this image, asked for by the name `asked`? Raises SignatureValidationFailed.

        The rule is that of the name's repository where the image is known by it. By an ID, or a name that it does not bear, the image
        may be used if one of its own names may.
        """
        known = repositories(image)
        named = repository_of(asked)
        names = [named] if named in known else known or [""]
        problems = []
        for name, rule in zip(names, await self._rules(names), strict=True):
            if rule.verdict is Verdict.ACCEPT:
                return
            problem = [f"{rule} rejects it"]
            if rule.verdict is Verdict.SIGNED:
                found = await self._doubts(rule, self._evidence(image.documents), image.documents, name)
                if found is None:
                    return
                problem = found
            problems.append(f"{name or 'an image without a name'}: {', '.join(problem)}")
        raise SignatureValidationFailed(f"use image {image.id}", cause="; ".join(problems), hint=HINT_PULL)


def repository_of(text: str) -> str:
    """The repository that a name means; "" for an ID."""
    try:
        return parse(text).name
    except InvalidArgument:
        return ""


def repositories(image: ImageRecord) -> list[str]:
    """The repositories that an image is known by, in order."""
    tagged = {name.rpartition(":")[0] for name in image.repo_tags}
    return sorted(tagged | {name.partition("@")[0] for name in image.repo_digests})


async def gather(registry: Registry, digest: str) -> list[Evidence]:
    """The signatures that the registry has for a manifest; what is no signature is passed over. Raises PullError."""
    name = digest.replace(":", "-")
    found: list[Evidence] = []
    if (data := await registry.tagged(f"{name}.sig")) is not None:
        found += await _signatures(registry, data)
    listing = await registry.referrers(digest)
    if listing is None:
        listing = await registry.tagged(name)
    leading = [item for item in _decoded(listing, _Referrers).manifests if may_lead(item.artifact_type)]
    for descriptor in leading[:MAX_REFERRERS]:
        document, _ = await registry.document(descriptor.digest)
        found += await _signatures(registry, document)
    return found[:MAX_SIGNATURES]


def may_lead(artifact_type: str) -> bool:
    """May a manifest of this type hold signatures?"""
    return artifact_type in ("", SIMPLE_ARTIFACT, SIMPLE_TYPE) or artifact_type.startswith(BUNDLE_TYPE)


def _decoded(data: bytes | None, kind: type[T]) -> T:
    """A document of the registry's, an empty one where there is none or it is something else."""
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        log.info("passed over what should lead to signatures: %s", error)
        return kind()


async def _signatures(registry: Registry, manifest: bytes) -> list[Evidence]:
    """The signatures of one manifest that holds signatures."""
    found: list[Evidence] = []
    for layer in _decoded(manifest, _SignatureManifest).layers[:MAX_SIGNATURES]:
        signature = (layer.annotations or {}).get(SIGNATURE, "")
        is_bundle = layer.media_type.startswith(BUNDLE_TYPE)
        if (not is_bundle and (layer.media_type != SIMPLE_TYPE or not signature)) or layer.size > MAX_DOCUMENT:
            continue
        try:
            data = await registry.small_blob(layer)
            found += bundled(data) if is_bundle else [simple(data, signature)]
        except Doubtful as error:
            log.info("passed over a signature of %s: %s", registry.reference, error)
    return found
