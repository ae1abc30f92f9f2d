"""Sessions whose other parts die in the middle or are slow at the end, the daemon's own end, and what thousands of sessions leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.e2e.test_streaming import (
    SECONDS,
    Session,
    attach_url,
    exec_url,
    execute,
    inside,
    memory,
    tare,
    terminal,
    until,
)
from tests.support import leaks
from tests.support.certificates import self_signed
from tests.support.node import Node, busy_node
from tests.support.spdy_client import SpdyClient

pytestmark = pytest.mark.root
COUNTING = ("sh", "-c", "while :; do echo $((i+=1)); sleep 0.02; done")


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("faults", settings="[streaming]\nhangup_grace = 1.0\norphan_grace = 1.5\n") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    if not shared.daemon.answers():
        shared.daemon.start()
    shared.remove_all()
    assert shared.settled() == []


def container(node: Node, name: str, *command: str) -> str:
    return node.start(node.create(node.run_pod(name), name, *command))


def pids(node: Node, name: str) -> list[int]:
    """The instance's processes of that name."""
    run = str(node.daemon.run)
    return [process.pid for process in leaks.processes() if process.name == name and run in process.command.split(" ")]


def descriptors(node: Node) -> int:
    assert node.daemon.process is not None
    return len(os.listdir(f"/proc/{node.daemon.process.pid}/fd"))


def counts(node: Node, box: str) -> None:
    """Its log has every number."""
    logged = [int(line) for line in node.log(box)]
    assert logged == list(range(1, logged[-1] + 1))


def test_what_a_command_said_last_reaches_the_slowest_client(node: Node) -> None:
    """It has ended long before its client takes the rest, which is in pipes and sockets then."""
    box = container(node, "box", "sleep", "1000")
    for tty in (False, True):
        command = ("sh", "-c", "head -c 8000000 /dev/zero | tr '\\0' x; echo; echo last")
        url = exec_url(node, box, *command, stdout=True, stderr=not tty, tty=tty)
        session = Session(url, "stdout", *(["resize"] if tty else ["stderr"]))
        session.client.step()
        while len(session.said("stdout")) < 7_000_000:
            session.client.step()
        time.sleep(1.5)
        session.client.run()
        said = session.said("stdout").replace(b"\r", b"")
        assert said.endswith(b"\nlast\n")
        assert len(said) == 8_000_000 + len(b"\nlast\n")


def test_a_logger_that_dies_is_told_and_the_next_attach_works(node: Node) -> None:
    box = container(node, "count", *COUNTING)
    session = Session(attach_url(node, box, stdout=True), "stdout")
    session.until("stdout", b"\n")
    (logger,) = pids(node, "tare-logger")
    os.kill(logger, signal.SIGKILL)
    session.client.run()
    message = json.loads(session.said("error"))["message"]
    assert "what copies the container's output was lost" in message
    again = Session(attach_url(node, box, stdout=True), "stdout")
    again.until("stdout", b"\n")
    heard = int(again.said("stdout").split()[0])
    again.until("stdout", b"%d\n" % (heard + 20))
    again.client.close()
    assert node.status(box).state == pb.CONTAINER_RUNNING
    counts(node, box)


@pytest.mark.parametrize("victim", ["tare-launcher", "tare-keeper"])
def test_a_session_outlives_launcher_and_keeper(node: Node, victim: str) -> None:
    box = container(node, "box", "sleep", "1000")
    session = execute(node, box, "cat")
    session.send(b"before ")
    session.until("stdout", b"before ")
    for pid in pids(node, victim)[:1]:
        os.kill(pid, signal.SIGKILL)
    session.send(b"after", fin=True)
    session.until("stdout", b"before after")
    session.client.run()
    told = json.loads(session.said("error"))
    assert told["status"] == "Success" or "exit" in told["message"], told
    later = execute(node, box, "true")
    assert later.code() == 0


