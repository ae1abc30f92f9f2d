"""`tare run -i`, `-t`, `-it`, and what is under it: a client that attaches to a container before that starts."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.e2e.test_streaming import attach_url
from tests.e2e.test_streaming_clients import joined
from tests.support.node import Node, busy_node
from tests.support.terminal import Terminal

pytestmark = pytest.mark.root
SECONDS = 30


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("runit") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


def tare(node: Node, *arguments: str) -> list[str]:
    logs = f"--log-dir={node.daemon.base}/logs"
    return [sys.executable, "-m", "tare.cli.main", f"--socket={node.daemon.socket}", "run", logs, *arguments]


def run(node: Node, *arguments: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = tare(node, *arguments)
    return subprocess.run(command, input=given, capture_output=True, timeout=SECONDS, check=False)


def test_bytes_in_and_out(node: Node) -> None:
    given = os.urandom(3 << 20)
    done = run(node, "-i", node.image, "sh", "-c", "cat; echo wrong >&2; exit 9", given=given)
    assert (done.returncode, done.stderr) == (9, b"wrong\n")
    assert done.stdout == given
    done = run(node, "-i", node.image, "sha256sum", given=given)
    assert (done.returncode, done.stdout) == (0, f"{hashlib.sha256(given).hexdigest()}  -\n".encode())


def test_one_that_reads_nothing_and_is_over_at_once(node: Node) -> None:
    for number in range(5):
        done = run(node, "-i", node.image, "sh", "-c", f"echo {number}; exit {number}", given=b"x" * 100_000)
        assert (done.returncode, done.stdout, done.stderr) == (number, f"{number}\n".encode(), b"")


def test_a_shell(node: Node) -> None:
    """Its first prompt is there, though it was written at once."""
    shell = Terminal(tare(node, "-it", node.image, "sh"))
    shell.until(b"# ")
    os.write(shell.master, b"tty; echo $((6*7)); exit 5\n")
    shell.until(b"/dev/pts/0")
    shell.until(b"42")
    assert shell.close() == 5


def test_ctrl_c_is_the_containers(node: Node) -> None:
    shell = Terminal(tare(node, "-it", node.image, "sh", "-c", "trap 'echo caught; exit 6' INT; echo up; sleep 1000"))
    shell.until(b"up")
    os.write(shell.master, b"\x03")
    shell.until(b"caught")
    assert shell.close() == 6


def test_the_detach_keys_leave_it_running(node: Node) -> None:
    shell = Terminal(tare(node, "-it", "--name=left", node.image, "sh"))
    shell.until(b"# ")
    os.write(shell.master, b"\x10\x11")
    assert shell.close() == 0
    client = node.daemon.client
    [container] = client.call(client.runtime.ListContainers, pb.ListContainersRequest()).containers
    assert container.state == pb.CONTAINER_RUNNING
    assert node.exec(container.id, "echo", "here").stdout == b"here\n"


def test_a_terminal_without_input(node: Node) -> None:
    done = run(node, "-t", node.image, "sh", "-c", "test -t 1 && echo yes")
    assert (done.returncode, done.stdout) == (0, b"yes\r\n")


def test_what_cannot_start(node: Node) -> None:
    done = run(node, "-i", node.image, "/nothing")
    assert (done.returncode, done.stdout) == (125, b""), done.stderr
    assert b"/nothing: No such file or directory" in done.stderr
    done = run(node, "-it", node.image, "sh")
    assert done.returncode == 125 and b"standard input is none" in done.stderr


def test_a_signal_stops_it(node: Node) -> None:
    """With words on the way there: it traps the signal that stops it."""
    script = "trap 'echo told; exit 3' TERM; echo up; while :; do sleep 0.1; done"
    process = subprocess.Popen(tare(node, "-i", node.image, "sh", "-c", script), stdin=subprocess.PIPE, stdout=-1)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    with process.stdin, process.stdout:
        assert process.stdout.read() == b"told\n"
        assert process.wait(SECONDS) == 3


def test_attached_before_it_starts(node: Node) -> None:
    """Several clients; each hears all of it, though it is over at once."""
    config = node.container_config("early", "sh", "-c", "echo first; echo second >&2")
    container = node.create(node.run_pod("early"), config)
    clients = [joined(attach_url(node, container, stdout=True, stderr=True)) for _ in range(3)]
    for client in clients:
        assert client.read_channel(1, timeout=SECONDS) == ""  # all is ready
    node.start(container)
    for client in clients:
        client.run_forever(timeout=SECONDS)
        assert (client.read_stdout(), client.read_stderr(), client.returncode) == ("first\n", "second\n", 0)
        client.sock.shutdown()
    assert len(node.log(container)) == 2


def test_who_waits_for_what_is_removed_is_told(node: Node) -> None:
    container = node.create(node.run_pod("never"), "never", "true")
    client = joined(attach_url(node, container, stdout=True, stderr=True))
    assert client.read_channel(1, timeout=SECONDS) == ""
    node.remove(container)
    client.run_forever(timeout=SECONDS)
    with pytest.raises(ValueError, match="it did not start"):
        assert client.returncode is None
    client.sock.shutdown()


def test_who_has_left_holds_up_no_start(node: Node) -> None:
    container = node.create(node.run_pod("gone"), "gone", "sleep", "1000")
    client = joined(attach_url(node, container, stdout=True, stderr=True))
    assert client.read_channel(1, timeout=SECONDS) == ""
    client.sock.shutdown()
    before = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(node.start, container).result(SECONDS)
    assert time.monotonic() - before < 5
    assert node.exec(container, "echo", "runs").stdout == b"runs\n"
