"""Pulling from the real docker-registry: every format, names and IDs, what is kept, what is shared."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tare.errors import InvalidArgument
from tare.images.errors import PullError
from tests.support.image_service import files_of, image_service
from tests.support.images import Directory, File, Layout, Tree, make_image
from tests.support.proxy import Asked, FaultProxy
from tests.support.registry import Registry, run
from tests.support.trees import tree_of

pytestmark = pytest.mark.root


def test_an_image_arrives_whole(registry: Registry, layout: Path, tmp_path: Path) -> None:
    digest = registry.push(layout, "whole/image:1")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            image = await service.pull(f"{registry.url}/whole/image:1", None)
            assert image.repo_tags == (f"{registry.url}/whole/image:1",)
            assert image.repo_digests == (f"{registry.url}/whole/image@{digest}",)
            assert (image.config.cmd, image.config.user, image.config.env) == (("/bin/true",), "7", ("A=b",))
            assert image.config.labels == {"l": "v"}
            assert service.list() == [image]
            top, bottom = service.layer_paths(image)
            assert (top / "etc/motd").read_text() == "hello again"
            assert (bottom / "etc/motd").read_text() == "hello"
            for name in (
                f"{registry.url}/whole/image:1",
                f"{registry.url}/whole/image@{digest}",
                image.id,
                image.id[7:],
                image.id[7:15],
            ):
                assert service.find(name) == image
            inspected = run(
                "skopeo", "inspect", "--tls-verify=false", "--raw", f"docker://{registry.url}/whole/image:1"
            )
            assert image.id in inspected
            assert image.size > 0
            blobs = {digest, image.id, *image.layer_digests}
            layers = {f"layers/{chain_id[7:]}" for chain_id in image.chain_ids}
            assert set(files_of(tmp_path)) == {f"blobs/sha256/{blob[7:]}" for blob in blobs} | layers
        async with image_service(tmp_path) as service:
            assert service.list() == [image]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("compression", "format"),
    [
        ("gzip", ""),
        ("", ""),
        ("zstd", ""),
        ("gzip", "v2s2"),
    ],
)
def test_every_format(registry: Registry, tmp_path: Path, compression: str, format: str) -> None:
    tree: Tree = {"d": Directory(mode=0o1777), "d/f": File(b"x" * 100_000, uid=3), "g": "y"}
    layout = make_image(tmp_path / "layout", [tree], compression=compression)
    name = f"formats/{compression or 'plain'}-{format or 'oci'}"
    if compression:
        registry.push(layout, name, format=format)
    else:
        registry.upload(layout, name)

    async def main() -> None:
        async with image_service(tmp_path) as service:
            image = await service.pull(f"{registry.url}/{name}", None)
            (layer,) = service.layer_paths(image)
            stored = (tmp_path / "root/blobs/sha256" / image.layer_digests[0][7:]).read_bytes()
            magic = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5", "": b"d/\0"}[compression]
            assert stored.startswith(magic)
            tree = tree_of(layer)
            assert (tree["d"].mode, tree["d/f"].uid, (layer / "d/f").read_bytes()) == (0o1777, 3, b"x" * 100_000)

    asyncio.run(main())


def test_an_index_gives_this_machines_image(registry: Registry, empty_layout: Layout, tmp_path: Path) -> None:
    images = [
        empty_layout.image(
            [{"arch": machine}], platform=dict(zip(("os", "architecture", "variant"), machine.split("/"), strict=False))
        )
        for machine in ("linux/arm64/v8", "linux/amd64", "windows/amd64")
    ]
    empty_layout.tag("latest", empty_layout.index(images))
    digest = registry.push(empty_layout.directory, "indexes/many:1", all_platforms=True)

    async def main() -> None:
        async with image_service(tmp_path) as service:
            image = await service.pull(f"{registry.url}/indexes/many:1", None)
            assert (service.layer_paths(image)[0] / "arch").read_text() == "linux/amd64"
            assert image.repo_digests == (f"{registry.url}/indexes/many@{digest}",)
            by_manifest = await service.pull(f"{registry.url}/indexes/many@{images[1]['digest']}", None)
            assert by_manifest.id == image.id
            assert len(by_manifest.repo_digests) == 2
            with pytest.raises(PullError, match=r"the image is for linux/arm64/v8, this machine is linux/amd64"):
                await service.pull(f"{registry.url}/indexes/many@{images[0]['digest']}", None)

    asyncio.run(main())


def test_an_index_without_this_machine(registry: Registry, empty_layout: Layout, tmp_path: Path) -> None:
    image = empty_layout.image([{"a": "b"}], platform={"os": "linux", "architecture": "s390x"})
    empty_layout.tag("latest", empty_layout.index([image]))
    registry.push(empty_layout.directory, "indexes/other:1", all_platforms=True)

    async def main() -> None:
        async with image_service(tmp_path) as service:
            with pytest.raises(PullError, match=r"at step fetch: .*no image for linux/amd64.*offers linux/s390x"):
                await service.pull(f"{registry.url}/indexes/other:1", None)
            assert files_of(tmp_path) == []

    asyncio.run(main())


def test_names_merge_and_move(registry: Registry, tmp_path: Path) -> None:
    first = registry.push(make_image(tmp_path / "one", [{"a": "1"}]), "moving/image:1")
    registry.push(tmp_path / "one", "moving/image:2")

    async def main() -> None:
        name = f"{registry.url}/moving/image"
        async with image_service(tmp_path) as service:
            await service.pull(f"{name}:1", None)
            image = await service.pull(f"{name}:2", None)
            assert (image.repo_tags, image.repo_digests) == ((f"{name}:1", f"{name}:2"), (f"{name}@{first}",))
            pinned = await service.pull(f"{name}:9@{first}", None)
            assert pinned == image
            second = registry.push(make_image(tmp_path / "two", [{"a": "2"}]), "moving/image:1")
            moved = await service.pull(f"{name}:1", None)
            assert (moved.repo_tags, moved.repo_digests) == ((f"{name}:1",), (f"{name}@{second}",))
            old = service.find(image.id)
            assert old is not None and old.repo_tags == (f"{name}:2",)
            assert len(service.list()) == 2

    asyncio.run(main())


def test_the_same_image_from_two_registries_is_one(registry: Registry, layout: Path, tmp_path: Path) -> None:
    registry.push(layout, "twice/image:1")

    async def main() -> None:
        with Registry(tmp_path / "other") as other:
            other.push(layout, "twice/image:1")
            async with image_service(tmp_path) as service:
                one = await service.pull(f"{registry.url}/twice/image:1", None)
                two = await service.pull(f"{other.url}/twice/image:1", None)
                assert one.id == two.id
                assert len(two.repo_tags) == len(two.repo_digests) == 2
                assert service.list() == [two]

    asyncio.run(main())


@pytest.mark.parametrize("by", ["tag", "digest", "id", "prefix"])
def test_removing_takes_all_names_and_all_files(registry: Registry, layout: Path, tmp_path: Path, by: str) -> None:
    digest = registry.push(layout, "removed/image:1")
    registry.push(layout, "removed/image:2")

    async def main() -> None:
        name = f"{registry.url}/removed/image"
        async with image_service(tmp_path) as service:
            await service.pull(f"{name}:1", None)
            image = await service.pull(f"{name}:2", None)
            given = {"tag": f"{name}:2", "digest": f"{name}@{digest}", "id": image.id, "prefix": image.id[7:19]}[by]
            await service.remove(given)
            assert service.list() == []
            assert files_of(tmp_path) == []
            usage = service.usage()
            assert (usage.bytes, usage.inodes) == (0, 0)
            await service.remove(given)
            with pytest.raises(InvalidArgument):
                await service.remove("NOT A NAME")

    asyncio.run(main())


def test_layers_are_kept_for_who_needs_them(registry: Registry, tmp_path: Path) -> None:
    base: Tree = {"base": "b"}
    registry.push(make_image(tmp_path / "one", [base, {"one": "1"}]), "shared/one:1")
    registry.push(make_image(tmp_path / "two", [base, {"two": "2"}]), "shared/two:1")
    used: set[str] = set()

    async def main() -> None:
        async with image_service(tmp_path, in_use=lambda: used) as service:
            one = await service.pull(f"{registry.url}/shared/one:1", None)
            two = await service.pull(f"{registry.url}/shared/two:1", None)
            assert one.chain_ids[0] == two.chain_ids[0]
            used.add(two.chain_ids[1])
            await service.remove(one.id)
            await service.remove(two.id)
            assert files_of(tmp_path) == sorted(f"layers/{chain_id[7:]}" for chain_id in two.chain_ids)
            used.clear()
            await service.collect()
            assert files_of(tmp_path) == []

    asyncio.run(main())


def test_without_kept_blobs_an_image_is_its_layers(registry: Registry, layout: Path, tmp_path: Path) -> None:
    registry.push(layout, "lean/image:1")

    async def main() -> None:
        async with image_service(tmp_path, keep_blobs=False) as service:
            image = await service.pull(f"{registry.url}/lean/image:1", None)
            kept = {file for file in files_of(tmp_path) if file.startswith("blobs/")}
            assert kept == {f"blobs/sha256/{digest[7:]}" for digest in image.documents}
            assert (await service.pull(f"{registry.url}/lean/image:1", None)).id == image.id

    asyncio.run(main())


def test_usage_is_what_du_says(registry: Registry, tmp_path: Path, noise: bytes) -> None:
    tree: Tree = {f"d{number % 9}/f{number}": noise[: number * 999] for number in range(60)}
    registry.push(make_image(tmp_path / "layout", [tree]), "usage/image:1")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            before = run("du", "-s", "--block-size=1", str(tmp_path / "root")).split()[0]
            await service.pull(f"{registry.url}/usage/image:1", None)
            after = run("du", "-s", "--block-size=1", str(tmp_path / "root")).split()[0]
            usage = service.usage()
            assert usage.path == str(tmp_path / "root")
            assert abs(usage.bytes - (int(after) - int(before))) < 0.02 * usage.bytes
            assert usage.inodes == len(tree) + 9 + 1 + 3

    asyncio.run(main())


def test_many_pulls_at_once_fetch_each_blob_once(registry: Registry, tmp_path: Path, noise: bytes) -> None:
    base: Tree = {"base": noise}
    for number in range(5):
        layers: list[Tree] = [base, {"same": noise[:9999]}, {"own": f"{number}"}]
        registry.push(make_image(tmp_path / str(number), layers), f"crowd/image{number}:1")

    async def main() -> None:
        with FaultProxy(registry.url) as proxy:
            async with image_service(tmp_path) as service:
                names = [f"{proxy.url}/crowd/image{number % 5}:1" for number in range(50)]
                images = await asyncio.gather(*(service.pull(name, None) for name in names))
                assert len({image.id for image in images}) == 5
                blobs = proxy.blobs()
                assert sorted(blobs) == sorted(set(blobs))
                assert len(blobs) == 2 + 5 + 5
                heads = [asked for asked in proxy.seen if asked.method == "HEAD"]
                assert len(heads) == 50
                for image in images:
                    assert (service.layer_paths(image)[2] / "base").read_bytes() == noise

    asyncio.run(main())


def test_an_image_with_one_layer_many_times(registry: Registry, tmp_path: Path) -> None:
    layer: Tree = {"f": "same"}
    registry.push(make_image(tmp_path / "layout", [layer] * 40), "repeated/image:1")

    async def main() -> None:
        with FaultProxy(registry.url) as proxy:
            async with image_service(tmp_path, parallel_layers=1) as service:
                image = await service.pull(f"{proxy.url}/repeated/image:1", None)
                assert len(set(service.layer_paths(image))) == 40
                assert len(proxy.blobs()) == 2

    asyncio.run(main())


def test_a_pull_goes_on_when_its_caller_leaves(registry: Registry, layout: Path, tmp_path: Path) -> None:
    registry.push(layout, "left/image:1")

    async def main() -> None:
        arrived = asyncio.Event()
        loop = asyncio.get_running_loop()

        def script(_: Asked) -> None:
            loop.call_soon_threadsafe(arrived.set)

        with FaultProxy(registry.url, script) as proxy:
            async with image_service(tmp_path) as service:
                caller = asyncio.create_task(service.pull(f"{proxy.url}/left/image:1", None))
                await arrived.wait()
                caller.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await caller
                image = await service.pull(f"{proxy.url}/left/image:1", None)
                assert len(proxy.blobs()) == len(image.layer_digests) + 1

    asyncio.run(main())


def test_closing_ends_pulls_and_leaves_nothing(registry: Registry, layout: Path, tmp_path: Path) -> None:
    registry.push(layout, "closed/image:1")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            caller = asyncio.create_task(service.pull(f"{registry.url}/closed/image:1", None))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert files_of(tmp_path) == []

    asyncio.run(main())


@pytest.mark.parametrize("name", ["", "UPPER", "a//b", "x@sha256:1", "a" * 64])
def test_malformed_names(tmp_path: Path, name: str) -> None:
    async def main() -> None:
        async with image_service(tmp_path) as service:
            with pytest.raises(InvalidArgument, match="malformed image reference"):
                await service.pull(name, None)

    asyncio.run(main())
