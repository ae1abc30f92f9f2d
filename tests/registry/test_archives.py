"""Images to and from archives and registries: skopeo and umoci write and read them too, and every digest is the same after."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tare.api.service import Images
from tare.api.v1 import tare_pb2 as pb
from tare.errors import InvalidArgument, NotFound
from tare.images.auth import RegistryAuth
from tare.images.errors import PullError
from tare.images.importing import LOAD_IMAGE
from tare.images.service import ImageService
from tare.images.transfers import Transfers
from tare.images.transport import Endpoint, Patience
from tests.support.image_service import files_of, image_service
from tests.support.images import OCI, Layout, make_image
from tests.support.proxy import Fault, FaultProxy
from tests.support.registry import Registry
from tests.support.tokens import TokenServer

pytestmark = pytest.mark.root
ROOT = Path(__file__).parents[2]


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


async def in_pieces(path: Path, size: int = 100_000) -> AsyncIterator[bytes]:
    data = path.read_bytes()
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def saved(transfers: Transfers, path: Path, *names: str, docker: bool = False) -> Path:
    with path.open("wb") as file:
        async for piece in transfers.save(names, docker=docker):
            file.write(piece)
    return path


def quiet(*_: object) -> None:
    """No bars."""


@pytest.mark.parametrize("docker", [False, True])
def test_saved_and_loaded_again_it_is_the_same_image(
    registry: Registry, layout: Path, tmp_path: Path, docker: bool
) -> None:
    registry.push(layout, "archive/round:1")
    name = f"{registry.url}/archive/round:1"

    async def main() -> None:
        async with image_service(tmp_path / "one") as service:
            image = await service.pull(name, None)
            first = await saved(Transfers(service), tmp_path / "a.tar", name, docker=docker)
            assert (
                first.read_bytes()
                == (await saved(Transfers(service), tmp_path / "b.tar", name, docker=docker)).read_bytes()
            )
        async with image_service(tmp_path / "two") as service:
            transfers = Transfers(service)
            (loaded,) = await transfers.load(in_pieces(first), None)
            assert (loaded.id, loaded.repo_tags, loaded.repo_digests) == (image.id, image.repo_tags, image.repo_digests)
            assert (service.layer_paths(loaded)[0] / "etc/motd").read_text() == "hello again"
            assert first.read_bytes() == (await saved(transfers, tmp_path / "c.tar", name, docker=docker)).read_bytes()
            with pytest.raises(NotFound, match="there is no image other here"):
                await saved(transfers, tmp_path / "d.tar", "other")

    asyncio.run(main())
    kind = "docker-archive" if docker else "oci-archive"
    told = json.loads(run("skopeo", "inspect", f"{kind}:{tmp_path}/a.tar"))
    assert told["Labels"] == {"l": "v"}
    run("skopeo", "copy", "-q", f"{kind}:{tmp_path}/a.tar", f"oci:{tmp_path}/again:1")
    run("umoci", "unpack", "--image", f"{tmp_path}/again:1", str(tmp_path / "bundle"))
    assert (tmp_path / "bundle/rootfs/etc/motd").read_text() == "hello again"


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_what_skopeo_writes_is_loaded(layout: Path, tmp_path: Path, kind: str) -> None:
    where = f"{kind}:{tmp_path}/x.tar:demo.example/app:2"
    run("skopeo", "copy", "-q", f"oci:{layout}:latest", where)
    config = json.loads(run("skopeo", "inspect", "--raw", where))["config"]["digest"]
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress((tmp_path / "x.tar").read_bytes()))

    async def main() -> None:
        async with image_service(tmp_path) as service:
            transfers = Transfers(service)
            (image,) = await transfers.load(in_pieces(tmp_path / "x.tar.gz"), None)
            assert image.id == config
            assert image.repo_tags == ("demo.example/app:2",)
            assert bool(image.repo_digests) == (kind == "oci-archive")
            (again,) = await transfers.load(in_pieces(tmp_path / "x.tar"), "other.example/name:3")
            assert (again.id, again.repo_tags) == (image.id, ("demo.example/app:2", "other.example/name:3"))
            steps = await transfers.history("demo.example/app:2")
            assert [(step.step.created_by, bool(step.size)) for step in steps] == [("tests", True)] * 2
            await service.remove(image.id)
            assert files_of(tmp_path) == []

    asyncio.run(main())


def test_an_index_keeps_its_digest(registry: Registry, empty_layout: Layout, tmp_path: Path) -> None:
    amd, arm = (
        empty_layout.image([{"which": name}], platform={"os": "linux", "architecture": name})
        for name in ("amd64", "arm64")
    )
    index = empty_layout.index([amd, arm])
    empty_layout.tag("latest", index)
    registry.push(empty_layout.directory, "archive/index:1", all_platforms=True)
    name = f"{registry.url}/archive/index:1"

    async def main() -> None:
        async with image_service(tmp_path / "one") as service:
            image = await service.pull(name, None)
            path = await saved(Transfers(service), tmp_path / "a.tar", name)
        async with image_service(tmp_path / "two") as service:
            (loaded,) = await Transfers(service).load(in_pieces(path), None)
            assert loaded.repo_digests == image.repo_digests == (f"{registry.url}/archive/index@{index['digest']}",)
            assert (service.layer_paths(loaded)[0] / "which").read_text() == "amd64"

    asyncio.run(main())


def damaged_archives(directory: Path, good: Path) -> dict[str, bytes]:
    """Archives that are not to be loaded, by what is to be said of them."""
    data = good.read_bytes()
    with tarfile.open(good) as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive if member.isfile()}  # type: ignore[union-attr]
    blob = next(name for name in members if name.startswith("blobs/") and len(members[name]) < 1000)

    def made(**changes: bytes | None) -> bytes:
        path = directory / "made.tar"
        with tarfile.open(path, "w") as archive:
            for name, content in {**members, **changes}.items():
                if content is not None:
                    (directory / "member").write_bytes(content)
                    archive.add(directory / "member", name)
        return path.read_bytes()

    return {
        "middle": data[:700],
        "no tar archive": b"what is this" * 100,
        "neither index.json nor manifest.json": made(**{"index.json": None}),
        "there is no image in it": made(**{"index.json": b'{"manifests": []}'}),
        "read index.json": made(**{"index.json": b"{"}),
        "the bytes that came have the digest": made(**{blob: members[blob][:-1] + b"~"}),
        "the archive does not have it": made(**{blob: None}),
    }


def test_damaged_archives_are_refused_and_leave_nothing(layout: Path, tmp_path: Path) -> None:
    run("skopeo", "copy", "-q", f"oci:{layout}:latest", f"oci-archive:{tmp_path}/x.tar:demo.example/app:2")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            transfers = Transfers(service)
            for words, data in damaged_archives(tmp_path, tmp_path / "x.tar").items():
                (tmp_path / "bad.tar").write_bytes(data)
                with pytest.raises(PullError, match=f"load image from an archive.*{words}"):
                    await transfers.load(in_pieces(tmp_path / "bad.tar"), None)
                assert files_of(tmp_path) == []
            with pytest.raises(PullError, match="its end"):
                await transfers.load(broken_off(tmp_path / "x.tar"), None)
            assert files_of(tmp_path) == []

    asyncio.run(main())


async def broken_off(path: Path) -> AsyncIterator[bytes]:
    yield path.read_bytes()[:2000]
    raise PullError("read archive", cause="its end")


LOAD = """
import asyncio, sys
from pathlib import Path
from tare.images.transfers import Transfers
from tests.registry.test_archives import in_pieces
from tests.support.image_service import image_service

