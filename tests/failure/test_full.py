"""A disk without a byte, without an inode, without writing: what runs goes on, what is there can be removed, and the error says what it is."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tare.state.database import Database
from tare.state.file import BEGINS, DiskFull
from tare.storage.ballast import Ballast
from tests.support.daemon import Daemon
from tests.support.disks import fill_bytes, fill_inodes, go_read_only, go_writable, small_disk
from tests.support.images import busybox_image
from tests.support.node import Node
from tests.support.registry import Registry

pytestmark = pytest.mark.root
MEGABYTES = 96


@contextmanager
def node_on(disk: Path) -> Iterator[Node]:
    """A node whose root directory is on that disk, and nothing else of it."""
    with tempfile.TemporaryDirectory(prefix="tare-full-", dir="/var/lib") as name:
        base = Path(name)
        daemon = Daemon(base / "tare", settings="[images]\ndisk_reserve = 0\n")
        daemon.base.mkdir()
        (disk / "root").mkdir()
        daemon.root.symlink_to(disk / "root")
        with Registry(base / "registry") as registry, daemon:
            registry.push(busybox_image(base / "busybox"), "tests/busybox:1")
            node = Node(daemon, f"{registry.url}/tests/busybox:1")
            node.pull()
            yield node


def failure(call: object, *arguments: object) -> CallFailed:
    """What a call fails with."""
    assert callable(call)
    with pytest.raises(CallFailed) as caught:
        call(*arguments)
    return caught.value


def goes_on(node: Node, container: str) -> None:
    """All that can be asked about a container that runs is answered."""
    assert node.status(container).state == pb.CONTAINER_RUNNING
    assert container in [item.id for item in node.daemon.client.containers()]
    assert node.exec(container, "echo", "here").stdout == b"here\n"
    assert "beginning" in node.log(container)


def begin(node: Node, name: str = "goes-on") -> tuple[str, str]:
    """A pod and a container that runs and has said something."""
    pod = node.run_pod(name)
    container = node.start(
        node.create(pod, "main", "sh", "-c", "echo beginning; trap 'exit 4' TERM; sleep 1000 & wait")
    )
    node.wait_for_log(container, "beginning")
    return pod, container


@pytest.mark.parametrize("kind", ["bytes", "inodes"])
def test_a_disk_that_is_full(kind: str) -> None:
    """Nothing new can be made, which costs the ballast nothing; the daemon starts; all can be ended and removed; then the ballast is back."""
    with small_disk(MEGABYTES, inodes=3000 if kind == "inodes" else 0) as disk, node_on(disk) as node:
        ballast = node.daemon.root / "ballast"
        assert ballast.stat().st_size == 4 << 20
        pod, container = begin(node)
        other = node.create(pod, "other", "true")
        filler = (fill_bytes if kind == "bytes" else fill_inodes)(disk)
        words = "KiB left of" if kind == "bytes" else "no inode left of"
        error = failure(node.create, pod, "new", "true")
        assert (error.status, words in str(error), str(disk) in str(error)) == ("RESOURCE_EXHAUSTED", True, True), error
        assert ballast.exists()
        goes_on(node, container)
        node.daemon.kill()
        node.daemon.start()
        goes_on(node, container)
        if kind == "bytes":
            fill_bytes(disk)
            assert os.statvfs(disk).f_bavail == 0
        node.remove(other)
        node.stop(container)
        assert node.wait(container).exit_code == 4
        node.remove(container)
        node.stop_pod(pod)
        node.remove_pod(pod)
        node.remove_image()
        assert not list((node.daemon.root / "layers").glob("[0-9a-f]*"))
        remove(filler)
        node.daemon.kill()
        node.daemon.start()
        assert ballast.stat().st_size == 4 << 20
        node.pull()
        _, container = begin(node, "afterwards")
        goes_on(node, container)


def remove(filler: Path) -> None:
    """What has filled the disk."""
    for path in filler.iterdir() if filler.is_dir() else [filler]:
        path.unlink()


def test_many_removals_on_a_full_disk() -> None:
    """More than the ballast by itself would be good for, each on record at once."""
    with small_disk(MEGABYTES) as disk, node_on(disk) as node:
        pods = [begin(node, f"pod-{number}") for number in range(6)]
        fill_bytes(disk)
        for pod, container in pods:
            node.stop(container, 0)
            fill_bytes(disk)  # whatever came free is used by somebody else
            node.remove(container)
            fill_bytes(disk)
            node.stop_pod(pod)
            node.remove_pod(pod)
        assert node.daemon.client.pods() == []
        node.daemon.kill()
        node.daemon.start()
        assert node.daemon.client.pods() == []


def test_a_file_system_that_becomes_read_only() -> None:
    """What runs is served, by this daemon and by the next; what ends is on record, also once the disk can be written again."""
    with small_disk(MEGABYTES) as disk, node_on(disk) as node:
        pod, container = begin(node)
        second, brief = begin(node, "brief")
        go_read_only(disk)
        goes_on(node, container)
        node.stop(brief)
        assert node.wait(brief).exit_code == 4
        error = failure(node.create, pod, "new", "true")
        assert (error.status, "read-only" in str(error), str(disk) in str(error)) == (
            "RESOURCE_EXHAUSTED",
            True,
            True,
        ), error
        node.daemon.kill()
        node.daemon.start()
        goes_on(node, container)
        assert node.status(brief).exit_code == 4
        node.stop(container)
        assert node.wait(container).exit_code == 4
        node.stop_pod(second)
        node.daemon.kill()
        go_writable(disk)
        node.daemon.start()
        assert [node.status(item).exit_code for item in (container, brief)] == [4, 4]
        assert not (node.daemon.run / "state.db").exists(), node.daemon.told()
        for one in (pod, second):
            node.remove_pod(one)
        _, container = begin(node, "afterwards")
        goes_on(node, container)


def test_the_file_is_used_again_as_soon_as_it_can_be() -> None:
    """By the daemon that has gone away from it."""
    with small_disk(16) as disk, tempfile.TemporaryDirectory() as refuge:
        path, copy = disk / "state.db", Path(refuge, "state.db")
        database = Database(path, refuge=copy)
        table = database.table("things", str)
        table.put("before", "kept")
        go_read_only(disk)
        table.put("meanwhile", "kept too")
        with database.transaction():
            table.put("one", "1")
            table.put("two", "2")
        assert (database.path, table.get("before"), table.get("two")) == (copy, "kept", "2")
        go_writable(disk)
        database.look_after()
        assert (database.path, table.get("meanwhile"), copy.exists()) == (path, "kept too", False)
        table.put("after", "3")
        database.close()
        again = Database(path)
        assert [key for key, _ in again.table("things", str).items()] == ["after", "before", "meanwhile", "one", "two"]
        again.close()


def test_a_transaction_that_does_not_fit_is_whole_or_refused() -> None:
    """Without relief it is refused and nothing of it is there; with it all of it is."""
    with small_disk(48) as disk:
        ballast = Ballast(disk, 8 << 20)
        ballast.keep()
        database = Database(disk / "state.db", ballast.give_up)
        table = database.table("things", str)
        fill_bytes(disk)
        beginning = BEGINS.set(True)
        with pytest.raises(DiskFull), database.transaction():
            for number in range(400):
                table.put(str(number), "x" * 8192)
        BEGINS.reset(beginning)
        assert (table.items(), (disk / "ballast").exists()) == ([], True)
        with database.transaction():
            for number in range(400):
                table.put(str(number), "x" * 8192)
        assert (len(table.items()), (disk / "ballast").exists()) == (400, False)
        database.close()
