"""A pull that dies or fails at any of its steps: what was before stays, and of the pull nothing but, where it died, whole blobs."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from tare.images import layers
from tare.images.errors import PullError
from tare.images.pull import PULL_IMAGE
from tare.images.store import ImageStore
from tare.state import failpoints
from tare.storage import content
from tests.support.image_service import files_of, image_service
from tests.support.images import make_image
from tests.support.registry import Registry

pytestmark = pytest.mark.root

POINTS = [(step.name, when) for step in PULL_IMAGE.steps for when in ("before", "after")]
BROUGHT = (("unpack", "after"), ("record", "before"))
ROOT = Path(__file__).parents[2]

PULL = """
import asyncio, sys
from pathlib import Path
from tests.support.image_service import image_service

async def main():
    async with image_service(Path(sys.argv[1])) as service:
        await service.pull(sys.argv[2], None)

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def images(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two images that share their lowest layer."""
    directory = tmp_path_factory.mktemp("images")
    registry.push(make_image(directory / "one", [{"base": "b"}, {"one": "1"}]), "recovery/one:1")
    registry.push(make_image(directory / "two", [{"base": "b"}, {"two": "2"}]), "recovery/two:1")
    return f"{registry.url}/recovery/one:1", f"{registry.url}/recovery/two:1"


@pytest.mark.parametrize(("step", "when"), POINTS)
def test_a_daemon_killed_in_a_pull(images: tuple[str, str], tmp_path: Path, step: str, when: str) -> None:
    one, two = images
    subprocess.run([sys.executable, "-c", PULL, str(tmp_path), one], check=True, cwd=ROOT, timeout=60)
    before = files_of(tmp_path)
    environment = {**os.environ, "TARE_FAILPOINTS": f"PullImage.{step}.{when}=kill"}
    died = subprocess.run(
        [sys.executable, "-c", PULL, str(tmp_path), two], cwd=ROOT, env=environment, timeout=60, check=False
    )
    assert died.returncode == -signal.SIGKILL

    async def main() -> None:
        async with image_service(tmp_path) as service:
            names = [name for image in service.list() for name in image.repo_tags]
            if (step, when) == ("record", "after"):
                assert names == [one, two]
            else:
                assert names == [one]
                more = set(files_of(tmp_path)) - set(before)
                assert set(before) <= set(files_of(tmp_path)) and len(more) == ((step, when) in BROUGHT)
                assert all(name.startswith("blobs/") for name in more)
            image = await service.pull(two, None)
            assert (service.layer_paths(image)[0] / "two").read_text() == "2"
            assert (service.layer_paths(image)[1] / "base").read_text() == "b"
            await service.remove(two)
            assert files_of(tmp_path) == before

    asyncio.run(main())


@pytest.mark.parametrize(("step", "when"), POINTS)
def test_a_step_that_fails(
    images: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    one, two = images

    async def main() -> None:
        async with image_service(tmp_path) as service:
            await service.pull(one, None)
            before = files_of(tmp_path)
            monkeypatch.setattr(failpoints, "_rules", {f"PullImage.{step}.{when}": "error"})
            with pytest.raises(PullError, match=f"at step {step}: failpoint"):
                await service.pull(two, None)
            if (step, when) == ("record", "after"):
                assert len(service.list()) == 2
            else:
                assert files_of(tmp_path) == before
            assert (await service.pull(two, None)).repo_tags == (two,)

    asyncio.run(main())


def test_data_is_on_the_disk_before_the_record_that_names_it(
    images: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def watched(owner: object, name: str, what: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: object) -> object:
            seen.append(what)
            return real(*arguments)

        monkeypatch.setattr(owner, name, call)

    watched(layers, "unpack", "unpack")
    watched(layers, "sync_filesystem", "sync")
    watched(layers.LayerStore, "place", "place")
    watched(layers, "sync_directory", "sync name")
    watched(layers.LayerStore, "record", "record layer")
    watched(os, "fsync", "fsync")
    watched(content, "sync_directory", "blob has its name")
    watched(ImageStore, "add", "record image")

    async def main() -> None:
        async with image_service(tmp_path, parallel_layers=1) as service:
            await service.pull(images[0], None)

    asyncio.run(main())
    blobs = [what for what in seen if what in ("fsync", "blob has its name")]
    assert blobs.count("blob has its name") == 4 and seen[-1] == "record image"
    assert [what for what, after in pairwise(blobs) if after == "blob has its name"] == ["fsync"] * 4
    steps = [what for what in seen if what not in ("fsync", "blob has its name")]
    for layer in (0, 1):
        at = [
            [n for n, what in enumerate(steps) if what == step][layer] for step in ("unpack", "place", "record layer")
        ]
        assert at == sorted(at) and "sync" in steps[at[0] : at[1]] and "sync name" in steps[at[1] : at[2]]


def test_what_a_crash_leaves_on_the_disk_is_swept(images: tuple[str, str], tmp_path: Path) -> None:
    one, _ = images

    async def main() -> None:
        async with image_service(tmp_path) as service:
            await service.pull(one, None)
        before = files_of(tmp_path)
        root = tmp_path / "root"
        for name in (".tmp-3", ".trash-4", "f" * 64):
            (root / "layers" / name / "deep").mkdir(parents=True)
        (root / "ingest" / "7.abc").write_text("partial")
        (root / "blobs/sha256" / ("e" * 64)).write_text("named by nobody")
        async with image_service(tmp_path) as service:
            assert files_of(tmp_path) == before
            assert len(service.list()) == 1

    asyncio.run(main())


def test_an_image_that_has_lost_a_layer_is_pulled_again(images: tuple[str, str], tmp_path: Path) -> None:
    one, _ = images

    async def main() -> None:
        async with image_service(tmp_path) as service:
            image = await service.pull(one, None)
            lost = service.layer_paths(image)[1]
        shutil.rmtree(lost)
        async with image_service(tmp_path) as service:
            assert service.list() == []
            assert files_of(tmp_path) == []
            again = await service.pull(one, None)
            assert (again.id, (lost / "base").read_text()) == (image.id, "b")

    asyncio.run(main())
