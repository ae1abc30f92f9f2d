"""Registries, networks and images at their worst: each a clear error, nothing kept, others not disturbed."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tare.errors import UnknownError
from tare.images.errors import PullError, RegistryUnavailable
from tare.images.service import ImageRecord
from tests.support.image_service import files_of, image_service
from tests.support.images import OCI, Hardlink, Layout, Symlink, make_image, tar_of
from tests.support.proxy import Asked, Fault, FaultProxy, Script
from tests.support.registry import Registry

pytestmark = pytest.mark.root


def pull_through(
    directory: Path, registry: Registry, name: str, script: Script
) -> tuple[FaultProxy, ImageRecord | Exception]:
    """Pull once through a proxy; the proxy, and the image or the error. A failed pull must leave nothing."""

    async def main() -> tuple[FaultProxy, ImageRecord | Exception]:
        with FaultProxy(registry.url, script) as proxy:
            async with image_service(directory) as service:
                try:
                    return proxy, await service.pull(f"{proxy.url}/{name}", None)
                except UnknownError as error:
                    assert files_of(directory) == []
                    assert service.list() == []
                    return proxy, error

    return asyncio.run(main())


def on_blobs(*faults: Fault | None, but: str = "") -> Callable[[Asked], Fault | None]:
    """These faults for the first requests for blobs (other than the digest `but`), then none."""
    waiting = list(faults)
    return lambda asked: waiting.pop(0) if waiting and asked.is_blob and not (but and but in asked.path) else None


@pytest.fixture
def large(registry: Registry, tmp_path: Path, noise: bytes) -> tuple[str, str]:
    """An image with one layer of more than three megabytes that do not compress well, and its configuration's digest."""
    layout = Layout(tmp_path / "layout")
    descriptor = layout.image([{"noise": noise}])
    layout.tag("latest", descriptor)
    registry.push(tmp_path / "layout", "faults/large:1")
    manifest = (tmp_path / "layout/blobs" / str(descriptor["digest"]).replace(":", "/")).read_text()
    return "faults/large:1", manifest.partition('"digest": "')[2].partition('"')[0]


def test_a_transfer_that_is_cut_goes_on_where_it_was(
    registry: Registry, large: tuple[str, str], tmp_path: Path, noise: bytes
) -> None:
    name, config = large
    cuts = on_blobs(Fault(cut=800_000), Fault(cut=300_000), Fault(cut=0), but=config)
    proxy, image = pull_through(tmp_path, registry, name, cuts)
    assert isinstance(image, ImageRecord)
    ranges = [asked.headers.get("range") for asked in proxy.seen if asked.is_blob and config not in asked.path]
    assert ranges == [None, "bytes=800000-", "bytes=1100000-", "bytes=1100000-"]
    assert proxy.sent <= 1.1 * (image.size + 2000)


def test_a_registry_that_knows_no_ranges_starts_over(
    registry: Registry, large: tuple[str, str], tmp_path: Path
) -> None:
    name, config = large
    faults = on_blobs(Fault(cut=500_000), Fault(ignore_range=True), but=config)
    _, image = pull_through(tmp_path, registry, name, faults)
    assert isinstance(image, ImageRecord)


def test_a_transfer_that_is_always_cut_is_given_up(registry: Registry, large: tuple[str, str], tmp_path: Path) -> None:
    name, config = large
    proxy, error = pull_through(
        tmp_path, registry, name, lambda asked: Fault(cut=10) if asked.is_blob and config not in asked.path else None
    )
    assert isinstance(error, RegistryUnavailable)
    assert "after 40 of" in str(error) and "the transfer broke off" in str(error)
    assert len(proxy.blobs()) == 1 + 4


def test_a_transfer_that_stalls_is_ended(registry: Registry, large: tuple[str, str], tmp_path: Path) -> None:
    name, config = large
    started = time.monotonic()
    _, error = pull_through(tmp_path, registry, name, on_blobs(Fault(stall=100_000), but=config))
    assert isinstance(error, RegistryUnavailable)
    assert str(error).startswith(f"RegistryUnavailable: pull image {error.doing.split()[-1]}")
    assert "it did not answer in time" in str(error)
    assert time.monotonic() - started < 10