async def main():
    async with image_service(Path(sys.argv[1])) as service:
        await Transfers(service).load(in_pieces(Path(sys.argv[2])), None)

asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("step", "when"), [(step.name, when) for step in LOAD_IMAGE.steps for when in ("before", "after")]
)
def test_a_daemon_killed_in_a_load(layout: Path, tmp_path: Path, step: str, when: str) -> None:
    archive = tmp_path / "x.tar"
    run("skopeo", "copy", "-q", f"oci:{layout}:latest", f"oci-archive:{archive}:demo.example/app:2")
    environment = {**os.environ, "TARE_FAILPOINTS": f"LoadImage.{step}.{when}=kill"}
    died = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path, archive], cwd=ROOT, env=environment, timeout=60, check=False
    )
    assert died.returncode == -signal.SIGKILL

    async def main() -> None:
        async with image_service(tmp_path) as service:
            assert len(service.list()) == ((step, when) == ("record", "after"))
            if not service.list():
                assert files_of(tmp_path) == []
            (image,) = await Transfers(service).load(in_pieces(archive), None)
            assert image.repo_tags == ("demo.example/app:2",)

    asyncio.run(main())


def test_a_pull_tells_how_far_it_is(registry: Registry, noise: bytes, tmp_path: Path) -> None:
    registry.push(make_image(tmp_path / "l", [{"data": noise}, {"small": "x"}]), "archive/progress:1")

    async def main(proxy: FaultProxy) -> None:
        async with image_service(tmp_path, patience=Patience(progress=30, pause=0.01)) as service:
            face = Images(service, Transfers(service))
            proxy.script = lambda asked: (
                Fault(cut=1_000_000) if "range" not in asked.headers and asked.is_blob else None
            )
            told = [message async for message in face.Pull(pb.PullRequest(image=f"{proxy.url}/archive/progress:1"))]
            *blobs, last = told
            assert last.image_id == service.list()[0].id and last.digest.startswith("sha256:")
            assert {(m.state, m.done == m.total) for m in blobs} >= {("done", True)}
            assert all(0 <= m.done <= m.total for m in blobs)
            by_blob = {m.blob: m.state for m in blobs}
            assert list(by_blob.values()) == ["done", "done"]

    with FaultProxy(registry.url) as proxy:
        asyncio.run(main(proxy))


