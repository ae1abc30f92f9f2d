"""Damage is found and repaired, moved tags are seen, and a pull can say beforehand what it would do."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tare.errors import FailedPrecondition
from tare.images.errors import PullError
from tare.images.explain import explain
from tare.images.freshness import freshness
from tare.images.service import ImageService
from tare.images.verify import Verifier
from tests.support.image_service import files_of, image_service, write_hosts
from tests.support.images import Hardlink, Node, Opaque, Symlink, Whiteout, make_image
from tests.support.proxy import Fault, FaultProxy
from tests.support.registry import Registry

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def name(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An image whose layers imply directories and hide things."""
    lower = {"etc/motd": "hello", "etc/x/y": "y", "var/z": "z", "gone": "x"}
    upper: dict[str, Node] = {
        "etc/new": "new",
        "gone": Whiteout(),
        "var": Opaque(),
        "l": Symlink("etc"),
        "h": Hardlink("etc/new"),
    }
    layout = make_image(tmp_path_factory.mktemp("health"), [lower, upper])
    registry.push(layout, "health/image:1")
    return f"{registry.url}/health/image:1"


async def troubles(service: ImageService, *names: str) -> list[tuple[str, str]]:
    return [(found.kind, found.trouble) async for found in Verifier(service).verify(names) if found.trouble]


async def repaired(service: ImageService, name: str) -> list[str]:
    return [found.kind async for found in Verifier(service).repair(name, None)]


def damages(root: Path, image: Any, layer: Path) -> Iterator[tuple[list[str], str, str]]:
    """Damage something, and say what is to be found and what repaired."""
    motd = layer / "etc/motd"
    status = motd.stat()
    motd.write_text("HELLO")
    os.utime(motd, ns=(status.st_atime_ns, status.st_mtime_ns))
    yield ["layer"], "/etc/motd has another content", "layer"
    motd.unlink()
    yield ["layer"], "/etc/motd is missing", "layer"
    (layer / "etc/x/extra").touch()
    yield ["layer"], "/etc/x/extra should not be there", "layer"
    os.chown(layer / "etc/x/y", 5, 5)
    yield ["layer"], "/etc/x/y has another owner", "layer"
    blobs = root / "root/blobs/sha256"
    (blobs / image.layer_digests[0][7:]).write_bytes(b"not this")
    yield ["blob"], "its bytes have the digest", "blob"
    (blobs / image.manifest[7:]).write_bytes(b"nor this")
    yield ["blob"], "its bytes have the digest", "blob"
    (blobs / image.id[7:]).unlink()
    yield ["blob"], "it cannot be read: No such file", "blob"


def test_damage_is_found_and_that_alone_is_repaired(name: str, registry: Registry, tmp_path: Path) -> None:
    in_use: set[str] = set()

    async def main() -> None:
        async with image_service(tmp_path, in_use=lambda: in_use) as service:
            image = await service.pull(name, None)
            before = files_of(tmp_path)
            assert await troubles(service) == []
            layer = service.layer_paths(image)[1]
            for kinds, words, what in damages(tmp_path, image, layer):
                found = await troubles(service, name)
                assert [kind for kind, _ in found] == kinds
                assert words in found[0][1]
                assert await repaired(service, name) == [what]
                assert await troubles(service) == []
                assert await repaired(service, name) == []
                assert files_of(tmp_path) == before
            assert (layer / "etc/motd").read_text() == "hello"
            (layer / "etc/motd").unlink()
            in_use.update(image.chain_ids)
            with pytest.raises(FailedPrecondition, match="containers stand on it"):
                await repaired(service, name)
            assert files_of(tmp_path) == before

    asyncio.run(main())


def test_without_kept_blobs_a_layer_is_repaired_from_the_registry(name: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with image_service(tmp_path, keep_blobs=False) as service:
            image = await service.pull(name, None)
            before = files_of(tmp_path)
            assert await troubles(service) == []
            (service.layer_paths(image)[1] / "etc/motd").unlink()
            assert await repaired(service, name) == ["layer"]
            assert (service.layer_paths(image)[1] / "etc/motd").read_text() == "hello"
            assert files_of(tmp_path) == before

    asyncio.run(main())


def test_moved_tags_are_seen_by_one_request_each(registry: Registry, tmp_path: Path) -> None:
    for number in (1, 2):
        registry.push(make_image(tmp_path / f"l{number}", [{"f": str(number)}]), f"health/fresh{number}:1")

    async def main(proxy: FaultProxy) -> None:
        one, two = (f"{proxy.url}/health/fresh{number}:1" for number in (1, 2))
        async with image_service(tmp_path) as service:
            images = [await service.pull(one, None), await service.pull(two, None)]
            service.store.tag(images[0].id, "local.example/only:1")
            registry.push(tmp_path / "l1", "health/fresh2:1")
            proxy.seen.clear()
            found = {item.name: item async for item in freshness(service, (), ())}
            assert [(asked.method) for asked in proxy.seen] == ["HEAD", "HEAD"]
            assert found[one].here == found[one].there == images[0].manifest
            assert (found[two].here, found[two].there) == (images[1].manifest, images[0].manifest)
            assert found["local.example/only:1"].trouble == "it was not pulled from a registry"
            proxy.script = lambda _: Fault(status=404)
            (lost,) = [item async for item in freshness(service, (two,), ())]
            assert (lost.there, "not found" in lost.trouble) == ("", True)

    with FaultProxy(registry.url) as proxy:
        asyncio.run(main(proxy))


def test_a_pull_explains_itself(registry: Registry, name: str, tmp_path: Path) -> None:
    repository = name.partition("/")[2]

    async def told(service: ImageService, reference: str) -> str:
        lines = []
        try:
            async for depth, text in explain(service, reference, None):
                lines.append("  " * depth + text)
        except PullError as error:
            lines.append(str(error))
        return "\n".join(lines)

    async def main(mirror: FaultProxy) -> None:
        text = f'server = "http://{registry.url}"\n[host."http://{mirror.url}"]\n  capabilities = ["pull", "resolve"]\n'
        text += '[host."http://localhost:1"]\n  capabilities = ["pull"]\n'
        write_hosts(tmp_path, "explained.example", text)
        async with image_service(tmp_path) as service:
            trace = await told(service, f"explained.example/{repository}")
            for words in (
                f"mirror http://{mirror.url}/v2 (pull, resolve)",
                f"the registry http://{registry.url}/v2",
                "there are no credentials",
                "localhost:1: not asked, for it may not resolve tags",
                f"HEAD http://{mirror.url}/v2/{repository.partition(':')[0]}/manifests/1: status 503",
                "resolve failed: status 503",
                "status 200",
                "would be fetched",
                "the image would be pulled",
            ):
                assert words in trace, trace
            assert files_of(tmp_path) == []
            await service.pull(f"explained.example/{repository}", None)
            trace = await told(service, f"explained.example/{repository}")
            assert "which is here already and whole" in trace and "nothing would be fetched" in trace
            write_hosts(tmp_path, "explained.example", f'server = "http://{registry.url}"\n')
            trace = await told(service, "explained.example/not/there:1")
            assert "it fails: " in trace and mirror.url not in trace

    with FaultProxy(registry.url, lambda _: Fault(status=503)) as mirror:
        asyncio.run(main(mirror))
