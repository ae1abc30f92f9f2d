"""Downloads that go on where they were: after a killed daemon, in ranges, and away from hosts that are too slow."""

from __future__ import annotations

import asyncio
import gzip
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tare.images.errors import PullError
from tare.images.transport import Patience
from tests.registry.test_pull_recovery import PULL, ROOT
from tests.support.image_service import files_of, image_service
from tests.support.images import make_image, tar_of
from tests.support.proxy import Fault, FaultProxy
from tests.support.registry import Registry

pytestmark = pytest.mark.root
RANGES = Patience(progress=2.0, attempts=4, pause=0.01, longest_pause=1.0, range_size=1 << 20)


@pytest.fixture(scope="module")
def big(registry: Registry, noise: bytes, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """An image of one layer that does not compress, and the size of its blob."""
    layout = make_image(tmp_path_factory.mktemp("big"), [{"data": noise * 4}])
    registry.push(layout, "resume/big:1")
    sizes = [path.stat().st_size for path in (layout / "blobs/sha256").iterdir()]
    return "resume/big:1", max(sizes)


def kept(root: Path) -> int:
    """How many bytes of blobs are there in part."""
    return sum(path.stat().st_blocks * 512 for path in (root / "root/ingest").glob("partial.*"))


def stalled(proxy: FaultProxy, root: Path, name: str, half: int) -> None:
    """Pull until half of the blob is there and no more comes; then the process is killed."""
    proxy.script = lambda asked: (
        Fault(stall=half) if asked.is_blob and asked.method == "GET" and half > 10_000 else None
    )
    process = subprocess.Popen([sys.executable, "-c", PULL, str(root), name], cwd=ROOT, env={**os.environ})
    try:
        deadline = time.monotonic() + 30
        while kept(root) < half - 600_000:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_killed_pull_goes_on_where_it_was(registry: Registry, big: tuple[str, int], tmp_path: Path) -> None:
    path, size = big

    async def main(proxy: FaultProxy) -> None:
        proxy.script = lambda _: None
        async with image_service(tmp_path) as service:
            image = await service.pull(f"{proxy.url}/{path}", None)
            assert (service.layer_paths(image)[0] / "data").stat().st_size > 1000

    with FaultProxy(registry.url) as proxy:
        stalled(proxy, tmp_path, f"{proxy.url}/{path}", size // 2)
        asyncio.run(main(proxy))
        assert size <= proxy.sent <= size * 1.1 + 20_000


def test_whole_blobs_of_a_killed_pull_are_not_fetched_again(
    registry: Registry, noise: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = len(noise) // 2
    layers = [{"one": noise[:half]}, {"two": noise[half:]}, {"last": noise * 2}]
    layout = make_image(tmp_path / "layout", layers)
    registry.push(layout, "resume/many:1")
    *others, last = sorted((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    size = sum(path.stat().st_size for path in (*others, last))

    async def main(proxy: FaultProxy) -> None:
        proxy.script = lambda _: None
        async with image_service(tmp_path / "svc") as service:
            assert len(list((tmp_path / "svc/root/blobs/sha256").iterdir())) == 2
            await service.collect()
            image = await service.pull(f"{proxy.url}/resume/many:1", None)
            assert proxy.sent <= size * 1.1 + 20_000
            await service.remove(image.id)
            assert files_of(tmp_path / "svc") == []

    async def give_up(proxy: FaultProxy) -> None:
        proxy.script = lambda asked: Fault(status=404) if asked.is_blob else None
        async with image_service(tmp_path / "svc") as service:
            with pytest.raises(PullError):
                await service.pull(f"{proxy.url}/resume/many:1", None)
            tomorrow = time.time_ns() + 25 * 3600 * 10**9
            monkeypatch.setattr(time, "time_ns", lambda: tomorrow)
            await service.collect()
            assert not any(name.startswith("blobs/") for name in files_of(tmp_path / "svc"))

    with FaultProxy(registry.url) as proxy:
        killed_before(proxy, tmp_path / "svc", "resume/many:1", last)
        asyncio.run(main(proxy))
        killed_before(proxy, tmp_path / "svc", "resume/many:1", last)
        asyncio.run(give_up(proxy))


def killed_before(proxy: FaultProxy, root: Path, name: str, last: Path) -> None:
    """Pull until two layers' blobs are whole and half of the `last` is there, which stalls; then the process is killed."""
    half = last.stat().st_size // 2
    proxy.script = lambda asked: Fault(stall=half) if last.name in asked.path else None
    process = subprocess.Popen([sys.executable, "-c", PULL, str(root), f"{proxy.url}/{name}"], cwd=ROOT)
    try:
        deadline = time.monotonic() + 30
        while True:
            whole = [path for path in (root / "root/blobs/sha256").glob("*") if path.stat().st_size > 100_000]
            coming = sum(path.stat().st_blocks * 512 for path in (root / "root/ingest").glob("partial.*"))
            if len(whole) == 2 and coming > half - 600_000:
                return
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()


def test_what_was_kept_of_a_blob_may_be_damaged(registry: Registry, big: tuple[str, int], tmp_path: Path) -> None:
    path, size = big

    async def main(proxy: FaultProxy) -> None:
        proxy.script = lambda _: None
        (partial,) = (tmp_path / "root/ingest").glob("partial.*")
        with partial.open("r+b") as file:
            file.seek(1000)
            file.write(b"damaged")
        async with image_service(tmp_path) as service:
            await service.pull(f"{proxy.url}/{path}", None)
            assert not any("ingest" in name for name in files_of(tmp_path))

    with FaultProxy(registry.url) as proxy:
        stalled(proxy, tmp_path, f"{proxy.url}/{path}", size // 2)
        asyncio.run(main(proxy))


def test_a_stopped_daemon_keeps_what_it_has(registry: Registry, big: tuple[str, int], tmp_path: Path) -> None:
    path, size = big

    async def main(proxy: FaultProxy) -> None:
        proxy.script = lambda asked: Fault(stall=size // 2) if asked.is_blob and asked.method == "GET" else None
        async with image_service(tmp_path) as service:
            pulling = asyncio.ensure_future(service.pull(f"{proxy.url}/{path}", None))
            async with asyncio.timeout(60):
                while kept(tmp_path) < size // 2 - 600_000:  # the rest may still be on its way
                    await asyncio.sleep(0.01)
        with pytest.raises(asyncio.CancelledError):
            await pulling
        proxy.script = lambda _: None
        async with image_service(tmp_path) as service:
            await service.pull(f"{proxy.url}/{path}", None)

    with FaultProxy(registry.url) as proxy:
        asyncio.run(main(proxy))
        assert proxy.sent <= size * 1.1 + 20_000


def test_big_blobs_come_in_ranges(registry: Registry, big: tuple[str, int], tmp_path: Path) -> None:
    path, size = big

    async def main(proxy: FaultProxy, root: Path, cost: float) -> None:
        proxy.sent, proxy.seen = 0, []
        async with image_service(root, patience=RANGES) as service:
            await service.pull(f"{proxy.url}/{path}", None)
        assert size <= proxy.sent <= size * cost + 20_000

    cut = iter([False, True, False, True])
    scripts = {
        "well": (lambda _: None, 1.0),
        "cut": (lambda a: Fault(cut=1 << 17) if a.headers.get("range") and next(cut, False) else None, 1.8),
        "without": (lambda a: Fault(ignore_range=True) if a.is_blob else None, 4.0),
    }
    with FaultProxy(registry.url) as proxy:
        for name, (script, cost) in scripts.items():
            proxy.script = script
            asyncio.run(main(proxy, tmp_path / name, cost))
            ranges = [asked.headers["range"] for asked in proxy.seen if "range" in asked.headers]
            if name == "well":
                assert len(ranges) == -(-size // (1 << 20))
                assert "bytes=1048576-2097151" in ranges


def test_a_host_that_is_too_slow_is_given_up(big: tuple[str, int], registry: Registry, tmp_path: Path) -> None:
    path, _ = big

    class Slow(FaultProxy):
        def _body(self, handler: object, response: object, fault: Fault) -> None:
            data = response.read()  # type: ignore[attr-defined]
            for start in range(0, len(data), 200):
                handler.wfile.write(data[start : start + 200])  # type: ignore[attr-defined]
                handler.wfile.flush()  # type: ignore[attr-defined]
                if len(data) > 100_000 and self._over.wait(0.1):
                    return

    async def main(proxy: FaultProxy) -> None:
        async with image_service(tmp_path, patience=Patience(progress=1.0, attempts=2, pause=0.01)) as service:
            with pytest.raises(PullError, match="less than 8192 bytes a second"):
                await service.pull(f"{proxy.url}/{path}", None)
            assert files_of(tmp_path) == []

    with Slow(registry.url) as proxy:
        asyncio.run(main(proxy))


def test_bombs_are_defused(registry: Registry, tmp_path: Path) -> None:
    zeros = tar_of({"zeros": bytes(8 << 20)})
    after = tar_of({"small": "x"}) + bytes(8 << 20)
    for number, archive in enumerate((zeros, after)):
        registry.upload(make_image(tmp_path / f"bomb{number}", [archive]), f"resume/bomb{number}:1")
        assert len(gzip.compress(archive)) < 20_000

    async def main() -> None:
        async with image_service(tmp_path, max_layer_size=1 << 20, max_layer_entries=100) as service:
            for number, words in ((0, "files of more than"), (1, "archive has more than")):
                with pytest.raises(PullError, match=words):
                    await service.pull(f"{registry.url}/resume/bomb{number}:1", None)
                assert files_of(tmp_path) == []

    asyncio.run(main())
