"""Clients that never read, pods that never read, and sessions that outlive their clients: all are given up in a while, and harm no other."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest

from tare.streaming import carriers, forward, inbox, peers, remote, server, spdy
from tare.streaming.peers import SpdyPeer
from tare.streaming.remote import Outcome
from tare.streaming.server import FORWARD, Request
from tare.streaming.spdy_headers import Packer
from tests.support.spdy_client import SpdyClient
from tests.unit.test_streaming_bounds import NOTHING, says_hello
from tests.unit.test_streaming_server import V4, Running, opened, status, with_socket

SOON = 8.0  # seconds
V1_FORWARD = "portforward.k8s.io"


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setattr(carriers, "CLOSE_SECONDS", 0.5)
    made = Running()
    yield made
    made.close()


@pytest.fixture
def pod() -> Iterator[socket.socket]:
    """A pod's port that takes no connection out of its queue, and so nothing that is said to it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def flood(request: Request, session: Any) -> Outcome:
    """A command that says more than fits in between, and does not heed that its client has left."""
    for _ in range(400):
        await session.write("stdout", bytes(1 << 18))
    await asyncio.Event().wait()
    raise AssertionError


def never_reads(running: Running) -> SpdyClient:
    running.backend.exec = flood  # type: ignore[method-assign]
    client = SpdyClient.connect(running.exec_url("0", wanted=NOTHING), [V4])
    opened(client, "error", "stdout")
    (writer,) = running.server._open
    until(lambda: writer.transport.get_write_buffer_size() > 1 << 16)
    return client


def test_the_server_ends_although_a_client_never_reads(running: Running) -> None:
    client = never_reads(running)
    begin = time.monotonic()
    running.call(running.server.stop())
    assert time.monotonic() - begin < SOON
    assert not running.server._tasks
    client.close()


@pytest.mark.parametrize("tunnel", [False, True])
def test_the_server_ends_although_a_forwarding_client_never_reads(
    running: Running, pod: socket.socket, tunnel: bool
) -> None:
    url = running.url(FORWARD, Request(target="pod"))
    client = SpdyClient.tunnel(url, f"SPDY/3.1+{V1_FORWARD}") if tunnel else SpdyClient.connect(url, [V1_FORWARD])
    head = {"port": str(pod.getsockname()[1]), "requestID": "1"}
    client.open({"streamType": "error", **head})
    client.open({"streamType": "data", **head})
    connection, _ = pod.accept()
    connection.settimeout(0.5)
    with connection, pytest.raises(TimeoutError):
        connection.sendall(bytes(64 << 20))
    running.call(running.server.stop())
    assert not running.server._tasks
    client.close()


def test_a_client_that_says_no_more_and_never_reads_is_hung_up_on(running: Running) -> None:
    client = never_reads(running)
    assert isinstance(client.socket, socket.socket)
    client.socket.shutdown(socket.SHUT_WR)
    until(lambda: not running.server._open)
    assert len(running.server._tasks) == 1  # the command runs on
    client.close()


def test_a_client_that_takes_nothing_for_the_idle_time_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriers, "CLOSE_SECONDS", 0.5)
    running = Running(idle=0.4)
    try:
        client = never_reads(running)
        until(lambda: not running.server._open)
        client.close()
    finally:
        running.close()


def test_connections_are_counted_and_not_the_commands_that_outlive_them(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 1)
    caplog.set_level(logging.WARNING, "tare.streaming.server")
    echo = running.backend.exec
    client = never_reads(running)
    for _ in range(2):
        with socket.create_connection(("127.0.0.1", running.server._port), 20) as refused:
            assert refused.recv(10) == b""
    assert caplog.messages == ["streaming: 1 connections are open, further ones are turned away"]
    client.close()
    until(lambda: not running.server._open)
    assert running.server._tasks
    running.backend.exec = echo  # type: ignore[method-assign]
    says_hello(SpdyClient.connect(running.exec_url("0"), [V4]))