def test_a_stalled_pull_does_not_hold_up_another(
    registry: Registry, large: tuple[str, str], layout: Path, tmp_path: Path
) -> None:
    registry.push(layout, "faults/small:1")

    async def main() -> None:
        stalling = asyncio.Event()
        loop = asyncio.get_running_loop()

        def script(asked: Asked) -> Fault | None:
            if "large" not in asked.path or not asked.is_blob or large[1] in asked.path:
                return None
            loop.call_soon_threadsafe(stalling.set)
            return Fault(stall=1000)

        with FaultProxy(registry.url, script) as proxy:
            async with image_service(tmp_path) as service:
                slow = asyncio.create_task(service.pull(f"{proxy.url}/{large[0]}", None))
                await stalling.wait()
                image = await service.pull(f"{proxy.url}/faults/small:1", None)
                assert not slow.done()
                with pytest.raises(RegistryUnavailable):
                    await slow
                assert service.list() == [image]
                assert len(files_of(tmp_path)) == 4 + 2

    asyncio.run(main())


def test_corrupt_bytes_leave_nothing(registry: Registry, large: tuple[str, str], tmp_path: Path) -> None:
    _, error = pull_through(tmp_path, registry, large[0], lambda asked: Fault(corrupt=True) if asked.is_blob else None)
    assert "the bytes that came have the digest sha256:" in str(error)
    _, error = pull_through(tmp_path, registry, large[0], on_blobs(*[Fault(corrupt=True)] * 3, but=large[1]))
    assert "fetch layer sha256:" in str(error) and "have the digest sha256:" in str(error)


def test_a_corrupt_manifest(registry: Registry, large: tuple[str, str], tmp_path: Path) -> None:
    corrupt = Fault(corrupt=True)
    _, error = pull_through(
        tmp_path,
        registry,
        large[0],
        lambda asked: corrupt if asked.method == "GET" and "/manifests/" in asked.path else None,
    )
    assert "the bytes that came have the digest" in str(error)


@pytest.mark.parametrize("status", [429, 500, 502, 503])
@pytest.mark.parametrize("headers", [{}, {"Retry-After": "0"}, {"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"}])
def test_an_overloaded_registry_is_asked_again(
    registry: Registry, large: tuple[str, str], tmp_path: Path, status: int, headers: dict[str, str]
) -> None:
    busy = Fault(status=status, headers=headers)
    _, image = pull_through(tmp_path, registry, large[0], on_blobs(busy, busy, busy))
    assert isinstance(image, ImageRecord)


@pytest.mark.parametrize(
    ("fault", "kind", "words", "requests"),
    [
        (Fault(status=503), RegistryUnavailable, "status 503", 4),
        (Fault(status=429, headers={"Retry-After": "3600"}), PullError, "status 429", 1),
        (
            Fault(status=418, body=b"short and stout", headers={"Content-Type": "text/plain"}),
            PullError,
            "status 418",
            1,
        ),
        (Fault(status=403), PullError, "status 403", 1),
        (Fault(status=404), PullError, "not found: status 404", 2),
        (Fault(status=302, headers={"Location": "/v2/again"}), PullError, "more than 8 redirects", 8),
        (Fault(status=302, headers={"Location": "file:///etc/passwd"}), PullError, "no http or https address", 1),
        (Fault(drop=True), RegistryUnavailable, "it closed the connection", None),
        (Fault(status=200, headers={"Content-Length": "99999999"}), PullError, "at most 4194304 are read", 1),
        (Fault(status=204), PullError, "status 204", 1),
    ],
)
def test_answers_that_mean_no(
    registry: Registry, tmp_path: Path, fault: Fault, kind: type[PullError], words: str, requests: int | None
) -> None:
    proxy, error = pull_through(tmp_path, registry, "faults/any:1", lambda _: fault)
    assert isinstance(error, kind)
    assert (
        isinstance(error, RegistryUnavailable)
        == (kind is RegistryUnavailable)
        == str(error).startswith("RegistryUnavailable: ")
    )
    assert words in str(error) and f"pull image {proxy.url}/faults/any:1: at step resolve" in str(error)
    assert requests is None or len(proxy.seen) == requests


