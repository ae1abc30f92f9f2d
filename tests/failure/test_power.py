"""The power goes during pulls, removals and changes of records: what is on the disk then is whole, or is not there.

The disk writes down what it is told (`tests.support.writelog`). Afterwards, at random entries of its log, a disk is made that holds what
one with a volatile cache may hold then, and a daemon is started on it, as after a reboot.

TARE_POWER_CUTS says how many (8), TARE_POWER_SEED gives the same ones again.
"""

from __future__ import annotations

import hashlib
import os
import random
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tare.api.v1 import tare_pb2
from tare.cri.v1 import api_pb2 as pb
from tests.support.daemon import Daemon
from tests.support.images import busybox_image
from tests.support.node import Node
from tests.support.registry import Registry
from tests.support.writelog import Disk, cut, logged_disk, mounted

pytestmark = pytest.mark.root
MEGABYTES = 64
CUTS = int(os.environ.get("TARE_POWER_CUTS", "8"))
SETTINGS = "[images]\ndisk_reserve = 0\n"
FILES = {f"etc/file-{number}": f"{number} ".encode() * 500 for number in range(60)}


@contextmanager
def node_on(disk: Path, base: Path, registry: Registry) -> Iterator[Node]:
    """A node whose root directory is on that disk."""
    base.mkdir()
    (disk / "root").mkdir(exist_ok=True)
    (base / "root").symlink_to(disk / "root")
    with Daemon(base, settings=SETTINGS) as daemon:
        yield Node(daemon, f"{registry.url}/tests/busybox:1")


def other(node: Node) -> str:
    """The second image, which shares a layer with the first."""
    return node.image.replace(":1", ":2")


def fingerprint(layer: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, size and content of all that is below a layer's directory."""
    found = {}
    for path in sorted(layer.rglob("*")):
        status = path.lstat()
        content = ""
        if stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            content = str(path.readlink())
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        found[str(path.relative_to(layer))] = (status.st_mode, size, content)
    return found


def layers(root: Path) -> dict[str, dict[str, tuple[int, int, str]]]:
    """All that are there under their own names."""
    return {path.name: fingerprint(path) for path in (root / "layers").iterdir() if len(path.name) >= 64}


def work(node: Node, known: dict[str, dict[str, tuple[int, int, str]]]) -> None:
    """Pulls, one beside another, pods and containers, and removals. `known`: the layers as they should be."""
    second = threading.Thread(target=node.pull, args=(other(node),))
    second.start()
    node.pull()
    pod = node.run_pod("before")
    container = node.start(node.create(pod, "main", "sh", "-c", "exit 3"))
    second.join()
    known.update(layers(node.daemon.root))
    node.wait(container)
    node.start(node.create(pod, "goes-on", "sleep", "1000"))
    node.remove_image(other(node))
    node.run_pod("beside")
    node.pull(other(node))
    node.remove_all()


def whole(node: Node, known: dict[str, dict[str, tuple[int, int, str]]]) -> int:
    """Everything that the daemon speaks of is there, and is what it should be; how many images and pods there are."""
    root, client = node.daemon.root, node.daemon.client
    with closing(sqlite3.connect(f"file:{root / 'state.db'}?mode=ro", uri=True)) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    for blob in (root / "blobs/sha256").iterdir():
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    for name, found in layers(root).items():
        assert found == known[name], f"layer {name} is not what it was"
    images = client.call(client.images.ListImages, pb.ListImagesRequest()).images
    for finding in client.stream(client.tare.Verify, tare_pb2.VerifyRequest()):
        assert not finding.trouble, finding
    for pod in client.pods():
        assert (pod.state, pod.metadata.namespace) == (pb.SANDBOX_NOTREADY, "tests")
    for record in client.containers():
        status = node.status(record.id)
        assert status.state in (pb.CONTAINER_CREATED, pb.CONTAINER_EXITED) and status.image_ref
        assert status.state == pb.CONTAINER_CREATED or (status.exit_code, status.reason) in (
            (3, "Error"),
            (255, "Unknown"),
        )
    return len(images) + len(client.pods())


def goes_on(node: Node) -> None:
    """What was there can be removed, and what was not can be had again."""
    node.remove_all()
    node.pull()
    node.pull(other(node))
    pod = node.run_pod("after")
    container = node.start(node.create(pod, "main", "sh", "-c", "echo here; exit 5"))
    assert node.wait(container).exit_code == 5
    assert node.log(container) == ["here"]
    node.remove_all()
    for image in (node.image, other(node)):
        node.remove_image(image)
    assert node.settled() == []
    assert not any(
        path for name in ("blobs/sha256", "layers", "ingest") for path in (node.daemon.root / name).glob("*")
    )


def places(disk: Disk, begin: int, end: int, chance: random.Random) -> list[int]:
    """Where the power goes: spread over all of the time, at random within each part."""
    width = (end - begin) / CUTS
    return [begin + int((number + chance.random()) * width) for number in range(CUTS)]


@pytest.mark.timeout(120 + 60 * CUTS)
def test_the_power_goes(capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("TARE_POWER_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
    known: dict[str, dict[str, tuple[int, int, str]]] = {}
    with tempfile.TemporaryDirectory(prefix="tare-power-", dir="/var/lib") as name:
        base = Path(name)
        with Registry(base / "registry") as registry:
            registry.push(busybox_image(base / "busybox"), "tests/busybox:1")
            registry.push(
                busybox_image(base / "other", extra=[FILES, {"noise": os.urandom(6 << 20)}]), "tests/busybox:2"
            )
            with logged_disk(base, MEGABYTES) as disk, node_on(disk.point, base / "a", registry) as node:
                begin = disk.now()
                work(node, known)
                end = disk.now()
            told = []
            for number, at in enumerate(places(disk, begin, end, random.Random(seed))):
                doubtful = cut(disk, at, f"{seed}-{number}", base / "cut")
                with mounted(base / "cut", disk.point), node_on(disk.point, base / f"c{number}", registry) as node:
                    told.append(f"{doubtful} blocks, {whole(node, known)} things")
                    goes_on(node)
            with capsys.disabled():
                print(f"\npower: TARE_POWER_SEED={seed}, {(end - begin) >> 10} KiB written: {'; '.join(told)}")
