"""What the streaming server bears: certificates that change, clients that are slow, silent, many or hostile, and its own end."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tare.errors import FailedPrecondition
from tare.streaming import carriers, forward, server, sessions, spdy
from tare.streaming.peers import SpdyPeer
from tare.streaming.remote import Outcome, Wanted
from tare.streaming.server import EXEC, FORWARD, Request, Server
from tare.streaming.spdy_headers import Packer
from tare.streaming.tls import Certificate
from tests.support.certificates import self_signed
from tests.support.spdy_client import NotUpgraded, SpdyClient
from tests.unit.test_streaming_server import ALL, TERMINAL, V4, Echo, Running, opened, with_socket

NOTHING = Wanted(stdout=True)


@pytest.fixture
def running() -> Iterator[Running]:
    made = Running()
    yield made
    made.close()


def address(url: str) -> tuple[str, int]:
    host, _, port = url.split("/")[2].rpartition(":")
    return host.strip("[]"), int(port)


def talk(connection: socket.socket, url: str) -> SpdyClient:
    """Upgrade over a connection that is there."""
    path = "/" + url.split("/", 3)[3]
    connection.settimeout(20)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
        f"X-Stream-Protocol-Version: {V4}\r\n\r\n".encode()
    )
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(1)
    assert head.startswith(b"HTTP/1.1 101 ")
    return SpdyClient(connection, b"", V4)


def says_hello(client: SpdyClient) -> None:
    """An echo, to the end."""
    streams = opened(client, "error", "stdin", "stdout", "stderr")
    client.send(streams["stdin"], b"hello" * 50_000, fin=True)
    client.run()
    assert client.data[streams["stdout"]] == b"hello" * 50_000


# Where it listens


def over_tls(url: str, authority: Path) -> tuple[ssl.SSLSocket, bytes]:
    context = ssl.create_default_context(cafile=str(authority))
    plain = socket.create_connection(address(url), 20)
    connection = context.wrap_socket(plain, server_hostname="127.0.0.1")
    return connection, connection.getpeercert(binary_form=True) or b""


def test_a_certificate_is_taken_anew_and_a_broken_one_is_not(tmp_path: Path) -> None:
    first, second = self_signed(tmp_path / "a"), self_signed(tmp_path / "b")
    chain, key = tmp_path / "chain", tmp_path / "key"
    shutil.copy(first.certificate, chain)
    shutil.copy(first.key, key)
    running = Running(tls=Certificate(chain, key).context)
    try:
        url = running.exec_url("0")
        assert url.startswith("https://127.0.0.1:")
        begin = time.monotonic()
        connection, seen = over_tls(url, first.certificate)
        says_hello(talk(connection, url))
        assert time.monotonic() - begin < carriers.CLOSE_SECONDS
        shutil.copy(second.certificate, chain)  # its key is not there yet
        connection, same = over_tls(running.exec_url("0"), first.certificate)
        connection.close()
        shutil.copy(second.key, key)
        url = running.exec_url("0")
        connection, other = over_tls(url, second.certificate)
        says_hello(talk(connection, url))
        assert same == seen != other
    finally:
        running.close()


def test_a_certificate_that_is_no_use_is_told_at_the_start(tmp_path: Path) -> None:
    made = self_signed(tmp_path)
    nothing = tmp_path / "nothing"
    with pytest.raises(FailedPrecondition, match=f"{nothing}.*No such file"):
        Certificate(nothing, made.key)
    nothing.write_text("nothing")
    for pair in ((nothing, made.key), (made.certificate, nothing), (made.certificate, self_signed(tmp_path / "o").key)):
        with pytest.raises(FailedPrecondition, match="use the certificate"):
            Certificate(*pair)


def test_a_client_that_never_shakes_hands_is_counted_and_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.3)
    made = self_signed(tmp_path)
    running = Running(tls=Certificate(made.certificate, made.key).context)
    try:
        with socket.create_connection(address(running.exec_url("0")), 20) as connection:
            assert connection.recv(10) == b""
    finally:
        running.close()


def test_local_clients_have_a_socket_that_is_roots_alone(tmp_path: Path) -> None:
    path = tmp_path / "streaming.sock"
    running = Running(path=path)
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(path))
        says_hello(talk(connection, running.exec_url("0")))
    finally:
        running.close()


@pytest.mark.parametrize(
    ("host", "shown"), [("127.0.0.2", "127.0.0.2"), ("::1", "[::1]"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]")]
)
def test_other_addresses(host: str, shown: str) -> None:
    running = Running(host=host)
    try:
        url = running.exec_url("0")
        assert url.startswith(f"http://{shown}:")
        says_hello(SpdyClient.connect(url, [V4]))
    finally:
        running.close()


def test_an_address_that_is_not_here_is_told() -> None:
    with pytest.raises(FailedPrecondition, match=r"192\.0\.2\.1"):
        asyncio.run(Server(Echo(), host="192.0.2.1").start())


# Slow, silent and many


def test_an_idle_session_ends_and_one_that_talks_does_not() -> None:
    running = Running(idle=0.4)
    try:
        client = SpdyClient.connect(running.exec_url("0"), [V4])
        streams = opened(client, "error", "stdin", "stdout", "stderr")
        for _ in range(8):
            time.sleep(0.1)
            client.send(streams["stdin"], b"x")
        client.until(streams["stdout"], b"x" * 8)
        begin = time.monotonic()
        client.run()
        assert time.monotonic() - begin < 5
    finally:
        running.close()


def test_output_alone_keeps_a_session_alive() -> None:
    running = Running(idle=0.4)

    async def talkative(request: Request, session: Any) -> Any:
        for _ in range(10):
            await asyncio.sleep(0.1)
            await session.write("stdout", b"y")
        return Outcome(code=0)

    running.backend.exec = talkative  # type: ignore[method-assign]
    try:
        client = SpdyClient.connect(running.exec_url("0", wanted=NOTHING), [V4])
        streams = opened(client, "error", "stdout")
        client.run()
        assert client.data[streams["stdout"]] == b"y" * 10
        assert json.loads(bytes(client.data[streams["error"]]))["status"] == "Success"
    finally:
        running.close()


def test_a_client_has_a_while_to_open_its_streams(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sessions.CREATION_SECONDS == 30.0
    monkeypatch.setattr(sessions, "CREATION_SECONDS", 0.3)
    client = SpdyClient.connect(running.exec_url("0"), [V4])
    streams = opened(client, "error", "stdin")
    client.run()
    message = json.loads(bytes(client.data[streams["error"]]))["message"]
    assert message == "the client has not opened its streams in 0.3 s: stderr, stdout"


def test_half_of_a_pair_is_reset_after_a_while(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "PAIR_SECONDS", 0.2)
    client = SpdyClient.connect(running.url(FORWARD, Request(target="pod")), ["portforward.k8s.io"])
    lone = client.open({"streamType": "data", "port": "80", "requestID": "1"})
    while lone not in client.resets:
        assert client.step()
    client.close()


def test_a_head_that_never_ends_is_let_go(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    with socket.create_connection(address(running.exec_url("0")), 20) as connection:
        begin = time.monotonic()
        connection.sendall(b"GET /exec/x HTTP/1.1\r\n")
        while time.monotonic() - begin < 5:
            try:
                connection.sendall(b"X: y\r\n")
            except OSError:
                break
            time.sleep(0.1)
        assert time.monotonic() - begin < 5


def test_too_many_connections_are_turned_away(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 3)
    url = running.exec_url("0")
    held = [socket.create_connection(address(url), 20) for _ in range(3)]
    deadline = time.monotonic() + 10
    while len(running.server._tasks) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with socket.create_connection(address(url), 20) as connection:
        assert connection.recv(10) == b""
    held.pop().close()
    while len(running.server._tasks) > 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    says_hello(SpdyClient.connect(url, [V4]))
    for connection in held:
        connection.close()


def test_ten_thousand_streams_are_bounded_and_harm_nobody(running: Running) -> None:
    client = SpdyClient.connect(running.url(FORWARD, Request(target="pod")), ["portforward.k8s.io"])
    for number in range(10_000):
        client.open({"streamType": "error", "port": "80", "requestID": str(number)})
    while len(client.resets) < 10_000 - forward.MAX_HALVES - 1:
        assert client.step()
    client.close()
    says_hello(SpdyClient.connect(running.exec_url("0"), [V4]))


def test_a_command_gets_no_more_streams_than_its_own(running: Running) -> None:
    client = SpdyClient.connect(running.exec_url("0"), [V4])
    streams = opened(client, "error", "stdin", "stdout", "stderr")
    client.send(streams["stdin"], b"first")
    client.until(streams["stdout"], b"first")
    more = [client.open({"streamType": "stdin"}) for _ in range(3000)]
    client.send(streams["stdin"], b"last", fin=True)
    client.run()
    assert {client.resets[number] for number in more} == {spdy.REFUSED_STREAM}
    assert client.data[streams["stdout"]] == b"firstlast"


def test_a_zip_bomb_ends_its_own_connection(running: Running) -> None:
    client = SpdyClient.connect(running.exec_url("0"), [V4])
    client.open({"streamtype": "x" * 20_000_000})
    client.run()
    assert client.gone_away == spdy.GOAWAY_PROTOCOL_ERROR


def test_streams_that_are_over_are_forgotten() -> None:
    class Nowhere:
        def write(self, data: bytes) -> None:
            return

        async def drain(self) -> None:
            return

    async def go() -> int:
        peer = SpdyPeer(Nowhere(), 10)  # type: ignore[arg-type] # as much of a carrier as is used
        packer = Packer()
        for number in range(1, 2001, 2):
            block = number.to_bytes(4, "big") + bytes(6) + packer.pack({"streamtype": "data"})
            head = (1 << 31 | 3 << 16 | spdy.SYN_STREAM).to_bytes(4, "big") + bytes([spdy.FIN])
            await peer._take(head + len(block).to_bytes(3, "big") + block)
            stream = await peer.next_stream()
            assert stream is not None
            assert await stream.receive() == b""
            await stream.send(b"answer", fin=True)
        return len(peer._streams)

    assert asyncio.run(go()) == 0


def test_a_slow_reader_holds_the_command_back(running: Running) -> None:
    sent = 0

    async def flood(request: Request, session: Any) -> Any:
        nonlocal sent
        for _ in range(400):
            await session.write("stdout", bytes(1 << 18))
            sent += 1 << 18
        return Outcome(code=0)

    running.backend.exec = flood  # type: ignore[method-assign]
    client = SpdyClient.connect(running.exec_url("0", wanted=NOTHING), [V4])
    streams = opened(client, "error", "stdout")
    time.sleep(0.5)
    before = sent
    time.sleep(0.3)
    assert sent == before < 32 << 20
    client.run()
    assert len(client.data[streams["stdout"]]) == 400 << 18


def test_a_client_that_vanishes_with_its_input_unread_is_noticed(running: Running) -> None:
    seen = asyncio.Event()

    async def deaf(request: Request, session: Any) -> Any:
        await session.gone.wait()
        seen.set()
        return Outcome(code=0)

    running.backend.exec = deaf  # type: ignore[method-assign]
    client = SpdyClient.connect(running.exec_url("0"), [V4])
    streams = opened(client, "error", "stdin", "stdout", "stderr")
    client.socket.settimeout(0.3)
    with pytest.raises(TimeoutError):
        while True:
            client.send(streams["stdin"], bytes(100_000))
    client.close()
    running.call(asyncio.wait_for(seen.wait(), 10))


def test_sizes_and_input_that_nobody_wants_hold_nothing_up(running: Running) -> None:
    async def use(ws: Any) -> bytes:
        for _ in range(200):
            await ws.send_bytes(b'\4{"Width":80,"Height":24}')
            await ws.send_bytes(b"\0unwanted")
        text = b""
        async for message in ws:
            if message.data[0] == 3:
                text += message.data[1:]
        return text

    async def wait_a_while(request: Request, session: Any) -> Any:
        await asyncio.sleep(0.5)
        return Outcome(code=0)

    running.backend.exec = wait_a_while  # type: ignore[method-assign]
    told = with_socket(running, running.exec_url("0", wanted=NOTHING), ["v5.channel.k8s.io"], use)
    assert json.loads(told)["status"] == "Success"


def test_sessions_end_with_words_when_the_server_does(running: Running) -> None:
    async def endless(request: Request, session: Any) -> Any:
        await asyncio.Event().wait()

    running.backend.exec = endless  # type: ignore[method-assign]
    client = SpdyClient.connect(running.exec_url("0", wanted=TERMINAL), [V4])
    streams = opened(client, "error", "stdin", "stdout", "resize")
    silent = SpdyClient.connect(running.exec_url("0"), [V4])
    forwarding = SpdyClient.connect(running.url(FORWARD, Request(target="pod")), ["portforward.k8s.io"])
    stop = asyncio.run_coroutine_threadsafe(running.server.stop(), running.loop)
    begin = time.monotonic()
    for one in (client, silent, forwarding):
        one.run()
    stop.result(10)
    assert time.monotonic() - begin < carriers.CLOSE_SECONDS
    assert json.loads(bytes(client.data[streams["error"]]))["message"] == "the server ends"


def test_a_url_that_was_never_handed_out_is_refused(running: Running) -> None:
    base = running.exec_url("0").rpartition("/")[0]
    with pytest.raises(NotUpgraded, match="404"):
        SpdyClient.connect(f"{base}/{os.urandom(16).hex()}", [V4])
    assert running.url(EXEC, Request(target="box", wanted=ALL)).startswith(base)