def test_the_registrys_own_words_are_passed_on(registry: Registry, large: tuple[str, str], tmp_path: Path) -> None:
    body = b'{"errors": [{"code": "DENIED", "message": "the quota\\nis used up", "detail": {}}]}'
    _, error = pull_through(tmp_path, registry, large[0], on_blobs(*[Fault(status=403, body=body)] * 9))
    assert "at step fetch: GET blob at" in str(error) and "status 403: DENIED: the quota is used up" in str(error)


def test_no_registry_at_all(tmp_path: Path) -> None:
    async def main() -> None:
        async with image_service(tmp_path) as service:
            for name, words in (
                ("127.0.0.1:1/x/y", "Connection refused"),
                ("registry.invalid/x/y", "registry.invalid"),
            ):
                with pytest.raises(
                    RegistryUnavailable,
                    match=f"^RegistryUnavailable: pull image {name}:latest: at step resolve: .*{words}",
                ):
                    await service.pull(name, None)
            assert files_of(tmp_path) == []

    asyncio.run(main())


def test_a_registry_without_head_and_without_digest_headers(registry: Registry, layout: Path, tmp_path: Path) -> None:
    registry.push(layout, "faults/nohead:1")
    _, image = pull_through(
        tmp_path, registry, "faults/nohead:1", lambda asked: Fault(status=405) if asked.method == "HEAD" else None
    )
    assert isinstance(image, ImageRecord)


def test_wrong_diff_id(registry: Registry, tmp_path: Path) -> None:
    wrong = "sha256:" + "0" * 64
    registry.upload(make_image(tmp_path / "layout", [{"a": "b"}], diff_ids=[wrong]), "faults/diff:1")
    _, error = pull_through(tmp_path, registry, "faults/diff:1", lambda _: None)
    assert "at step unpack: unpack layer: its tar archive has the digest sha256:" in str(error)
    assert wrong in str(error)


def test_wrong_number_of_diff_ids(registry: Registry, tmp_path: Path) -> None:
    registry.upload(
        make_image(tmp_path / "layout", [{"a": "b"}], diff_ids=["sha256:" + "0" * 64] * 2), "faults/count:1"
    )
    _, error = pull_through(tmp_path, registry, "faults/count:1", lambda _: None)
    assert "1 layers in the manifest, 2 diff IDs" in str(error)


@pytest.mark.parametrize(
    ("archive", "words"),
    [
        (tar_of({"ok": "x", "../evil": "x"}), "its name leads out of the layer"),
        (tar_of({"etc": Symlink("/etc"), "etc/tare-was-here": "x"}), "outside the layer"),
        (tar_of({"h": Hardlink("/etc/passwd")}), "hard link"),
        (tar_of({"cut": "x" * 5000})[:2000], "ends in the middle of the file"),
        (b"this is no tar archive at all" * 100, "no tar archive"),
    ],
)
def test_layers_that_are_refused(registry: Registry, tmp_path: Path, archive: bytes, words: str) -> None:
    registry.upload(make_image(tmp_path / "layout", [{"fine": "x"}, archive]), "faults/layer:1")
    _, error = pull_through(tmp_path, registry, "faults/layer:1", lambda _: None)
    assert "at step unpack" in str(error) and words in str(error)
    assert not Path("/etc/tare-was-here").exists()


