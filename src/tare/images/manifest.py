"""Image documents: manifests, indexes and configurations of OCI (image-spec v1.1) and Docker (registry image spec v2, schema 2). Pure.

`parse_manifest` tells by the document itself which kind it is and returns a `Manifest` or an `Index`; `choose` picks the
entry of an index for a platform (`platform.py`); `parse_config` reads what containers are made from. Schema 1 is refused in so
many words; artifacts come as manifests that say so. Digests are the caller's to check.
"""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from tare.images.errors import PullError
from tare.images.records import ImageConfig
from tare.images.reference import is_digest

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
ACCEPTED = (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST)

T = TypeVar("T")
MAX_LAYERS = 500  # as many as one overlay mount takes
_SCHEMA1 = re.compile(r"application/vnd\.docker\.distribution\.manifest\.v1\+(json|prettyjws)")
_LAYER = re.compile(
    r"(application/vnd\.oci\.image\.layer\.(nondistributable\.)?v1\.tar(\+gzip|\+zstd)?"
    r"|application/vnd\.docker\.image\.rootfs\.(foreign\.)?diff\.tar(\.gzip|\.zstd)?)(\+encrypted)?"
)
_UNDISTRIBUTED = re.compile(r"\.nondistributable\.|\.foreign\.")
_CONFIG_TYPES = (OCI_CONFIG, DOCKER_CONFIG, "application/octet-stream")


class ManifestError(PullError):
    """A document from the registry is not what an image is made of."""


class Platform(msgspec.Struct, frozen=True, kw_only=True, rename={"os_version": "os.version"}):
    """What an image runs on, in Go's names (OCI image index, "platform")."""

    os: str = ""
    architecture: str = ""
    variant: str = ""
    os_version: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


