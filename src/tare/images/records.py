"""What is remembered of images and of unpacked layers: frozen values in `state.db` (tables `images`, `layers` and `expected`)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What containers of an image start from (OCI image config, "config"). Absent things are empty; `volumes` and `exposed_ports` are sorted."""

    user: str = ""
    env: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    working_dir: str = ""
    volumes: tuple[str, ...] = ()
    stop_signal: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    exposed_ports: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """One image on this machine.

    `id` is the digest of its configuration. `repo_tags` are repository:tag, `repo_digests` repository@digest with the
    digest that the name stood for (the index's where there is one). `size` is that of the compressed layers and the
    configuration, in bytes. `chain_ids` name the unpacked layers and `layer_digests` their blobs, bottom first;
    `documents` are the digests of configuration, manifests and indexes, and `manifest` is the one that names the layers; its
    `annotations` are kept. `created_at`: when it came, `used_at`: when a container last needed it, ns since the epoch.
    An OCI artifact has its `artifact_type`, its manifest's digest as ID and only chain ID, and its blobs among its documents.
    """

    id: str
    repo_tags: tuple[str, ...]
    repo_digests: tuple[str, ...]
    size: int
    config: ImageConfig
    chain_ids: tuple[str, ...]
    pinned: bool = False
    created_at: int = 0
    layer_digests: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()
    manifest: str = ""
    annotations: dict[str, str] = field(default_factory=dict)
    used_at: int = field(default=0, compare=False)
    artifact_type: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecord:
    """One unpacked layer: `size` on disk in bytes, `inodes` it takes, and on which layer it stands ("" for the lowest)."""

    chain_id: str
    diff_id: str
    parent: str
    size: int
    inodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What images, or the writable layers of containers, take on the disk under `path`."""

    path: str
    bytes: int
    inodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Blobs that one pull is bringing, since when (ns since the epoch): a row for as long as the pull is under way."""

    digests: tuple[str, ...]
    since: int
