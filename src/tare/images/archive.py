"""Images in files: OCI image layouts (image-spec v1.1, "Image Layout Specification") and what `docker save` writes. Pure.

    oci-layout, index.json, blobs/<algorithm>/<hex>       an OCI layout: digests are those of the registry
    manifest.json                                         Docker's list of images: configuration, layers and tags by path

An archive may be both, and what `save` writes for Docker is: then `index.json` decides. In one that is Docker's alone nothing
names a manifest, so that one is made of what it has; the image's ID is the same all the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from tare.images.errors import PullError
from tare.images.manifest import ACCEPTED, OCI_CONFIG, OCI_INDEX, OCI_MANIFEST, Descriptor
from tare.images.reference import MalformedReference, Reference, parse

FULL_NAME = "io.containerd.image.name"
REF_NAME = "org.opencontainers.image.ref.name"
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'
BLOCK = 512
_BLOB = re.compile(r"(?:\./)?blobs/(sha256/[0-9a-f]{64}|sha512/[0-9a-f]{128})")


class ArchiveError(PullError):
    """It is no archive of images, or not a whole one."""


@dataclass(frozen=True, slots=True)
class Found:
    """One image of an archive: the digest of its manifest or index, and the references that it goes by there.

    `genuine` says that the digest is a registry's, not that of a manifest made up here.
    """

    digest: str
    names: tuple[Reference, ...]
    genuine: bool = True


class _Entry(msgspec.Struct, rename="pascal"):
    """One image in Docker's manifest.json."""

    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class _Listed(msgspec.Struct, rename="camel"):
    digest: str
    size: int
    media_type: str = ""
    annotations: dict[str, str] | None = None


class _Index(msgspec.Struct):
    manifests: list[_Listed]


def blob_digest(path: str) -> str | None:
    """The digest that a path in a layout stands for."""
    found = _BLOB.fullmatch(path)
    return found[1].replace("/", ":") if found else None


def blob_path(digest: str) -> str:
    """Where a layout has a blob."""
    return "blobs/" + digest.replace(":", "/")


def read_index(data: bytes, name: str | None) -> list[Found]:
    """The images of a layout's index.json. `name` is the repository, with or without a tag, of those that have none. Raises ArchiveError."""
    try:
        listed = msgspec.json.decode(data, type=_Index).manifests
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ArchiveError("read index.json", cause=str(error)[:300]) from error
    names: dict[str, list[Reference]] = {}
    for entry in listed:
        if entry.media_type and entry.media_type not in ACCEPTED:
            continue
        found = names.setdefault(entry.digest, [])
        reference = _reference(entry.annotations or {}, name if len(listed) == 1 else None)
        if reference is not None and reference not in found:
            found.append(reference)
    return [Found(digest, tuple(found)) for digest, found in names.items()]


def _reference(annotations: Mapping[str, str], name: str | None) -> Reference | None:
    """What an entry is called: its full name, else a full one in the OCI annotation, else the given name with the tag there."""
    tag = annotations.get(REF_NAME, "")
    text = annotations.get(FULL_NAME) or (tag if "/" in tag or ":" in tag else "")
    if name is not None:
        text = name if ":" in name.rpartition("/")[2] or not tag or text else f"{name}:{tag}"
    try:
        return parse(text) if text else None
    except MalformedReference as error:
        raise ArchiveError("read index.json", cause=str(error)) from error


def read_docker(data: bytes, name: str | None) -> list[tuple[str, tuple[str, ...], tuple[Reference, ...]]]:
    """Docker's manifest.json: the path of each image's configuration, those of its layers, and its names. Raises ArchiveError."""
    try:
        entries = msgspec.json.decode(data, type=list[_Entry])
        named = [[name] if name and len(entries) == 1 else entry.repo_tags or [] for entry in entries]
        return [
            (entry.config, tuple(entry.layers), tuple(parse(tag) for tag in tags))
            for entry, tags in zip(entries, named, strict=True)
        ]
    except (msgspec.DecodeError, ValueError, RecursionError, MalformedReference) as error:
        raise ArchiveError("read manifest.json", cause=str(error)[:300]) from error


def made_manifest(config: Descriptor, layers: Sequence[Descriptor]) -> bytes:
    """A manifest for an image that came without one, always the same for the same parts."""
    document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": plain(config, OCI_CONFIG),
        "layers": [plain(layer, layer.media_type) for layer in layers],
    }
    return json.dumps(document, separators=(",", ":")).encode()


def plain(descriptor: Descriptor, media_type: str) -> dict[str, Any]:
    """A descriptor as JSON has it."""
    return {"mediaType": media_type, "digest": descriptor.digest, "size": descriptor.size}


def made_index(images: Sequence[tuple[Descriptor, Reference | None]]) -> bytes:
    """index.json of a layout with these manifests or indexes."""
    manifests = []
    for descriptor, reference in images:
        entry = plain(descriptor, descriptor.media_type)
        if reference is not None:
            entry["annotations"] = {FULL_NAME: str(reference), REF_NAME: reference.tag or str(reference)}
        manifests.append(entry)
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}, indent=1).encode()


def made_docker(images: Sequence[tuple[str, Sequence[str], Sequence[str]]]) -> bytes:
    """manifest.json: the digests of each image's configuration and layers, and its tags."""
    entries = [
        {"Config": blob_path(config), "RepoTags": list(tags), "Layers": [blob_path(layer) for layer in layers]}
        for config, layers, tags in images
    ]
    return json.dumps(entries).encode()


def tar_header(path: str, size: int) -> bytes:
    """The header of a plain file (ustar), owned by root, of no time: archives of the same images are the same bytes."""
    fields = (
        path.encode().ljust(100, b"\0"),
        b"0000644\0" + b"0000000\0" * 2,
        b"%011o\0" % size if size < 1 << 33 else b"\x80" + size.to_bytes(11, "big"),
        b"00000000000\0",
        b" " * 8 + b"0",
        bytes(100) + b"ustar\x0000",
    )
    header = b"".join(fields).ljust(BLOCK, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]