class Descriptor(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A pointer to content (OCI descriptor). `size` in bytes; the digest is well-formed."""

    media_type: str = ""
    digest: str
    size: int
    platform: Platform | None = None
    artifact_type: str = ""
    annotations: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if not is_digest(self.digest):
            raise ValueError(f"{self.digest[:200]!r} is no digest")
        if self.size < 0:
            raise ValueError(f"a size of {self.size} bytes")


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One image: its configuration and its layers, bottom first. With an `artifact_type` it is no image, and its layers are any blobs."""

    config: Descriptor
    layers: tuple[Descriptor, ...]
    artifact_type: str = msgspec.field(default="", name="artifactType")
    annotations: dict[str, str] | None = None

    @property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Configuration and layers."""
        return self.config, *self.layers


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """Several images, one for each platform."""

    manifests: tuple[Descriptor, ...]


class References(msgspec.Struct, frozen=True, kw_only=True):
    """What any manifest or index names, be it something that could run here or not."""

    manifests: tuple[Descriptor, ...] | None = None
    config: Descriptor | None = None
    layers: tuple[Descriptor, ...] | None = None

    def blobs(self) -> list[Descriptor]:
        """Configuration and layers, each once, without those that are not to be in registries (OCI layer spec, "Non-Distributable Layers")."""
        named = (*(self.layers or ()), *((self.config,) if self.config else ()))
        kept = (blob for blob in named if not _UNDISTRIBUTED.search(blob.media_type))
        return list({blob.digest: blob for blob in kept}.values())


class _Envelope(msgspec.Struct, rename="camel"):
    """What tells the kinds of documents apart."""

    schema_version: int = 0
    media_type: str = ""
    artifact_type: str = ""
    manifests: object = None
    layers: object = None
    fs_layers: object = msgspec.field(default=None, name="fsLayers")


class _ContainerDefaults(msgspec.Struct, rename="pascal"):
    """The `config` object of an image configuration."""

    user: str | None = None
    exposed_ports: dict[str, object] | None = None
    env: list[str] | None = None
    entrypoint: list[str] | None = None
    cmd: list[str] | None = None
    volumes: dict[str, object] | None = None
    working_dir: str | None = None
    labels: dict[str, str] | None = None
    stop_signal: str | None = None


class _RootFs(msgspec.Struct):
    type: str = "layers"
    diff_ids: list[str] | None = None


class _ConfigDocument(msgspec.Struct):
    architecture: str = ""
    os: str = ""
    variant: str = ""
    rootfs: _RootFs = msgspec.field(default_factory=_RootFs)
    config: _ContainerDefaults | None = None


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step by which an image was made (OCI image config, "history"). `created` is a time as RFC 3339 has it."""

    created: str = ""
    created_by: str = ""
    comment: str = ""
    empty_layer: bool = False


class _History(msgspec.Struct):
    history: list[Step] | None = None


class ConfigDocument(msgspec.Struct, frozen=True, kw_only=True):
    """An image configuration: for which platform, of which layers (digests of their tar archives, bottom first), and with which defaults."""

    platform: Platform
    diff_ids: tuple[str, ...]
    config: ImageConfig


def parse_manifest(data: bytes, content_type: str = "") -> Manifest | Index:
    """The manifest or index in `data`. `content_type` is the registry's word, used where the document names no type.

    Raises ManifestError.
    """
    try:
        envelope = _decode(data, _Envelope, "manifest")
    except ManifestError as error:
        if not content_type or "json" in content_type:
            raise
        cause = f"the answer is of type {content_type[:100]} and no JSON"
        hint = "does a proxy or a login page answer in the registry's place?"
        raise ManifestError("read manifest", cause=cause, hint=hint) from error
    named = envelope.media_type or content_type.partition(";")[0].strip()
    if _SCHEMA1.fullmatch(named) or envelope.schema_version == 1 or envelope.fs_layers is not None:
        raise ManifestError(
            "read manifest",
            cause="the image is in Docker's schema 1 format, which registries gave up in 2017",
            hint="push it again with a current tool: skopeo copy, docker push",
        )
    if envelope.schema_version != 2:
        raise ManifestError("read manifest", cause=f"schema version {envelope.schema_version} is not 2")
    is_index = named in (OCI_INDEX, DOCKER_LIST) if named in ACCEPTED else envelope.manifests is not None
    if (is_index and envelope.layers is not None) or (not is_index and envelope.manifests is not None):
        raise ManifestError("read manifest", cause="it is a manifest and an index at once (CVE-2021-41190)")
    if is_index:
        return _decode(data, Index, "index")
    if envelope.layers is None:
        raise ManifestError("read manifest", cause=f"{named or 'a document without layers'} is no image manifest")
    manifest = _decode(data, Manifest, "manifest")
    if manifest.config.media_type in _CONFIG_TYPES:
        manifest = msgspec.structs.replace(manifest, artifact_type="")
    else:
        kind = manifest.artifact_type or manifest.config.media_type or "untyped"
        manifest = msgspec.structs.replace(manifest, artifact_type=kind)
    _check_layers(manifest)
    return manifest


def _check_layers(manifest: Manifest) -> None:
    """Refuse what is a well-formed manifest but no image that could run, and no artifact either."""
    if len(manifest.layers) > MAX_LAYERS:
        raise ManifestError(
            "read manifest", cause=f"{len(manifest.layers)} layers; at most {MAX_LAYERS} can be stacked"
        )
    for layer in manifest.layers:
        if not manifest.artifact_type and not _LAYER.fullmatch(layer.media_type):
            raise ManifestError(
                "read manifest", cause=f"layer {layer.digest} has the unknown type {layer.media_type!r}"
            )


def parse_references(data: bytes) -> References:
    """What a manifest or an index names. Raises ManifestError."""
    return _decode(data, References, "manifest")


def parse_config(data: bytes) -> ConfigDocument:
    """An image configuration. Raises ManifestError."""
    document = _decode(data, _ConfigDocument, "image configuration")
    diff_ids = tuple(document.rootfs.diff_ids or ())
    for diff_id in diff_ids:
        if not is_digest(diff_id):
            raise ManifestError("read image configuration", cause=f"{diff_id[:200]!r} is no diff ID")
    given = document.config or _ContainerDefaults()
    return ConfigDocument(
        platform=Platform(os=document.os, architecture=document.architecture, variant=document.variant),
        diff_ids=diff_ids,
        config=ImageConfig(
            user=given.user or "",
            env=tuple(given.env or ()),
            entrypoint=tuple(given.entrypoint or ()),
            cmd=tuple(given.cmd or ()),
            working_dir=given.working_dir or "",
            volumes=tuple(sorted(given.volumes or ())),
            stop_signal=given.stop_signal or "",
            labels=given.labels or {},
            exposed_ports=tuple(sorted(given.exposed_ports or ())),
        ),
    )


def parse_history(data: bytes) -> tuple[Step, ...]:
    """The steps that an image configuration tells of, oldest first. Raises ManifestError."""
    return tuple(_decode(data, _History, "image configuration").history or ())


def document_type(data: bytes) -> str:
    """The media type of a manifest or index, also where it does not name it itself. Raises ManifestError."""
    envelope = _decode(data, _Envelope, "manifest")
    return envelope.media_type or (OCI_INDEX if envelope.manifests is not None else OCI_MANIFEST)


def _decode(data: bytes, kind: type[T], what: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ManifestError(f"read {what}", cause=str(error)[:300]) from error