def test_tags_move(registry: Registry, layout: Path, tmp_path: Path) -> None:
    registry.push(layout, "archive/tag:1")

    async def main() -> None:
        async with image_service(tmp_path) as service:
            transfers = Transfers(service)
            image = await service.pull(f"{registry.url}/archive/tag:1", None)
            tagged, name = transfers.tag(image.id[7:20], "mine")
            assert (tagged.id, name) == (image.id, "docker.io/library/mine:latest")
            found = service.find("mine")
            assert found is not None and found.repo_tags == (f"{registry.url}/archive/tag:1", name)
            with pytest.raises(InvalidArgument, match="a digest cannot be given away"):
                transfers.tag("mine", "x@sha256:" + "0" * 64)

    asyncio.run(main())


async def pushed(
    service: ImageService, name: str, target: str, auth: RegistryAuth | None = None, *, whole: bool = False
) -> tuple[str, list[str]]:
    """The digest, and what was told of blobs."""
    told: list[str] = []
    transfers = Transfers(service)
    digest = await transfers.push(name, target, auth, lambda blob, done, total, state: told.append(state), whole=whole)
    transfers.close()
    return digest, told


def test_a_push_sends_what_is_missing_and_keeps_the_digest(registry: Registry, layout: Path, tmp_path: Path) -> None:
    registry.push(layout, "archive/from:1")
    source, target = f"{registry.url}/archive/from:1", f"{registry.url}/archive/to:2"

    async def main() -> None:
        async with image_service(tmp_path / "one") as service:
            image = await service.pull(source, None)
            digest, told = await pushed(service, source, target)
            assert told == ["mounted"] * 3
            assert (await pushed(service, source, target))[1] == ["there"] * 3
            assert digest == image.manifest
            with Registry(tmp_path / "other") as other:
                digest, told = await pushed(service, source, f"{other.url}/archive/to:2")
                assert (digest, told.count("done"), told.count("there")) == (image.manifest, 3, 0)
        async with image_service(tmp_path / "two") as service:
            again = await service.pull(target, None)
            assert (again.id, again.manifest) == (image.id, image.manifest)

    asyncio.run(main())


