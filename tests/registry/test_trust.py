"""The policy at pulls from a real registry and again for containers: which signatures count, where they are found, what is kept of failures."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tare.cri.errors import pull_error
from tare.images.errors import PullError, SignatureValidationFailed
from tare.images.service import ImageService
from tare.images.transfers import Transfers
from tests.support.image_service import files_of, image_service
from tests.support.images import Layout, make_image
from tests.support.proxy import Asked, Fault, FaultProxy
from tests.support.registry import Registry, run
from tests.support.signing import BUNDLE, Key, bundle, simple, upload_bundle, upload_signature

pytestmark = pytest.mark.root

KEY, OTHER = Key.make("ecdsa"), Key.make("ed25519")
FAILED = r"^SignatureValidationFailed: pull image "


def policy(directory: Path, registry: str, rule: str = '{ keys = ["team.pub"] }', default: str = "accept") -> str:
    """A policy file with a rule for the repositories team/… of a registry; the key beside it is KEY."""
    path = directory / "policy.toml"
    (directory / "team.pub").write_bytes(KEY.public)
    path.write_text(f'default = "{default}"\n[repositories]\n"{registry}/team" = {rule}\n')
    return str(path)


def refused(service: ImageService, name: str, words: str) -> Coroutine[Any, Any, None]:
    """The image is not to be had, and nothing of it is kept."""

    async def pull() -> None:
        with pytest.raises(SignatureValidationFailed, match=FAILED) as caught:
            await service.pull(name, None)
        assert words in str(caught.value) and caught.value.code == "UNKNOWN"
        assert pull_error(caught.value) is caught.value
        assert service.list() == []

    return pull()


def test_an_image_that_is_signed(registry: Registry, layout: Path, tmp_path: Path) -> None:
    name = f"{registry.url}/team/signed:1"
    digest = registry.push(layout, "team/signed:1")
    settings = policy(tmp_path, registry.url)

    async def main() -> None:
        async with image_service(tmp_path, policy=settings) as service:
            await refused(service, name, "there is no signature")
            assert files_of(tmp_path) == []
            upload_signature(registry, "team/signed", digest, KEY, tmp_path / "signature")
            image = await service.pull(name, None)
            await service.check_trust(image, name)
        async with image_service(tmp_path, policy=settings) as service:
            await service.check_trust(image, image.id)
            assert (await service.pull(name, None)).id == image.id
            (tmp_path / "team.pub").write_bytes(OTHER.public)
            with pytest.raises(SignatureValidationFailed, match="none of the keys"):
                await service.check_trust(image, name)
            (tmp_path / "team.pub").write_bytes(KEY.public)
            await service.remove(name)
            with pytest.raises(SignatureValidationFailed, match="there is no signature"):
                await service.check_trust(image, name)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("key", "changes", "words"),
    [
        (OTHER, {}, "none of the keys"),
        (KEY, {"digest": "sha256:" + "0" * 64}, "another manifest"),
        (KEY, {"repository": "team/other"}, "for the repository"),
    ],
    ids=["key", "digest", "repository"],
)
def test_a_signature_of_something_else(
    registry: Registry, layout: Path, tmp_path: Path, key: Key, changes: dict[str, str], words: str
) -> None:
    repository = f"team/wrong-{words.split()[0]}"
    digest = registry.push(layout, repository)
    document = simple(changes.get("digest", digest), f"{registry.url}/{changes.get('repository', repository)}")
    upload_signature(registry, repository, digest, key, tmp_path / "signature", document)

    async def main() -> None:
        async with image_service(tmp_path, policy=policy(tmp_path, registry.url)) as service:
            await refused(service, f"{registry.url}/{repository}", words)
            assert files_of(tmp_path) == []

    asyncio.run(main())


def test_a_bundle_found_by_the_referrers_tag(registry: Registry, layout: Path, tmp_path: Path) -> None:
    digest = registry.push(layout, "team/bundled")
    upload_bundle(registry, "team/bundled", digest, bundle(KEY, digest), tmp_path / "bundle")

    async def main() -> None:
        async with image_service(tmp_path, policy=policy(tmp_path, registry.url)) as service:
            image = await service.pull(f"{registry.url}/team/bundled", None)
            await service.check_trust(image, image.id)

    asyncio.run(main())


def test_a_bundle_found_by_the_referrers_api(registry: Registry, layout: Path, tmp_path: Path) -> None:
    digest = registry.push(layout, "team/referred")
    upload_bundle(registry, "team/referred", digest, bundle(KEY, digest), tmp_path / "bundle")
    tag = digest.replace(":", "-")
    listing = run("skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{registry.url}/team/referred:{tag}")
    assert json.loads(listing)["manifests"][0]["artifactType"] == BUNDLE

    def script(request: Asked) -> Fault | None:
        if request.path == f"/v2/team/referred/referrers/{digest}":
            kind = {"Content-Type": "application/vnd.oci.image.index.v1+json"}
            return Fault(status=200, headers=kind, body=listing.encode())
        return Fault(status=404) if request.path.endswith(tag) else None

    async def main() -> None:
        with FaultProxy(registry.url, script) as proxy:
            async with image_service(tmp_path, policy=policy(tmp_path, proxy.url)) as service:
                await service.pull(f"{proxy.url}/team/referred", None)
            assert any("/referrers/" in request.path for request in proxy.seen)

    asyncio.run(main())


def test_an_index_that_is_signed_covers_its_images(registry: Registry, empty_layout: Layout, tmp_path: Path) -> None:
    images = [
        empty_layout.image([{"f": architecture}], platform={"os": "linux", "architecture": architecture})
        for architecture in ("amd64", "arm64")
    ]
    empty_layout.tag("latest", empty_layout.index(images))
    digest = registry.push(empty_layout.directory, "team/index", all_platforms=True)
    by_digest = f"{registry.url}/team/index@{images[0]['digest']}"

    async def main() -> None:
        async with image_service(tmp_path, policy=policy(tmp_path, registry.url)) as service:
            upload_signature(registry, "team/index", digest, KEY, tmp_path / "signature")
            await refused(service, by_digest, "there is no signature")
            image = await service.pull(f"{registry.url}/team/index", None)
            await service.check_trust(image, image.id)
            assert (await service.pull(by_digest, None)).id == image.id

    asyncio.run(main())


def test_rejected_and_accepted(registry: Registry, layout: Path, tmp_path: Path) -> None:
    registry.push(layout, "team/rejected")
    registry.push(layout, "free/image")

    async def main() -> None:
        with FaultProxy(registry.url) as proxy:
            settings = policy(tmp_path, proxy.url, '"reject"')
            async with image_service(tmp_path, policy=settings) as service:
                await refused(service, f"{proxy.url}/team/rejected", "rejects it")
                assert proxy.seen == []
                image = await service.pull(f"{proxy.url}/free/image", None)
                for name in (f"{proxy.url}/free/image", image.id, f"{proxy.url}/team/rejected"):
                    await service.check_trust(image, name)
                policy(tmp_path, proxy.url, '"reject"', default="reject")
                with pytest.raises(SignatureValidationFailed, match="the default rule rejects it"):
                    await service.check_trust(image, image.id)
                (tmp_path / "policy.toml").write_text("nonsense")
                with pytest.raises(SignatureValidationFailed, match=r"read the policy"):
                    await service.pull(f"{proxy.url}/free/image", None)
                with pytest.raises(SignatureValidationFailed, match=r"read the policy"):
                    await service.check_trust(image, image.id)

    asyncio.run(main())


def test_a_name_with_a_rule_is_not_passed_around_by_another(registry: Registry, layout: Path, tmp_path: Path) -> None:
    """An image that was had under a free name may be used under that name alone, until it is signed for the other."""
    registry.push(layout, "free/both")
    name = f"{registry.url}/team/both:1"
    digest = registry.push(layout, "team/both:1")

    async def main() -> None:
        async with image_service(tmp_path, policy=policy(tmp_path, registry.url, '"accept"')) as service:
            await service.pull(f"{registry.url}/free/both", None)
            image = await service.pull(name, None)
            policy(tmp_path, registry.url)
            await service.check_trust(image, image.id)
            with pytest.raises(SignatureValidationFailed, match="there is no signature"):
                await service.check_trust(image, name)
            upload_signature(registry, "team/both", digest, KEY, tmp_path / "signature")
            await service.pull(name, None)
            await service.check_trust(image, name)

    asyncio.run(main())


def test_a_registry_that_cannot_be_asked_for_signatures(registry: Registry, layout: Path, tmp_path: Path) -> None:
    registry.push(layout, "team/broken")

    def script(request: Asked) -> Fault | None:
        return Fault(status=503) if request.path.endswith(".sig") else None

    async def main() -> None:
        with FaultProxy(registry.url, script) as proxy:
            async with image_service(tmp_path, policy=policy(tmp_path, proxy.url)) as service:
                with pytest.raises(PullError, match=r"^RegistryUnavailable: ") as caught:
                    await service.pull(f"{proxy.url}/team/broken", None)
                assert "at step trust" in str(caught.value)
                assert files_of(tmp_path) == []

    asyncio.run(main())


def test_keys_of_every_kind_and_what_is_no_signature(registry: Registry, tmp_path: Path) -> None:
    for kind in ("rsa", "ed25519"):
        key = Key.make(kind)
        layout = make_image(tmp_path / kind, [{"f": kind}])
        digest = registry.push(layout, f"team/{kind}")
        settings = policy(tmp_path, registry.url)
        (tmp_path / "team.pub").write_bytes(key.public)
        upload_bundle(registry, f"team/{kind}", digest, b"no bundle", tmp_path / f"{kind}-bundle")

        async def main(name: str, settings: str) -> None:
            async with image_service(tmp_path, policy=settings) as service:
                with pytest.raises(SignatureValidationFailed, match="there is no signature"):
                    await service.pull(name, None)

        asyncio.run(main(f"{registry.url}/team/{kind}", settings))
        upload_signature(registry, f"team/{kind}", digest, key, tmp_path / f"{kind}-signature")

        async def again(name: str, settings: str) -> None:
            async with image_service(tmp_path, policy=settings) as service:
                await service.check_trust(await service.pull(name, None), name)

        asyncio.run(again(f"{registry.url}/team/{kind}", settings))


def test_a_loaded_image_does_not_pass_around_the_policy(registry: Registry, layout: Path, tmp_path: Path) -> None:
    name = f"{registry.url}/team/loaded:1"
    digest = registry.push(layout, "team/loaded:1")
    archive = tmp_path / "image.tar"
    run("skopeo", "copy", "-q", f"oci:{layout}:latest", f"oci-archive:{archive}:{name}")

    async def pieces() -> AsyncIterator[bytes]:
        yield archive.read_bytes()

    async def main() -> None:
        async with image_service(tmp_path, policy=policy(tmp_path, registry.url)) as service:
            transfers = Transfers(service)
            (image,) = await transfers.load(pieces(), None)
            assert image.repo_tags == (name,)
            for asked in (name, image.id):
                with pytest.raises(SignatureValidationFailed, match="there is no signature"):
                    await service.check_trust(image, asked)
            upload_signature(registry, "team/loaded", digest, KEY, tmp_path / "signature")
            assert (await service.pull(name, None)).id == image.id
            await service.check_trust(image, name)
            transfers.close()

    asyncio.run(main())
