"""Exec, attach and cp where the container is another runtime's: runc's, and our own behind runc's command line."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.e2e.test_streaming import Session, attach_url, execute, inside, tare, terminal, until
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root
OURS = Path(__file__).parents[2] / ".venv/bin/tare-oci"
PROGRAMS = {"runc": shutil.which("runc"), "tare": str(OURS)}
SETTINGS = "[streaming]\nhangup_grace = 1.0\n" + "".join(
    f'[runtime.handlers.{name}]\ntype = "oci"\npath = "{path}"\n' for name, path in PROGRAMS.items()
)


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("strhand", settings=SETTINGS) as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


@pytest.fixture(params=sorted(PROGRAMS))
def handler(request: pytest.FixtureRequest) -> str:
    """Each handler's name."""
    return str(request.param)


@pytest.fixture
def box(node: Node, handler: str) -> str:
    """A container that only sleeps."""
    return node.start(node.create(node.run_pod("box", handler=handler), "box", "sleep", "1000"))


def test_an_exec_without_a_terminal(node: Node, box: str) -> None:
    session = execute(node, box, "sh", "-c", "cat; echo wrong >&2; exit 3")
    sent = os.urandom(1 << 20)
    session.send(sent, fin=True)
    assert session.code() == 3
    assert (session.said("stdout") == sent, session.said("stderr")) == (True, b"wrong\n")


def test_an_exec_with_a_terminal(node: Node, box: str) -> None:
    session = terminal(node, box, "sh", "-c", "tty; stty size; read x; stty size; echo got-$x; exit 6")
    session.resize(101, 33)
    session.until("stdout", b"33 101")
    session.resize(55, 22)
    session.send(b"key\n")
    session.until("stdout", b"got-key")
    assert session.code() == 6
    assert b"22 55" in session.said("stdout")


def test_a_client_that_vanishes_from_a_terminal(node: Node, box: str) -> None:
    session = terminal(node, box, "sh", "-c", "trap '' HUP; echo ready; while :; do sleep 0.123; done")
    session.until("stdout", b"ready")
    session.client.close()
    until(lambda: "0.123" not in inside(node, box, "ps"))
    assert node.status(box).state == pb.CONTAINER_RUNNING


@pytest.mark.parametrize("tty", [False, True])
def test_an_attach(node: Node, handler: str, tty: bool) -> None:
    config = node.container_config("shell", "sh", stdin=True, tty=tty)
    container = node.start(node.create(node.run_pod("shell", handler=handler), config))
    url = attach_url(node, container, stdin=True, stdout=True, stderr=not tty, tty=tty)
    session = Session(url, "stdin", "stdout", "resize" if tty else "stderr")
    session.send(b"echo $((6*7)); exit 4\n")
    session.until("stdout", b"42")
    assert session.code() == 0
    assert node.wait(container).exit_code == 4


def test_files_go_in_and_out(node: Node, box: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("words")
    for words in ((str(tmp_path / "file"), f"{box}:/tmp/there"), (f"{box}:/tmp/there", str(tmp_path / "back"))):
        subprocess.run(tare(node, "cp", *words), check=True, timeout=30)
    assert (tmp_path / "back").read_text() == "words"
