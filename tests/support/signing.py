"""Signatures of images as cosign and sigstore make them: keys, signed documents, and where they lie in a registry.

key = Key.make("ecdsa")
upload_signature(registry, "team/app", digest, key)                     # as `cosign sign --key` does: tag sha256-<hex>.sig
upload_bundle(registry, "team/app", digest, bundle(key, digest))        # a sigstore bundle, found by the referrers' tag
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.support.images import OCI, Blob, Layout
from tests.support.registry import Registry

Private = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
SIMPLE = "application/vnd.dev.cosign.simplesigning.v1+json"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
STATEMENT = "application/vnd.in-toto+json"
SIGN = "https://sigstore.dev/cosign/sign/v1"
EMPTY = Blob(b"{}")


@dataclass(frozen=True, slots=True)
class Key:
    """A key pair."""

    private: Private

    @classmethod
    def make(cls, kind: str) -> Key:
        """A new one: "ecdsa", "ed25519" or "rsa"."""
        if kind == "ecdsa":
            return cls(ec.generate_private_key(ec.SECP256R1()))
        if kind == "ed25519":
            return cls(ed25519.Ed25519PrivateKey.generate())
        return cls(rsa.generate_private_key(65537, 2048))

    @property
    def public(self) -> bytes:
        """The public key as PEM."""
        return self.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def sign(self, message: bytes) -> bytes:
        """A signature as cosign makes it."""
        if isinstance(self.private, ec.EllipticCurvePrivateKey):
            return self.private.sign(message, ec.ECDSA(hashes.SHA256()))
        if isinstance(self.private, ed25519.Ed25519PrivateKey):
            return self.private.sign(message)
        return self.private.sign(message, padding.PKCS1v15(), hashes.SHA256())


def simple(digest: str, repository: str, **critical: object) -> bytes:
    """Cosign's document about a manifest."""
    parts: dict[str, object] = {
        "identity": {"docker-reference": repository},
        "image": {"docker-manifest-digest": digest},
        "type": "cosign container image signature",
    }
    return json.dumps({"critical": parts | critical, "optional": None}).encode()


def bundle(key: Key, digest: str, *, name: str = "", predicate: str = SIGN, kind: str = STATEMENT) -> bytes:
    """A sigstore bundle of a statement about a manifest."""
    algorithm, _, value = digest.partition(":")
    subject: dict[str, Any] = {"digest": {algorithm: value}} | ({"name": name} if name else {})
    statement = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [subject],
        "predicateType": predicate,
        "predicate": {},
    }
    payload = json.dumps(statement).encode()
    message = b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload)
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": kind,
        "signatures": [{"sig": base64.b64encode(key.sign(message)).decode()}],
    }
    material = {"publicKey": {"hint": "a key"}, "tlogEntries": []}
    return json.dumps({"mediaType": BUNDLE, "verificationMaterial": material, "dsseEnvelope": envelope}).encode()


def upload_signature(
    registry: Registry, repository: str, digest: str, key: Key, directory: Path, document: bytes | None = None
) -> None:
    """Sign a manifest as cosign does. `document` is what is signed, if not the right one."""
    text = document or simple(digest, f"{registry.url}/{repository}")
    signature = base64.b64encode(key.sign(text)).decode()
    layout = Layout(directory)
    layer = layout.add(text).descriptor(SIMPLE, annotations={"dev.cosignproject.cosign/signature": signature})
    config = layout.add(b"{}").descriptor(OCI + "config.v1+json")
    _upload(registry, layout, f"{repository}:{digest.replace(':', '-')}.sig", config, [layer])


def upload_bundle(registry: Registry, repository: str, digest: str, data: bytes, directory: Path) -> None:
    """Attach a bundle to a manifest, by the tag that stands for the referrers API where a registry has none."""
    layout = Layout(directory)
    manifest = layout.add_json(
        {
            "schemaVersion": 2,
            "mediaType": OCI + "manifest.v1+json",
            "artifactType": BUNDLE,
            "config": layout.add(EMPTY.data).descriptor("application/vnd.oci.empty.v1+json"),
            "layers": [layout.add(data).descriptor(BUNDLE)],
            "subject": {"mediaType": OCI + "manifest.v1+json", "digest": digest, "size": 1},
        }
    ).descriptor(OCI + "manifest.v1+json", artifactType=BUNDLE)
    index = {"schemaVersion": 2, "mediaType": OCI + "index.v1+json", "manifests": [manifest]}
    layout.tag("latest", layout.add_json(index).descriptor(OCI + "index.v1+json"))
    registry.upload(layout.directory, f"{repository}:{digest.replace(':', '-')}")


def upload_artifact(
    registry: Registry,
    name: str,
    files: Mapping[str, bytes],
    directory: Path,
    *,
    artifact_type: str = "application/vnd.tests.model",
) -> str:
    """Push an artifact whose blobs have these titles, as oras does; returns its manifest's digest. A title "" is left away."""
    layout = Layout(directory)
    titled = [
        layout.add(data).descriptor(
            "application/octet-stream", **({"annotations": {"org.opencontainers.image.title": title}} if title else {})
        )
        for title, data in files.items()
    ]
    config = layout.add(EMPTY.data).descriptor("application/vnd.oci.empty.v1+json")
    return _upload(registry, layout, name, config, titled, artifactType=artifact_type)


def _upload(
    registry: Registry, layout: Layout, name: str, config: object, layers: list[dict[str, object]], **more: str
) -> str:
    kind = OCI + "manifest.v1+json"
    manifest = layout.add_json(
        {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers, **more}
    ).descriptor(kind)
    layout.tag("latest", manifest)
    return registry.upload(layout.directory, name)
