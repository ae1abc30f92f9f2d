"""Layers that are large in number: what is allowed arrives, what is not is refused early, and other pulls go on meanwhile."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

import pytest

from tare.images.errors import PullError
from tests.support.image_service import files_of, image_service
from tests.support.images import Device, Directory, Fifo, File, Hardlink, Node, make_image
from tests.support.proxy import Fault, FaultProxy
from tests.support.registry import Registry

pytestmark = pytest.mark.root

ENTRIES = 100_000
MEMORY = 64 << 20  # bytes that a pull may take


def test_a_hundred_thousand_entries(registry: Registry, tmp_path: Path) -> None:
    tree: dict[str, Node] = {f"d{n // 1000}": Directory() for n in range(0, ENTRIES, 1000)}
    tree |= {f"d{n // 1000}/f{n}": b"" for n in range(ENTRIES - len(tree))}
    registry.upload(make_image(tmp_path / "layout", [tree]), "floods/many:1")

    async def main() -> None:
        async with image_service(tmp_path, max_layer_entries=ENTRIES) as service:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            image = await service.pull(f"{registry.url}/floods/many:1", None)
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY
            (layer,) = service.layer_paths(image)
            assert len(list((layer / "d98").iterdir())) == 1000
            await service.remove(image.id)
        async with image_service(tmp_path, max_layer_entries=ENTRIES // 10) as service:
            with pytest.raises(PullError, match=f"more than {ENTRIES // 10} entries"):
                await service.pull(f"{registry.url}/floods/many:1", None)
            assert files_of(tmp_path) == []

    asyncio.run(main())


FLOODS: dict[str, dict[str, Node]] = {
    "devices": {f"dev/{n}": Device("b", 8, n) for n in range(3000)},
    "pipes": {f"p{n}": Fifo() for n in range(3000)},
    "links": {"f": File(b"x"), **{f"l{n}": Hardlink("f") for n in range(3000)}},
    "directories": {"/".join(["d"] * (n % 250 + 1)) + f"/{n}": Directory() for n in range(3000)},
}


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_is_stopped_and_drowns_nobody(registry: Registry, layout: Path, tmp_path: Path, kind: str) -> None:
    registry.upload(make_image(tmp_path / "flood", [FLOODS[kind]]), f"floods/{kind}:1")
    registry.push(layout, "floods/small:1")

    async def main() -> None:
        async with image_service(tmp_path, max_layer_entries=2000) as service:
            flood = asyncio.ensure_future(service.pull(f"{registry.url}/floods/{kind}:1", None))
            image = await service.pull(f"{registry.url}/floods/small:1", None)
            with pytest.raises(PullError, match=r"at step unpack: .*more than 2000 entries"):
                await flood
            assert service.list() == [image]
            await service.remove(image.id)
            assert files_of(tmp_path) == []

    asyncio.run(main())


def test_more_links_than_a_file_can_have(registry: Registry, tmp_path: Path) -> None:
    tree: dict[str, Node] = {"f": File(b"x"), **{f"l{n}": Hardlink("f") for n in range(65_001)}}
    registry.upload(make_image(tmp_path / "layout", [tree]), "floods/links:2")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            with pytest.raises(PullError, match="a hard link to 'f': Too many links"):
                await service.pull(f"{registry.url}/floods/links:2", None)
            assert files_of(tmp_path) == []

    asyncio.run(main())


PAGE = {"Content-Type": "text/html"}


@pytest.mark.parametrize(
    ("where", "fault", "words"),
    [
        (
            "/manifests/",
            Fault(status=200, headers=PAGE, body=b"<html>Please log in</html>"),
            "of type text/html and no JSON (does a proxy",
        ),
        ("/blobs/", Fault(status=200, headers=PAGE, body=b"<html>Please log in</html>"), "it announces 26 bytes"),
        (
            "/manifests/",
            Fault(status=200, headers={"Content-Type": "application/json"}, body=b"{}"),
            "schema version 0",
        ),
    ],
)
def test_answers_of_another_type(
    registry: Registry, layout: Path, tmp_path: Path, where: str, fault: Fault, words: str
) -> None:
    registry.push(layout, "floods/small:1")

    async def main() -> None:
        with FaultProxy(registry.url, lambda asked: fault if where in asked.path else None) as proxy:
            async with image_service(tmp_path) as service:
                with pytest.raises(PullError) as caught:
                    await service.pull(f"{proxy.url}/floods/small:1", None)
                assert words in str(caught.value)
                assert files_of(tmp_path) == []

    asyncio.run(main())


def test_a_manifest_under_another_content_type_is_read_for_what_it_is(
    registry: Registry, layout: Path, tmp_path: Path
) -> None:
    registry.push(layout, "floods/small:1")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            whole = await service.pull(f"{registry.url}/floods/small:1", None)
            data = (tmp_path / "root/blobs/sha256" / whole.manifest[7:]).read_bytes()
            await service.remove(whole.id)
            headers = {"Content-Type": "application/octet-stream", "Docker-Content-Digest": whole.manifest}
            fault = Fault(status=200, headers=headers, body=data)
            with FaultProxy(registry.url, lambda asked: fault if "/manifests/" in asked.path else None) as proxy:
                assert (await service.pull(f"{proxy.url}/floods/small:1", None)).id == whole.id

    asyncio.run(main())