def hand_made(directory: Path, layer: bytes, plain: bytes, **manifest: object) -> Path:
    """An image of one layer as it comes."""
    layout = Layout(directory)
    blob = layout.add(layer)
    diff_id = "sha256:" + hashlib.sha256(plain).hexdigest()
    config = layout.add_json(
        {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    )
    document = {
        "schemaVersion": 2,
        "mediaType": OCI + "manifest.v1+json",
        "config": config.descriptor(OCI + "config.v1+json"),
        "layers": [blob.descriptor(OCI + "layer.v1.tar+gzip")],
        **manifest,
    }
    layout.tag("latest", layout.add_json(document).descriptor(OCI + "manifest.v1+json"))
    return directory


def test_truncated_gzip(registry: Registry, tmp_path: Path) -> None:
    archive = tar_of({"a": "b" * 5000})
    registry.upload(hand_made(tmp_path / "layout", gzip.compress(archive)[:-20], archive), "faults/gzip:1")
    _, error = pull_through(tmp_path, registry, "faults/gzip:1", lambda _: None)
    assert "decompress layer (gzip): the data ends in the middle" in str(error)


def test_schema_1(registry: Registry, tmp_path: Path) -> None:
    body = b'{"schemaVersion": 1, "name": "x", "tag": "1", "architecture": "amd64", "fsLayers": [], "history": []}'
    headers = {"Content-Type": "application/vnd.docker.distribution.manifest.v1+prettyjws"}
    headers["Docker-Content-Digest"] = "sha256:" + hashlib.sha256(body).hexdigest()
    _, error = pull_through(tmp_path, registry, "faults/one:1", lambda _: Fault(status=200, body=body, headers=headers))
    assert "schema 1 format" in str(error)


def test_a_blob_of_another_size(registry: Registry, tmp_path: Path) -> None:
    archive = tar_of({"a": "b"})
    layer = {
        "mediaType": OCI + "layer.v1.tar",
        "digest": "sha256:" + hashlib.sha256(archive).hexdigest(),
        "size": len(archive) + 1,
    }
    registry.upload(hand_made(tmp_path / "layout", archive, archive, layers=[layer]), "faults/size:1")
    _, error = pull_through(tmp_path, registry, "faults/size:1", lambda _: None)
    assert f"it announces {len(archive)} bytes where {len(archive) + 1} are expected" in str(error)


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_copy_in_the_store_is_fetched_anew(registry: Registry, tmp_path: Path, damage: str) -> None:
    registry.push(make_image(tmp_path / "one", [{"base": "b"}, {"1": "x"}]), "faults/repair1:1")
    registry.push(make_image(tmp_path / "two", [{"1": "x"}, {"base": "b"}]), "faults/repair2:1")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            one = await service.pull(f"{registry.url}/faults/repair1:1", None)
            stored = tmp_path / "root/blobs/sha256" / one.layer_digests[0][7:]
            whole = stored.read_bytes()
            if damage == "gone":
                stored.unlink()
            else:
                stored.write_bytes(whole[:-30] + (bytes(30) if damage == "changed" else b""))
            two = await service.pull(f"{registry.url}/faults/repair2:1", None)
            assert (service.layer_paths(two)[0] / "base").read_text() == "b"
            assert stored.read_bytes() == whole

    asyncio.run(main())


def test_damaged_documents_in_the_store_are_fetched_anew(registry: Registry, tmp_path: Path, layout: Path) -> None:
    registry.push(layout, "faults/documents:1")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            image = await service.pull(f"{registry.url}/faults/documents:1", None)
            await service.pull(f"{registry.url}/faults/documents:1", None)
            for digest in image.documents:
                (tmp_path / "root/blobs/sha256" / digest[7:]).write_bytes(b"{}")
            shutil.rmtree(service.layer_paths(image)[0])
        async with image_service(tmp_path) as service:
            assert service.list() == []
            again = await service.pull(f"{registry.url}/faults/documents:1", None)
            assert (again.id, again.config) == (image.id, image.config)

    asyncio.run(main())


@contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    """A filesystem of a few megabytes."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tare-test", str(directory)], check=True, timeout=30)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True, timeout=30)


@pytest.mark.parametrize(
    ("size", "reserve", "words"),
    [
        # Beside the four that the databases have for themselves.
        ("7m", -1 << 30, "No space left on device"),
        ("9m", -1 << 30, "No space left on device"),
        ("7m", 0, "MiB are needed"),
    ],
)
def test_a_full_disk_leaves_nothing(
    registry: Registry, large: tuple[str, str], layout: Path, tmp_path: Path, size: str, reserve: int, words: str
) -> None:
    registry.push(layout, "faults/fits:1")

    async def main() -> None:
        with small_disk(tmp_path / "disk", size) as disk:
            async with image_service(disk, disk_reserve=reserve) as service:
                image = await service.pull(f"{registry.url}/faults/fits:1", None)
                before = files_of(disk)
                with pytest.raises(PullError, match=rf"{words}.*free some space"):
                    await service.pull(f"{registry.url}/{large[0]}", None)
                assert files_of(disk) == before
                assert service.list() == [image]

    asyncio.run(main())