def test_the_daemons_end_is_told_to_sessions_and_does_not_wait_for_them(node: Node) -> None:
    box = container(node, "ending", *COUNTING)
    sessions = [
        execute(node, box, "sleep", "321"),
        terminal(node, box, "sleep", "321"),
        Session(attach_url(node, box, stdout=True), "stdout"),
    ]
    sessions[2].until("stdout", b"\n")
    until(lambda: inside(node, box, "ps").count("sleep 321") == 2)
    begin = time.monotonic()
    stopping = threading.Thread(target=node.daemon.stop)
    stopping.start()
    for session in sessions:
        session.client.run()
        assert json.loads(session.said("error"))["message"] == "the server ends"
    stopping.join()
    assert time.monotonic() - begin < 10
    node.daemon.start()
    assert node.status(box).state == pb.CONTAINER_RUNNING
    counts(node, box)


def test_a_pipe_that_ends_early_and_a_file_that_is_long(node: Node, tmp_path: Path) -> None:
    """The command line: `exec … | head` ends, and a file as standard input is not taken into memory whole."""
    box = container(node, "box", "sleep", "1000")
    endless = subprocess.Popen(tare(node, "exec", box, "yes"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert endless.stdout is not None
    endless.stdout.read(1000)
    endless.stdout.close()
    assert endless.wait(SECONDS) == 1
    assert endless.stderr is not None
    assert endless.stderr.read() == b""
    endless.stderr.close()
    until(lambda: "yes" not in inside(node, box, "ps"))  # which [streaming] orphan_grace sees to
    path = tmp_path / "long"
    path.touch()
    os.truncate(path, 96 << 20)
    with (
        path.open("rb") as file,
        subprocess.Popen(
            tare(node, "exec", "-i", box, "sh", "-c", "sleep 1; wc -c"), stdin=file, stdout=subprocess.PIPE
        ) as counting,
    ):
        time.sleep(0.9)
        resident = int(Path(f"/proc/{counting.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        assert counting.stdout is not None
        assert counting.stdout.read().split() == [str(96 << 20).encode()]
    assert resident < 80 << 20


def test_tls_through_the_daemon(tmp_path: Path) -> None:
    made = self_signed(tmp_path)
    settings = f'[streaming]\ntls_cert = "{made.certificate}"\ntls_key = "{made.key}"\n'
    with busy_node("tls", settings=settings) as node:
        box = container(node, "box", "sleep", "1000")
        assert exec_url(node, box, "true", stdout=True).startswith("https://127.0.0.1:")
        done = subprocess.run(tare(node, "exec", box, "echo", "hi"), capture_output=True, timeout=30, check=False)
        assert (done.returncode, done.stdout) == (0, b"hi\n")
        assert node.daemon.stop()
        (node.daemon.run / "streaming.sock").unlink()  # so that the command line has the URL alone
        node.daemon.start()
        (node.daemon.run / "streaming.sock").unlink()
        command = tare(node, "exec", "-i", box, "cat")
        environment = {**os.environ, "SSL_CERT_FILE": str(made.certificate)}
        sent = os.urandom(3 << 20)
        done = subprocess.run(command, input=sent, capture_output=True, env=environment, timeout=60, check=False)
        assert (done.returncode, done.stdout == sent) == (0, True), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_thousands_of_sessions_leave_nothing(node: Node) -> None:
    box = container(node, "ticking", "sh", "-c", "while :; do echo tick; sleep 0.2; done")

    def executed() -> None:
        client = SpdyClient.connect(exec_url(node, box, "true", stdout=True), ["v4.channel.k8s.io"])
        for name in ("error", "stdout"):
            client.open({"streamType": name})
        client.run()

    def attached() -> None:
        client = SpdyClient.connect(attach_url(node, box, stdout=True), ["v4.channel.k8s.io"])
        streams = [client.open({"streamType": name}) for name in ("error", "stdout")]
        while streams[1] not in client.accepted:
            client.step()
        client.close()

    def measured() -> tuple[int, int]:
        until(lambda: descriptors(node) < 200)
        time.sleep(1.0)
        return memory(node), descriptors(node)

    for work in (executed, attached):
        for _ in range(500):
            work()
        resident, fds = measured()
        for _ in range(1000):
            work()
        later, fds_later = measured()
        assert fds_later <= fds + 2
        assert later < resident + (8 << 20)  # what the collector of cycles has not come to yet is about half of this
