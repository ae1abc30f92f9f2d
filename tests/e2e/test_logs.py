"""Container logs as a kubelet reads them: the format, long lines, rotation under load, a disk that is full and one that is slow."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tare.cri.v1 import api_pb2 as pb
from tare.launch import linux
from tests.support.node import WAIT_SECONDS, Node, busy_node

pytestmark = pytest.mark.root
MIB = 1 << 20
MAX_LINE = 1000
# Kubernetes' CRI log format: RFC 3339 with nanoseconds, stream, tag (P: the line goes on), text.
RECORD = re.compile(
    rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}(?:Z|[+-]\d\d:\d\d)) (stdout|stderr) ([FP]) (.*)\n", re.DOTALL
)


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node(
        "logs", settings=f"[runtime]\nmax_log_line = {MAX_LINE}\n[metrics]\naddress = '127.0.0.1:0'\n"
    ) as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


def records(*paths: Path) -> list[tuple[bytes, bytes, bytes, bytes]]:
    """(time, stream, tag, text) of every record in files that follow each other."""
    found = []
    for line in b"".join(path.read_bytes() for path in paths).splitlines(keepends=True):
        match = RECORD.fullmatch(line)
        assert match is not None, line[:200]
        found.append((match[1], match[2], match[3], match[4]))
    return found


def lines(stream: bytes, *paths: Path) -> list[bytes]:
    """One stream's lines, those in parts put together."""
    whole, open_line = [], b""
    for _, name, tag, text in records(*paths):
        if name == stream:
            open_line += text
            if tag == b"F":
                whole.append(open_line)
                open_line = b""
    assert open_line == b""
    return whole


def log_of(node: Node, container: str) -> Path:
    """Where its log is."""
    return Path(node.status(container).log_path)


def until(done: Callable[[], object]) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_line_of_a_megabyte_comes_in_parts_and_is_whole_again(node: Node) -> None:
    script = "head -c 1048576 /dev/zero | tr '\\0' x; echo; echo after; printf open"
    container = node.start(node.create(node.run_pod("long"), "main", "sh", "-c", script))
    node.wait(container)
    found = records(log_of(node, container))
    assert max(len(text) for *_, text in found) == MAX_LINE
    assert sum(tag == b"P" for _, _, tag, _ in found) >= MIB // MAX_LINE
    assert [at for at, *_ in found] == sorted(at for at, *_ in found)
    assert lines(b"stdout", log_of(node, container)) == [b"x" * MIB, b"after", b"open"]


def test_each_stream_keeps_its_order(node: Node) -> None:
    script = "for n in $(seq 300); do echo out $n; echo err $n >&2; done"
    container = node.start(node.create(node.run_pod("order"), "main", "sh", "-c", script))
    node.wait(container)
    path = log_of(node, container)
    assert lines(b"stdout", path) == [b"out %d" % number for number in range(1, 301)]
    assert lines(b"stderr", path) == [b"err %d" % number for number in range(1, 301)]


def test_what_was_written_last_is_in_the_log_when_the_end_is_known(node: Node) -> None:
    pod = node.run_pod("drain")
    for attempt in range(5):
        config = node.container_config("main", "sh", "-c", "seq 1 20000; echo last", attempt=attempt)
        container = node.start(node.create(pod, config))
        node.wait(container)
        assert lines(b"stdout", log_of(node, container))[-2:] == [b"20000", b"last"]


def test_rotation_under_load_loses_and_splits_no_line(node: Node) -> None:
    count = 600_000
    container = node.start(node.create(node.run_pod("rotate"), "main", "seq", "1", str(count)))
    path, rotated = log_of(node, container), []
    client = node.daemon.client
    request = pb.ReopenContainerLogRequest(container_id=container)
    for number in range(1, 6):
        until(lambda: path.stat().st_size > MIB or node.status(container).state == pb.CONTAINER_EXITED)
        if node.status(container).state == pb.CONTAINER_EXITED:
            break
        rotated.append(path.rename(path.with_suffix(f".{number}")))
        client.call(client.runtime.ReopenContainerLog, request)
        assert path.exists()
    node.wait(container)
    assert len(rotated) >= 3, "the writer was done too soon for this to show anything"
    assert lines(b"stdout", *rotated, path) == [b"%d" % number for number in range(1, count + 1)]
    assert all(file.read_bytes().endswith(b"\n") for file in rotated)  # no record is in two files
    node.refused("FAILED_PRECONDITION", "EXITED", client.call, client.runtime.ReopenContainerLog, request)


