"""Exec and attach with the WebSocket client of Kubernetes' own Python package, which decodes the channels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes.client import Configuration
from kubernetes.stream.ws_client import WSClient

from tests.e2e.test_streaming import attach_url, exec_url
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root
SECONDS = 20
STDOUT, STDERR, RESIZE = 1, 2, 4


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with busy_node("wsclient") as made:
        yield made


@pytest.fixture(scope="module")
def box(node: Node) -> str:
    """A container that only sleeps."""
    return node.start(node.create(node.run_pod("box"), "box", "sleep", "1000"))


def joined(url: str, *, binary: bool = False) -> Any:
    """A client of that package, which has no types."""
    return WSClient(  # type: ignore[no-untyped-call]
        Configuration(), url.replace("http", "ws", 1), {}, capture_all=False, binary=binary
    )


def test_an_exec(node: Node, box: str) -> None:
    url = exec_url(
        node, box, "sh", "-c", "read x; echo $x; echo wrong >&2; exit 4", stdin=True, stdout=True, stderr=True
    )
    client = joined(url)
    client.write_stdin("words\n")
    client.run_forever(timeout=SECONDS)
    assert (client.read_stdout(), client.read_stderr(), client.returncode) == ("words\n", "wrong\n", 4)
    client.sock.shutdown()  # its own close leaves the socket open once it is over


def test_bytes_both_ways(node: Node, box: str) -> None:
    client = joined(exec_url(node, box, "head", "-c", "3000000", stdin=True, stdout=True, stderr=True), binary=True)
    sent = bytes(range(256)) * 12_000
    heard = b""
    for at in range(0, len(sent), 100_000):
        client.write_stdin(sent[at : at + 100_000])
        heard += client.read_channel(STDOUT)
    client.run_forever(timeout=SECONDS)
    heard += client.read_channel(STDOUT)
    assert heard == sent[:3_000_000]
    client.sock.shutdown()


def test_a_terminal_that_is_resized(node: Node, box: str) -> None:
    command = ("sh", "-c", "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.1; done")
    client = joined(exec_url(node, box, *command, stdin=True, stdout=True, tty=True))
    assert client.readline_stdout(timeout=SECONDS) == "ready\r"
    client.write_channel(RESIZE, '{"Width": 91, "Height": 17}')
    client.run_forever(timeout=SECONDS)
    assert client.read_stdout() == "17 91\r\n"
    assert client.returncode == 0
    client.sock.shutdown()


def test_an_attach(node: Node) -> None:
    config = node.container_config("shell", "sh", stdin=True)
    container = node.start(node.create(node.run_pod("shell"), config))
    client = joined(attach_url(node, container, stdin=True, stdout=True, stderr=True))
    client.write_stdin("echo $((6*7)); echo wrong >&2; exit 2\n")
    client.run_forever(timeout=SECONDS)
    assert (client.read_stdout(), client.read_stderr(), client.returncode) == ("42\n", "wrong\n", 0)
    assert node.wait(container).exit_code == 2
    client.sock.shutdown()
