"""Images that skopeo encrypts: with the key they arrive as they were, without it they are refused before a layer is fetched."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from tare.images.errors import PullError
from tests.support.image_service import files_of, image_service
from tests.support.images import make_image
from tests.support.proxy import Asked, Fault, FaultProxy
from tests.support.registry import Registry, run
from tests.support.trees import Seen, tree_of

pytestmark = pytest.mark.root


def write_keys(directory: Path, name: str) -> Path:
    """A key pair: the private key's directory, with NAME.pub beside it."""
    key = rsa.generate_private_key(65537, 2048)
    private = directory / name
    private.mkdir()
    (private / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (directory / f"{name}.pub").write_bytes(public)
    return private


def files_in(layer: Path) -> dict[str, Seen]:
    """What is in a layer, but for directories, whose times are those of their making."""
    return {path: seen for path, seen in tree_of(layer).items() if seen.kind != "d"}


def push(registry: Registry, layout: Path, name: str, *public: Path) -> None:
    """Encrypt for these keys, and push."""
    keys = [f"--encryption-key=jwe:{path}" for path in public]
    target = f"docker://{registry.url}/{name}"
    run("skopeo", "--insecure-policy", "copy", "-q", "--dest-tls-verify=false", *keys, f"oci:{layout}:latest", target)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_an_encrypted_image_arrives_as_it_was(
    registry: Registry, noise: bytes, tmp_path: Path, compression: str
) -> None:
    layout = make_image(tmp_path / "layout", [{"a/b": noise, "c": "x"}, {"a/d": "y"}], compression=compression)
    ours, _ = write_keys(tmp_path, "ours"), write_keys(tmp_path, "theirs")
    push(registry, layout, f"secret/{compression}", tmp_path / "theirs.pub", tmp_path / "ours.pub")
    registry.push(layout, f"open/{compression}")

    async def main() -> None:
        async with image_service(tmp_path, decryption_keys_dir=str(ours)) as service:
            image = await service.pull(f"{registry.url}/secret/{compression}", None)
            secret = [files_in(path) for path in service.layer_paths(image)]
            stored = (tmp_path / "root/blobs/sha256" / image.layer_digests[0][7:]).read_bytes()
            assert stored[:2] not in (b"\x1f\x8b", b"\x28\xb5")
        (tmp_path / "plain").mkdir()
        async with image_service(tmp_path / "plain") as service:
            image = await service.pull(f"{registry.url}/open/{compression}", None)
            assert [files_in(path) for path in service.layer_paths(image)] == secret

    asyncio.run(main())


def test_without_the_key_nothing_is_fetched(registry: Registry, noise: bytes, tmp_path: Path) -> None:
    layout = make_image(tmp_path / "layout", [{"f": noise}])
    ours, _ = write_keys(tmp_path, "ours"), write_keys(tmp_path, "theirs")
    push(registry, layout, "secret/theirs", tmp_path / "theirs.pub")

    async def main() -> None:
        with FaultProxy(registry.url) as proxy:
            for keys in (ours, tmp_path / "absent"):
                async with image_service(tmp_path, decryption_keys_dir=str(keys)) as service:
                    with pytest.raises(PullError, match="it is encrypted, and none of this machine's") as caught:
                        await service.pull(f"{proxy.url}/secret/theirs", None)
                    assert "at step fetch" in str(caught.value) and str(keys) in str(caught.value)
                    assert files_of(tmp_path) == []
            assert max(proxy.sent, 0) < len(noise) // 4

    asyncio.run(main())


def test_changed_bytes_of_an_encrypted_layer(registry: Registry, noise: bytes, tmp_path: Path) -> None:
    layout = make_image(tmp_path / "layout", [{"f": noise}])
    ours = write_keys(tmp_path, "ours")
    push(registry, layout, "secret/changed", tmp_path / "ours.pub")

    def script(request: Asked) -> Fault | None:
        return Fault(corrupt=True) if request.is_blob and "range" not in request.headers else None

    async def main() -> None:
        with FaultProxy(registry.url, script) as proxy:
            async with image_service(tmp_path, decryption_keys_dir=str(ours)) as service:
                with pytest.raises(PullError):
                    await service.pull(f"{proxy.url}/secret/changed", None)
                assert files_of(tmp_path) == []

    asyncio.run(main())