def test_a_backend_that_fails_by_the_kernel_is_told(running: Running) -> None:
    async def fail(request: Request, session: Any) -> Outcome:
        raise OSError(24, "Too many open files")

    running.backend.exec = fail  # type: ignore[method-assign]
    client = SpdyClient.connect(running.exec_url("0", wanted=NOTHING), [V4])
    streams = opened(client, "error", "stdout")
    client.run()
    assert status(client, streams["error"])["message"] == "Too many open files"


# Port-forward


async def no_thread(pod_id: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    raise RuntimeError("can't start new thread")


def test_any_failure_to_dial_is_told(running: Running) -> None:
    running.backend.dial = no_thread  # type: ignore[method-assign]
    client = SpdyClient.connect(running.url(FORWARD, Request(target="pod")), [V1_FORWARD])
    error = client.open({"streamType": "error", "port": "80", "requestID": "1"})
    client.open({"streamType": "data", "port": "80", "requestID": "1"})
    client.until(error, b"forward port 80: RuntimeError: can't start new thread")
    client.close()


def test_any_failure_to_dial_is_told_over_a_websocket(running: Running) -> None:
    running.backend.dial = no_thread  # type: ignore[method-assign]

    async def use(ws: Any) -> bytes:
        return b"".join([message.data async for message in ws])

    said = with_socket(running, running.url(FORWARD, Request(target="pod", ports=(80,))), [V4], use)
    assert b"forward port 80: RuntimeError: can't start new thread" in said


def test_a_url_has_so_many_ports_and_no_more(running: Running) -> None:
    async def use(ws: Any) -> None:
        return

    base = running.url(FORWARD, Request(target="pod"))
    query = "&".join(f"port={number}" for number in range(1, server.MAX_PORTS + 2))
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        with_socket(running, f"{base}?{query}", [V4], use)
    assert refused.value.status == 400
    assert len(server.ports_of(query.rpartition("&")[0])) == server.MAX_PORTS


def echo_once(listener: socket.socket) -> None:
    """What comes on one connection, said once more at its end."""
    connection, _ = listener.accept()
    with connection:
        said = b""
        while data := connection.recv(65536):
            said += data
        connection.sendall(said)


def test_a_port_that_takes_nothing_holds_its_session_up_for_a_while_alone(
    running: Running, pod: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert forward.STUCK_SECONDS == 30.0
    monkeypatch.setattr(forward, "STUCK_SECONDS", 0.3)
    monkeypatch.setattr(peers, "LOOK", 0.1)
    client = SpdyClient.connect(running.url(FORWARD, Request(target="pod")), [V1_FORWARD])
    head = {"port": str(pod.getsockname()[1]), "requestID": "stuck"}
    error = client.open({"streamType": "error", **head})
    data = client.open({"streamType": "data", **head})
    for _ in range(64):
        client.send(data, bytes(1 << 19))
    client.until(error, b"the pod has taken nothing for 0.3 s")
    assert data in client.resets
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=echo_once, args=(listener,))
        thread.start()
        head = {"port": str(listener.getsockname()[1]), "requestID": "well"}
        client.open({"streamType": "error", **head})
        well = client.open({"streamType": "data", **head})
        client.send(well, b"on", fin=True)
        client.until(well, b"on")
        thread.join()
    client.close()


def test_a_port_that_takes_nothing_holds_its_websocket_up_for_a_while_alone(
    running: Running, pod: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "STUCK_SECONDS", 0.3)
    monkeypatch.setattr(peers, "LOOK", 0.1)

    async def use(ws: Any) -> tuple[bytes, bytes]:
        for _ in range(64):
            await ws.send_bytes(b"\0" + bytes(1 << 19))
        await ws.send_bytes(b"\2on")
        said = {1: b"", 2: b""}
        while not said[1].endswith(b" s") or not said[2].endswith(b"on"):
            message = (await ws.receive(10)).data
            said[message[0]] = said.get(message[0], b"") + message[1:]
        return said[1], said[2]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: answer_once(listener))
        thread.start()
        ports = (int(pod.getsockname()[1]), int(listener.getsockname()[1]))
        error, answer = with_socket(running, running.url(FORWARD, Request(target="pod", ports=ports)), [V4], use)
        thread.join()
    assert b"the pod has taken nothing for 0.3 s" in error
    assert answer[2:] == b"on"