def test_a_push_of_a_whole_index(registry: Registry, empty_layout: Layout, tmp_path: Path) -> None:
    platforms = [{"os": "linux", "architecture": name} for name in ("amd64", "s390x")]
    images = [empty_layout.image([{"etc/x": p["architecture"]}], platform=p) for p in platforms]
    statement = empty_layout.add_json({"_type": "https://in-toto.io/Statement/v0.1"})
    config = empty_layout.add_json({"architecture": "unknown", "os": "unknown", "rootfs": {"type": "layers"}})
    attestation = {
        "schemaVersion": 2,
        "mediaType": OCI + "manifest.v1+json",
        "config": config.descriptor(OCI + "config.v1+json"),
        "layers": [statement.descriptor("application/vnd.in-toto+json")],
    }
    unknown = {"os": "unknown", "architecture": "unknown"}
    images.append(empty_layout.add_json(attestation).descriptor(OCI + "manifest.v1+json", platform=unknown))
    index = empty_layout.index(images)
    empty_layout.tag("latest", index)
    registry.upload(empty_layout.directory, "archive/whole:1")
    source, near = f"{registry.url}/archive/whole:1", f"{registry.url}/archive/near:2"

    async def main() -> None:
        with Registry(tmp_path / "other") as other:
            far = f"{other.url}/archive/far:2"
            async with image_service(tmp_path / "one") as service:
                await service.pull(source, None)
                before = files_of(tmp_path / "one")
                digest, told = await pushed(service, source, near, whole=True)
                assert (digest, set(told)) == (index["digest"], {"mounted"})
                digest, told = await pushed(service, source, far, whole=True)
                assert (digest, told.count("done")) == (index["digest"], 6)
                assert files_of(tmp_path / "one") == before
                assert (await pushed(service, source, f"{other.url}/archive/single:1"))[0] != index["digest"]
            for name in (near, far):
                listed = json.loads(run("skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{name}"))
                assert [entry["digest"] for entry in listed["manifests"]] == [image["digest"] for image in images]
                run(
                    "skopeo",
                    "copy",
                    "-q",
                    "--all",
                    "--src-tls-verify=false",
                    f"docker://{name}",
                    f"dir:{tmp_path}/{name[-5:-2]}",
                )
            await absent(far)

    async def absent(far: str) -> None:
        async with image_service(tmp_path / "two") as service:
            (image,) = await Transfers(service).load(in_pieces(tmp_path / "x.tar"), None)
            assert (await pushed(service, image.id, far, whole=True))[0] == image.manifest

    run(
        "skopeo",
        "copy",
        "-q",
        f"oci:{empty_layout.directory}:latest",
        f"oci-archive:{tmp_path}/x.tar:demo.example/app:2",
    )
    asyncio.run(main())


def test_a_mount_that_is_not_allowed_becomes_an_upload(layout: Path, tmp_path: Path) -> None:
    allowed = {"ann": {"mine/*"}, "bob": {"*"}}
    users = {"ann": "secret", "bob": "word"}
    ann, bob = (RegistryAuth(username=name, password=word) for name, word in users.items())

    async def main() -> None:
        with (
            TokenServer(tmp_path / "tokens", users=users, allowed=allowed) as tokens,
            Registry(tmp_path / "private", token=tokens.auth) as private,
        ):
            private.push(layout, "theirs/app:1", credentials="bob:word")
            source = f"{private.url}/theirs/app:1"
            async with image_service(tmp_path) as service:
                await service.pull(source, bob)
                _, told = await pushed(service, source, f"{private.url}/mine/app:1", ann)
                assert told.count("done") == 3 and "mounted" not in told
                _, told = await pushed(service, source, f"{private.url}/mine/more:1", bob)
                assert told == ["mounted"] * 3

    asyncio.run(main())


def test_a_manifest_that_an_index_names_often_is_pushed_once(
    registry: Registry, empty_layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = empty_layout.index([empty_layout.image([{"x": "y"}], platform={"os": "linux", "architecture": "amd64"})])
    outer = empty_layout.index([inner] * 50)
    empty_layout.tag("latest", outer)
    registry.upload(empty_layout.directory, "archive/often:1")
    puts: list[str] = []
    request = Endpoint.request

    def noting(self: Endpoint, method: str, path: str, **more: Any) -> Any:
        if method == "PUT" and "/manifests/" in path:
            puts.append(path)
        return request(self, method, path, **more)

    async def main() -> None:
        async with image_service(tmp_path / "one") as service:
            await service.pull(f"{registry.url}/archive/often:1", None)
            digest, _ = await pushed(
                service, f"{registry.url}/archive/often:1", f"{registry.url}/archive/to:2", whole=True
            )
            assert digest == outer["digest"]

    monkeypatch.setattr(Endpoint, "request", noting)
    asyncio.run(main())
    assert len(puts) == 3


def test_a_push_needs_its_credentials(layout: Path, tmp_path: Path) -> None:
    run("skopeo", "copy", "-q", f"oci:{layout}:latest", f"oci-archive:{tmp_path}/x.tar:demo.example/app:2")

    async def main() -> None:
        with Registry(tmp_path / "private", users={"ann": "secret"}) as private:
            async with image_service(tmp_path) as service:
                (image,) = await Transfers(service).load(in_pieces(tmp_path / "x.tar"), None)
                target = f"{private.url}/demo/app:2"
                with pytest.raises(PullError, match=r"push image .*none were given"):
                    await pushed(service, image.id, target)
                auth = RegistryAuth(username="ann", password="secret")
                digest, _ = await pushed(service, image.id, target, auth)
                assert digest == image.manifest
                with pytest.raises(InvalidArgument, match="it has not one name"):
                    transfers = Transfers(service)
                    transfers.tag(image.id, "second")
                    await transfers.push(image.id, "", None, quiet)

    asyncio.run(main())