def test_a_full_disk_drops_lines_and_says_so_once_there_is_room(node: Node) -> None:
    disk = node.logs / "full"
    disk.mkdir(parents=True)
    linux.mount(b"tare-test", os.fsencode(disk), b"tmpfs", 0, b"size=512k")
    try:
        script = "echo first; while [ ! -e /go/on ]; do sleep 0.05; done; seq 1 40000; echo done > /go/done; sleep 1000"
        go = node.daemon.base / "go-full"
        go.mkdir()
        mount = pb.Mount(container_path="/go", host_path=str(go))
        pod = node.run_pod("full")
        container = node.start(node.create(pod, node.container_config("main", "sh", "-c", script, mounts=[mount])))
        node.wait_for_log(container, "first")
        filler = disk / "filler"
        with filler.open("wb") as file, pytest.raises(OSError, match="No space"):
            while True:
                os.write(file.fileno(), bytes(4096))
        (go / "on").touch()
        until((go / "done").exists)  # a full disk holds up no writer
        assert node.exec(container, "echo", "alive").stdout == b"alive\n"
        path = log_of(node, container)
        assert lines(b"stdout", path) == [b"first"]
        filler.unlink()
        marker = re.compile(rb"\[tare: (\d+) lines? of output dropped here: No space left on device\]")
        until(lambda: marker.search(path.read_bytes()))
        node.stop(container, 0)
        after = lines(b"stdout", path)[1:]
        told = [int(match[1]) for match in map(marker.fullmatch, after) if match]
        assert len(told) == 1
        assert told[0] + len(after) - 1 == 40000
    finally:
        node.remove_all()
        linux.umount(os.fsencode(disk), linux.MNT_DETACH)


def test_a_disk_that_is_slow_presses_back_on_the_writer_and_on_nobody_else(node: Node) -> None:
    go = node.daemon.base / "go-slow"
    go.mkdir()
    mount = pb.Mount(container_path="/go", host_path=str(go))
    script = "echo first; while [ ! -e /go/on ]; do sleep 0.05; done; seq 1 200000; echo done > /go/done"
    pod = node.run_pod("slow")
    container = node.start(node.create(pod, node.container_config("main", "sh", "-c", script, mounts=[mount])))
    node.wait_for_log(container, "first")
    # A logger that waits for its disk is one that does not go on: stopped, it is the same.
    (group,) = (node.daemon.run / "loggers").iterdir()
    logger = int((group / "pid").read_text().split()[0])
    os.kill(logger, signal.SIGSTOP)
    try:
        (go / "on").touch()
        writer = '[ "$(cat /proc/$(pidof seq)/wchan 2>/dev/null)" ] && cat /proc/$(pidof seq)/wchan'
        until(lambda: b"pipe" in node.exec(container, "sh", "-c", writer).stdout)  # others go on: this is an exec
        assert node.run_pod("other")
        assert not (go / "done").exists()
    finally:
        os.kill(logger, signal.SIGCONT)
    node.wait(container)
    assert (go / "done").exists()
    assert lines(b"stdout", log_of(node, container))[1:] == [b"%d" % number for number in range(1, 200_001)]


def test_without_a_log_path_nothing_is_written_and_nobody_waits(node: Node) -> None:
    config = node.container_config("main", "sh", "-c", "seq 1 100000")
    config.log_path = ""
    container = node.start(node.create(node.run_pod("quiet"), config))
    assert node.wait(container).exit_code == 0
    assert node.status(container).log_path == ""
