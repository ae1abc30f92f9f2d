"""What is less common, as it comes over the wire: sha512, layers that can be read in pieces, and platforms with variants."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
from pathlib import Path

import pytest

from tests.support.image_service import files_of, image_service
from tests.support.images import OCI, File, Layout, Tree, make_image, tar_of
from tests.support.proxy import Asked, Fault, FaultProxy
from tests.support.registry import Registry, run

pytestmark = pytest.mark.root

TREE: Tree = {"etc/motd": "hello", "data": File(b"\0\1\2" * 100_000)}


def test_sha512(tmp_path: Path) -> None:
    """From a registry of two paths, since docker-registry links such blobs but lists them as sha256."""
    blobs: dict[str, bytes] = {}

    def stored(data: bytes, media_type: str) -> dict[str, object]:
        digest = "sha512:" + hashlib.sha512(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data)}

    archive = tar_of(TREE)
    layer = stored(gzip.compress(archive), OCI + "layer.v1.tar+gzip")
    diff_id = "sha512:" + hashlib.sha512(archive).hexdigest()
    platform = {"os": "linux", "architecture": "amd64"}
    config = stored(
        json.dumps({**platform, "rootfs": {"type": "layers", "diff_ids": [diff_id]}}).encode(), OCI + "config.v1+json"
    )
    kind = OCI + "manifest.v1+json"
    document = {"schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer]}
    manifest = str(stored(json.dumps(document).encode(), kind)["digest"])

    def script(asked: Asked) -> Fault:
        digest = asked.path.rpartition("/")[2]
        data = blobs.get(manifest if digest == "1" else digest)
        headers = {"Docker-Content-Digest": manifest, "Content-Type": kind}
        if data is None:
            return Fault(status=404)
        return Fault(status=200, headers={**headers, "Content-Length": str(len(data))}, body=data)

    async def main() -> None:
        with FaultProxy("127.0.0.1:1", script) as proxy:
            async with image_service(tmp_path) as service:
                image = await service.pull(f"{proxy.url}/long/digests:1", None)
                assert image.id == config["digest"] and image.manifest == manifest
                assert image.repo_digests == (f"{proxy.url}/long/digests@{manifest}",)
                assert (service.layer_paths(image)[0] / "etc/motd").read_text() == "hello"
                assert service.find(image.repo_digests[0]) == image
            async with image_service(tmp_path) as service:
                assert [known.id for known in service.list()] == [image.id]
                blobs[str(layer["digest"])] = gzip.compress(archive, 1)
                await service.remove(image.repo_digests[0])
                assert files_of(tmp_path) == []

    asyncio.run(main())


def test_zstd_chunked(registry: Registry, tmp_path: Path) -> None:
    archive = tar_of(TREE).rstrip(b"\0")
    archive += bytes(-len(archive) % 512 + 1024)  # skopeo drops what more padding there is, and so changes the diff ID
    layout = make_image(tmp_path / "layout", [archive])
    run(
        "skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", "--dest-compress-format=zstd:chunked",
        "--dest-compress", f"oci:{layout}:latest", f"docker://{registry.url}/formats/chunked:1",
    )  # fmt: skip

    async def main() -> None:
        async with image_service(tmp_path) as service:
            image = await service.pull(f"{registry.url}/formats/chunked:1", None)
            manifest = json.loads((tmp_path / "root/blobs/sha256" / image.manifest[7:]).read_bytes())
            assert any("zstd-chunked" in key for key in manifest["layers"][0]["annotations"])
            (layer,) = service.layer_paths(image)
            assert (layer / "data").read_bytes() == b"\0\1\2" * 100_000
            assert sorted(path.name for path in layer.iterdir()) == ["data", "etc"]

    asyncio.run(main())


def test_estargz(registry: Registry, tmp_path: Path) -> None:
    """A gzip member for each file, a table of contents as the last file, and a footer that is an empty member (eStargz specification)."""
    archive = tar_of({**TREE, "stargz.index.json": json.dumps({"version": 1, "entries": []})})
    cut = [archive[at : at + 1024] for at in range(0, len(archive), 1024)]
    stored = b"".join(gzip.compress(piece, mtime=0) for piece in cut) + gzip.compress(b"")
    layout = Layout(tmp_path / "layout")
    blob = layout.add(stored)
    diff_id = "sha256:" + hashlib.sha256(archive).hexdigest()
    config = layout.add_json(
        {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    )
    notes = {"containerd.io/snapshot/stargz/toc.digest": "sha256:" + "0" * 64}
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI + "manifest.v1+json",
        "config": config.descriptor(OCI + "config.v1+json"),
        "layers": [blob.descriptor(OCI + "layer.v1.tar+gzip", annotations=notes)],
    }
    layout.tag("latest", layout.add_json(manifest).descriptor(OCI + "manifest.v1+json"))
    registry.upload(layout.directory, "formats/stargz:1")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            (layer,) = service.layer_paths(await service.pull(f"{registry.url}/formats/stargz:1", None))
            assert (layer / "data").read_bytes() == b"\0\1\2" * 100_000

    asyncio.run(main())
