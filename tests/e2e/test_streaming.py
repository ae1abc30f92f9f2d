"""Exec, attach and port-forward through the daemon, with a client of SPDY that was written apart, and with the command line."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tare.runtime import netns
from tests.support.node import Node, busy_node
from tests.support.spdy_client import SpdyClient
from tests.support.terminal import Terminal

pytestmark = pytest.mark.root

V4 = ["v4.channel.k8s.io"]
SECONDS = 20.0
SETTINGS = "[streaming]\nhangup_grace = 1.0\n"


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("streaming", settings=SETTINGS) as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


@pytest.fixture
def box(node: Node) -> str:
    """A container that only sleeps."""
    return node.start(node.create(node.run_pod("box"), "box", "sleep", "1000"))


class Session:
    """An exec or attach with its streams by name."""

    def __init__(self, url: str, *names: str) -> None:
        self.client = SpdyClient.connect(url, V4)
        self.streams = {name: self.client.open({"streamType": name}) for name in ("error", *names)}

    def said(self, name: str) -> bytes:
        return bytes(self.client.data[self.streams[name]])

    def until(self, name: str, text: bytes) -> None:
        self.client.until(self.streams[name], text)

    def send(self, data: bytes, *, fin: bool = False) -> None:
        self.client.send(self.streams["stdin"], data, fin=fin)

    def resize(self, width: int, height: int) -> None:
        self.client.send(self.streams["resize"], json.dumps({"Width": width, "Height": height}).encode())

    def code(self) -> int:
        """The exit code, at the end."""
        self.client.run()
        told = json.loads(self.said("error"))
        if told["status"] == "Success":
            return 0
        assert told["reason"] == "NonZeroExitCode", told
        return int(told["details"]["causes"][0]["message"])


def exec_url(node: Node, container: str, *command: str, **streams: bool) -> str:
    request = pb.ExecRequest(container_id=container, cmd=command, **streams)
    return str(node.daemon.client.call(node.daemon.client.runtime.Exec, request).url)


def attach_url(node: Node, container: str, **streams: bool) -> str:
    return str(
        node.daemon.client.call(
            node.daemon.client.runtime.Attach, pb.AttachRequest(container_id=container, **streams)
        ).url
    )


def execute(node: Node, container: str, *command: str) -> Session:
    """With stdin, and stdout and stderr apart."""
    url = exec_url(node, container, *command, stdin=True, stdout=True, stderr=True)
    return Session(url, "stdin", "stdout", "stderr")


def terminal(node: Node, container: str, *command: str) -> Session:
    return Session(exec_url(node, container, *command, stdin=True, stdout=True, tty=True), "stdin", "stdout", "resize")


def inside(node: Node, container: str, *command: str) -> str:
    return node.exec(container, *command).stdout.decode()


def until(true: Callable[[], bool]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def memory(node: Node) -> int:
    """The daemon's resident bytes."""
    assert node.daemon.process is not None
    with open(f"/proc/{node.daemon.process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


# Exec


def test_streams_are_apart_and_the_code_is_the_commands(node: Node, box: str) -> None:
    session = execute(node, box, "sh", "-c", "cat; echo wrong >&2; exit 3")
    session.send(b"hello", fin=True)
    assert session.code() == 3
    assert (session.said("stdout"), session.said("stderr")) == (b"hello", b"wrong\n")


def test_a_command_that_is_not_there_is_told_in_words(node: Node, box: str) -> None:
    session = execute(node, box, "/no/such/thing")
    session.client.run()
    told = json.loads(session.said("error"))
    assert told["status"] == "Failure"
    assert "/no/such/thing" in told["message"]


def test_bytes_are_exact_whatever_their_pace(node: Node, box: str) -> None:
    chance = random.Random(7)
    sent = chance.randbytes(6 << 20)
    session = execute(node, box, "cat")

    def feed() -> None:
        at = 0
        while at < len(sent):
            size = chance.choice((1, 100, 5000, 70_000, 300_000))
            session.send(sent[at : at + size])
            at += size
            if chance.random() < 0.02:
                time.sleep(0.02)
        session.send(b"", fin=True)

    feeder = threading.Thread(target=feed)
    feeder.start()
    assert session.code() == 0
    feeder.join(SECONDS)
    assert hashlib.sha256(session.said("stdout")).digest() == hashlib.sha256(sent).digest()


def test_a_slow_client_holds_its_command_back_and_loses_nothing(node: Node, box: str) -> None:
    session = execute(node, box, "sh", "-c", "head -c 30000000 /dev/zero; echo done > /tmp/ended")
    before = memory(node)
    time.sleep(1.0)
    assert inside(node, box, "ls", "/tmp") == ""
    assert memory(node) < before + (16 << 20)
    assert session.code() == 0
    assert len(session.said("stdout")) == 30_000_000


def test_background_children_outlive_their_command(node: Node, box: str) -> None:
    session = execute(node, box, "sh", "-c", "sleep 555 & echo started")
    assert session.code() == 0
    assert session.said("stdout") == b"started\n"
    assert "sleep 555" in inside(node, box, "ps")


def test_a_terminal_has_a_size_before_its_command_begins_and_follows_it(node: Node, box: str) -> None:
    session = terminal(
        node, box, "sh", "-c", "trap 'stty size' WINCH; stty size; tty; until read x; do :; done; echo got-$x"
    )
    session.resize(111, 42)
    session.until("stdout", b"/dev/pts/")
    session.resize(50, 20)
    session.until("stdout", b"20 50")
    session.send(b"key\n")
    session.until("stdout", b"got-key")
    assert session.code() == 0


def test_a_client_that_vanishes_from_a_terminal_hangs_up(node: Node, box: str) -> None:
    polite = terminal(
        node, box, "sh", "-c", "trap 'echo hup > /tmp/hup; exit' HUP; echo ready; while :; do sleep 0.1; done"
    )
    deaf = terminal(node, box, "sh", "-c", "trap '' HUP; echo ready; while :; do sleep 0.123; done")
    for session in (polite, deaf):
        session.until("stdout", b"ready")
        session.client.close()
    until(lambda: inside(node, box, "cat", "/tmp/hup") == "hup\n")
    until(lambda: "0.123" not in inside(node, box, "ps"))


def test_a_client_that_vanishes_without_a_terminal_ends_the_input_alone(node: Node, box: str) -> None:
    session = execute(node, box, "sh", "-c", "echo ready; cat > /tmp/input; echo over > /tmp/over")
    session.until("stdout", b"ready")
    session.send(b"said")
    until(lambda: inside(node, box, "cat", "/tmp/input") == "said")
    session.client.close()
    until(lambda: inside(node, box, "cat", "/tmp/over") == "over\n")


@pytest.mark.parametrize(
    ("streams", "word"),
    [({}, "none of stdin"), ({"stdout": True, "stderr": True, "tty": True}, "stderr")],
)
def test_what_no_exec_can_have_is_refused(node: Node, box: str, streams: dict[str, bool], word: str) -> None:
    with pytest.raises(CallFailed, match=word) as refused:
        exec_url(node, box, "true", **streams)
    assert refused.value.status == "INVALID_ARGUMENT"


def test_an_exec_in_what_does_not_run_is_refused(node: Node) -> None:
    created = node.create(node.run_pod("idle"), "idle", "sleep", "1")
    with pytest.raises(CallFailed) as refused:
        exec_url(node, created, "true", stdout=True)
    assert refused.value.status == "FAILED_PRECONDITION"


# Attach


def test_several_clients_and_the_log_hear_the_same(node: Node) -> None:
    container = node.start(
        node.create(node.run_pod("many"), "many", "sh", "-c", "while :; do echo $((i+=1)); sleep 0.05; done")
    )
    first = Session(attach_url(node, container, stdout=True), "stdout")
    second = Session(attach_url(node, container, stdout=True), "stdout")
    first.until("stdout", b"\n")
    second.until("stdout", b"\n")
    first.client.close()
    heard = int(second.said("stdout").split()[-1])
    second.until("stdout", b"%d\n" % (heard + 20))
    numbers = [int(word) for word in second.said("stdout").split()]
    assert numbers == list(range(numbers[0], numbers[-1] + 1))
    second.client.close()
    node.wait_for_log(container, f"{numbers[-1] + 5}")
    logged = [int(line) for line in node.log(container)]
    assert logged == list(range(1, logged[-1] + 1))


def test_stdin_once_ends_with_its_first_client(node: Node) -> None:
    config = node.container_config("once", "sh", "-c", "cat; echo end", stdin=True, stdin_once=True)
    container = node.start(node.create(node.run_pod("once"), config))
    session = Session(attach_url(node, container, stdin=True, stdout=True, stderr=True), "stdin", "stdout", "stderr")
    session.send(b"typed\n")
    session.until("stdout", b"typed")
    session.send(b"", fin=True)
    assert session.code() == 0
    assert session.said("stdout") == b"typed\nend\n"
    assert node.wait(container).exit_code == 0


def test_stdin_that_is_not_once_waits_for_the_next(node: Node) -> None:
    config = node.container_config("often", "cat", stdin=True)
    container = node.start(node.create(node.run_pod("often"), config))
    for word in (b"one", b"two"):
        session = Session(attach_url(node, container, stdin=True, stdout=True), "stdin", "stdout")
        session.send(word, fin=True)
        session.until("stdout", word)
        session.client.close()
    assert node.status(container).state == pb.CONTAINER_RUNNING


def test_a_terminals_attach_resizes_it(node: Node) -> None:
    config = node.container_config("tty", "sh", stdin=True, tty=True)
    container = node.start(node.create(node.run_pod("tty"), config))
    session = Session(attach_url(node, container, stdin=True, stdout=True, tty=True), "stdin", "stdout", "resize")
    session.resize(77, 22)
    session.send(b"sleep 0.2; stty size\n")
    session.until("stdout", b"22 77")
    session.send(b"exit 3\n")
    assert session.code() == 0
    assert node.wait(container).exit_code == 3


def test_attaching_with_the_wrong_kind_of_stream_is_refused(node: Node, box: str) -> None:
    with pytest.raises(CallFailed, match="has no terminal"):
        attach_url(node, box, stdout=True, tty=True)


def test_the_daemon_may_be_killed_in_the_middle(node: Node) -> None:
    config = node.container_config("lasting", "sh", "-c", "while :; do echo $((i+=1)); sleep 0.02; done")
    container = node.start(node.create(node.run_pod("lasting"), config))
    session = Session(attach_url(node, container, stdout=True), "stdout")
    session.until("stdout", b"\n")
    node.daemon.kill()
    session.client.run()
    node.daemon.start()
    again = Session(attach_url(node, container, stdout=True), "stdout")
    again.until("stdout", b"\n")
    again.client.close()
    logged = [int(line) for line in node.log(container)]
    assert logged == list(range(1, logged[-1] + 1))


# Port-forward


def forward(node: Node, pod: str) -> SpdyClient:
    url = node.daemon.client.call(node.daemon.client.runtime.PortForward, pb.PortForwardRequest(pod_sandbox_id=pod)).url
    return SpdyClient.connect(url, ["portforward.k8s.io"])


def pair(client: SpdyClient, port: int, number: int) -> tuple[int, int]:
    head = {"port": str(port), "requestID": str(number)}
    return client.open({"streamType": "error", **head}), client.open({"streamType": "data", **head})


@contextmanager
def echo_in(node: Node, pod: str, address: str) -> Iterator[int]:
    """A server in a pod's network namespace that says what it hears, until its client says no more."""
    answer = node.daemon.client.call(
        node.daemon.client.runtime.PodSandboxStatus, pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    )
    namespace = Path(json.loads(answer.info["info"])["namespaces"]["net"])
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with netns.make_socket(namespace, family) as listener:
        listener.setblocking(True)
        listener.bind((address, 0))
        listener.listen()

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    while data := connection.recv(65536):
                        connection.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield int(listener.getsockname()[1])
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_of_a_pod(node: Node, address: str) -> None:
    pod = node.run_pod("web")
    with echo_in(node, pod, address) as port:
        client = forward(node, pod)
        error, data = pair(client, port, 1)
        sent = os.urandom(1 << 20)
        client.send(data, sent, fin=True)
        while data not in client.ended:
            assert client.step()
        assert client.data[data] == sent
        closed, _ = pair(client, 9, 2)
        client.until(closed, b"Connection refused")
        assert not client.data[error]
        client.close()


def test_a_port_of_a_pod_on_the_nodes_network(node: Node) -> None:
    pod = node.run_pod(node.pod_config("host", network=pb.NODE))
    listener = socket.create_server(("127.0.0.1", 0))
    client = forward(node, pod)
    _, data = pair(client, listener.getsockname()[1], 1)
    connection, _ = listener.accept()
    connection.sendall(b"from the node")
    client.until(data, b"from the node")
    for thing in (connection, listener):
        thing.close()
    client.close()


# The command line


def tare(node: Node, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "tare.cli.main", f"--socket={node.daemon.socket}", *arguments]


def test_exec_of_the_command_line(node: Node, box: str) -> None:
    sent = os.urandom(3 << 20)
    done = subprocess.run(
        tare(node, "exec", "-i", box, "sh", "-c", "cat; echo wrong >&2; exit 9"),
        input=sent,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (9, b"wrong\n")
    assert done.stdout == sent


def test_a_terminal_of_the_command_line(node: Node, box: str) -> None:
    shell = Terminal(tare(node, "exec", "-it", box, "sh"))
    shell.until(b"# ")
    os.write(shell.master, b"echo $((6*7)); exit 5\n")
    shell.until(b"42")
    assert shell.close() == 5


def test_attach_and_detach_of_the_command_line(node: Node) -> None:
    config = node.container_config("shell", "sh", stdin=True, tty=True)
    container = node.start(node.create(node.run_pod("shell"), config))
    shell = Terminal(tare(node, "attach", container))
    os.write(shell.master, b"echo $((6*7))\n")
    shell.until(b"42")
    os.write(shell.master, b"\x10\x11")
    assert shell.close() == 0
    assert node.status(container).state == pb.CONTAINER_RUNNING
    again = Terminal(tare(node, "attach", "--detach-keys=ctrl-x", container))
    os.write(again.master, b"echo $((7*7)); exit 8\n")
    again.until(b"49")
    assert again.close() == 8


def test_port_forward_of_the_command_line(node: Node) -> None:
    pod = node.run_pod("cliweb")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with echo_in(node, pod, "127.0.0.1") as inner:
        command = tare(node, "port-forward", "--address=127.0.0.1", pod, f":{inner}")
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            assert process.stdout is not None
            line = process.stdout.readline().decode()
            port = int(line.split(":")[1].split(" ")[0])
            with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
                connection.sendall(b"echo this")
                connection.shutdown(socket.SHUT_WR)
                said = b""
                while more := connection.recv(100):
                    said += more
            process.send_signal(signal.SIGINT)
    assert said == b"echo this"
    assert process.returncode == 0