def answer_once(listener: socket.socket) -> None:
    """What comes first on one connection, said once more."""
    connection, _ = listener.accept()
    with connection:
        connection.sendall(connection.recv(100))


def frame(kind: int, flags: int, payload: bytes) -> bytes:
    return (1 << 31 | 3 << 16 | kind).to_bytes(4, "big") + bytes([flags]) + len(payload).to_bytes(3, "big") + payload


class Script:
    """A carrier with so much to read; `left` is what is not read yet."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.left = pieces

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        return self.left.pop(0) if self.left else b""

    def write(self, data: bytes) -> None:
        return

    async def drain(self) -> None:
        return

    def has_left(self) -> bool:
        return False

    async def close(self, ended: asyncio.Event) -> None:
        return

    def abort(self) -> None:
        return


@pytest.mark.parametrize("size", [1 << 16, 1])
def test_all_streams_of_a_connection_have_one_budget(size: int) -> None:
    """In a few big pieces each, or in many small ones, which take more room than their bytes."""
    packer, pieces, streams = Packer(), [], 40
    for number in range(1, 2 * streams, 2):
        block = number.to_bytes(4, "big") + bytes(6) + packer.pack({"streamtype": "data"})
        pieces.append(frame(spdy.SYN_STREAM, 0, block))
    count = 12 if size > 1 else 4000
    for number in range(1, 2 * streams, 2):
        part = number.to_bytes(4, "big") + b"\0" + size.to_bytes(3, "big") + bytes(size)
        pieces += [part] * 12 if size > 1 else [part * count]
    carrier = Script(pieces)

    async def settled(peer: SpdyPeer) -> None:
        before = -1
        while before != len(carrier.left):
            before = len(carrier.left)
            await asyncio.sleep(0.1)

    async def go() -> None:
        peer = SpdyPeer(carrier, 60)
        peer.begin()
        await settled(peer)
        assert carrier.left
        assert inbox.BUDGET <= peer.budget.size <= inbox.BUDGET + (1 << 16) + inbox.PIECE
        for _ in range(streams):
            stream = await peer.next_stream()
            assert stream is not None
            stream.inbox.discard()
        await settled(peer)
        assert not carrier.left
        assert peer.budget.size == 0
        await peer.close()

    asyncio.run(go())


# Windows' sizes


def test_a_flood_of_sizes_costs_no_more_than_its_bytes() -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError, match="more than 65536 bytes"):
        remote.Sizes().feed(b"1 " * (1 << 19))
    sizes = remote.Sizes()
    assert sizes.feed(b"1 " * 32_000 + b'{"Width":1,') == []
    assert sizes.feed(b'"Height":2}') == [remote.Size(1, 2)]
    assert time.monotonic() - begin < 1


def test_a_flood_of_sizes_leaves_the_other_streams_alone(running: Running) -> None:
    async def hear(request: Request, session: Any) -> Outcome:
        while await session.next_size() is not None:
            continue
        return Outcome(code=len(await session.stdin()))

    running.backend.exec = hear  # type: ignore[method-assign]
    wanted = remote.Wanted(stdin=True, stdout=True, tty=True)
    client = SpdyClient.connect(running.exec_url("0", wanted=wanted), [V4])
    streams = opened(client, "error", "stdin", "stdout", "resize")
    client.send(streams["resize"], b"[" * (8 << 20))
    client.send(streams["stdin"], b"four")
    client.run()
    assert json.loads(bytes(client.data[streams["error"]]))["details"]["causes"][0]["message"] == "4"
