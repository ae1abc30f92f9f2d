"""OCI artifacts from a real registry: a directory of files named by their titles, kept and removed like images."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from tare.api.service import Images
from tare.api.v1 import tare_pb2 as pb
from tare.images.errors import PullError
from tare.images.transfers import Transfers
from tare.images.verify import Verifier
from tests.support.image_service import files_of, image_service
from tests.support.registry import Registry
from tests.support.signing import upload_artifact

pytestmark = pytest.mark.root

FILES = {"model.bin": b"weights" * 1000, "conf/a/settings.json": b"{}", "conf/b.txt": b"b", "": b"untitled"}


@pytest.mark.parametrize("keep_blobs", [True, False])
def test_an_artifact_is_a_directory_of_its_blobs(registry: Registry, tmp_path: Path, keep_blobs: bool) -> None:
    name = f"{registry.url}/artifacts/model:1"
    digest = upload_artifact(registry, "artifacts/model:1", FILES, tmp_path / "artifact")

    async def main() -> None:
        async with image_service(tmp_path, keep_blobs=keep_blobs) as service:
            image = await service.pull(name, None)
            assert (image.id, image.chain_ids, image.artifact_type) == (
                digest,
                (digest,),
                "application/vnd.tests.model",
            )
            assert image.size == sum(map(len, FILES.values())) + 0  # the empty configuration is one of the blobs
            assert service.find(name) == service.find(digest) is not None
            (layer,) = service.layer_paths(image)
            found = {str(path.relative_to(layer)): path for path in layer.rglob("*") if path.is_file()}
            untitled = next(key for key in found if key.startswith("sha256-"))
            assert {key: path.read_bytes() for key, path in found.items() if key != untitled} == {
                key: data for key, data in FILES.items() if key
            }
            assert found[untitled].read_bytes() == b"untitled"
            assert {path.stat().st_mode & 0o7777 for path in found.values()} == {0o444}
            assert {path.stat().st_mode & 0o7777 for path in layer.rglob("*") if path.is_dir()} == {0o755}
            await service.collect()
            assert (await service.pull(name, None)).id == image.id
        async with image_service(tmp_path, keep_blobs=keep_blobs) as service:
            assert [item.id for item in service.list()] == [digest]
            assert found["model.bin"].exists()
            await service.remove(name)
            assert files_of(tmp_path) == []

    asyncio.run(main())


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"../escape": b"x"}, "cannot be a file's name"),
        ({"a": b"x", "a/b": b"y"}, "a file and a directory"),
        ({"a": b"x", "./a": b"y"}, "two blobs have the title"),
        ({"/": b"x"}, "names no file"),
        ({"x" * 300: b"x"}, "cannot be a file's name"),
    ],
)
def test_titles_that_cannot_be(registry: Registry, tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    upload_artifact(registry, "artifacts/wrong", files, tmp_path / "artifact")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            with pytest.raises(PullError, match=words):
                await service.pull(f"{registry.url}/artifacts/wrong", None)
            assert files_of(tmp_path) == [] and not (tmp_path / "root/escape").exists()

    asyncio.run(main())


def test_a_damaged_blob_is_fetched_again(registry: Registry, tmp_path: Path) -> None:
    upload_artifact(registry, "artifacts/first", {"f": b"content", "g": b"other"}, tmp_path / "first")
    upload_artifact(registry, "artifacts/second", {"f": b"content"}, tmp_path / "second")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            image = await service.pull(f"{registry.url}/artifacts/first", None)
            (layer,) = service.layer_paths(image)
            stored = next(
                path for path in (tmp_path / "root/blobs/sha256").iterdir() if path.read_bytes() == b"content"
            )
            stored.chmod(0o600)
            stored.write_bytes(b"CONTENT")
            second = await service.pull(f"{registry.url}/artifacts/second", None)
            assert (service.layer_paths(second)[0] / "f").read_bytes() == b"content"
            assert (layer / "g").read_bytes() == b"other"

    asyncio.run(main())


def test_damage_is_found_and_repaired(registry: Registry, tmp_path: Path) -> None:
    upload_artifact(registry, "artifacts/health", {"d/f": b"content", "g": b"other"}, tmp_path / "artifact")
    name = f"{registry.url}/artifacts/health"

    async def main() -> None:
        async with image_service(tmp_path) as service:
            image = await service.pull(name, None)
            before, verifier = files_of(tmp_path), Verifier(service)
            (layer,) = service.layer_paths(image)
            blob = tmp_path / "root/blobs/sha256" / hashlib.sha256(b"content").hexdigest()

            async def troubles() -> list[str]:
                return [finding.trouble async for finding in verifier.verify([name]) if finding.trouble]

            async def repaired() -> list[str]:
                return [finding.kind async for finding in verifier.repair(name, None)]

            assert await troubles() == [] and await repaired() == []
            (layer / "g").unlink()
            assert await troubles() == ["/g is missing"]
            assert await repaired() == ["layer"]
            (layer / "d/more").write_bytes(b"x")
            assert await troubles() == ["/d/more should not be there"]
            assert await repaired() == ["layer"]
            blob.chmod(0o600)
            blob.write_bytes(b"CONTENT")
            assert len(await troubles()) == 1
            assert await repaired() == ["blob", "layer"]
            assert (layer / "d/f").read_bytes() == b"content" and blob.stat().st_nlink == 2
            blob.unlink()
            assert len(await troubles()) == 1
            assert await repaired() == ["blob", "layer"]
            assert await troubles() == [] and files_of(tmp_path) == before

    asyncio.run(main())


def test_there_must_be_room(registry: Registry, tmp_path: Path) -> None:
    upload_artifact(registry, "artifacts/room", {"f": b"content" * 1000}, tmp_path / "artifact")

    async def main() -> None:
        async with image_service(tmp_path, disk_reserve=1 << 60) as service:
            with pytest.raises(PullError, match=r"look for free space: about 0 MiB are needed"):
                await service.pull(f"{registry.url}/artifacts/room", None)
            assert files_of(tmp_path) == []

    asyncio.run(main())


def test_its_progress_is_told(registry: Registry, tmp_path: Path) -> None:
    upload_artifact(registry, "artifacts/told", {"f": b"content" * 1000, "g": b"x"}, tmp_path / "artifact")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            face = Images(service, Transfers(service))
            told = [m async for m in face.Pull(pb.PullRequest(image=f"{registry.url}/artifacts/told"))]
            assert {m.blob: (m.done, m.state) for m in told[:-1]} == {
                f"sha256:{hashlib.sha256(data).hexdigest()}": (len(data), "done") for data in (b"content" * 1000, b"x")
            }
            assert told[-1].image_id == service.list()[0].id

    asyncio.run(main())


def test_it_is_pushed_as_it_is(registry: Registry, tmp_path: Path) -> None:
    upload_artifact(registry, "artifacts/pushed", {"d/f": b"content", "g": b"x"}, tmp_path / "artifact")

    async def main() -> None:
        with Registry(tmp_path / "other") as other:
            target = f"{other.url}/artifacts/copy:1"
            async with image_service(tmp_path / "one") as service:
                image = await service.pull(f"{registry.url}/artifacts/pushed", None)
                digest = await Transfers(service).push(
                    f"{registry.url}/artifacts/pushed", target, None, lambda *_: None
                )
                assert digest == image.id
            async with image_service(tmp_path / "two") as service:
                copy = await service.pull(target, None)
                assert (copy.id, copy.artifact_type) == (image.id, image.artifact_type)
                assert (service.layer_paths(copy)[0] / "d/f").read_bytes() == b"content"

    asyncio.run(main())
