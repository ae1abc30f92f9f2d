"""The streaming server with a backend that echoes: tickets, protocols, both kinds of client, and what hostile ones get."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage
from wsproto.events import Request as WsRequest

from tare.cli import stream
from tare.streaming import remote
from tare.streaming.remote import Outcome, Size, Wanted
from tare.streaming.server import ATTACH, EXEC, FORWARD, Request, Server
from tare.streaming.sessions import Session
from tests.support.spdy_client import NotUpgraded, SpdyClient

ALL = Wanted(stdin=True, stdout=True, stderr=True)
TERMINAL = Wanted(stdin=True, stdout=True, tty=True)
V4 = "v4.channel.k8s.io"


class Echo:
    """Says what it hears. The command is (code, words for stderr); a terminal's sizes are said too."""

    def __init__(self) -> None:
        self.port = 0
        self.sizes: list[Size] = []

    async def exec(self, request: Request, session: Session) -> Outcome:
        if request.wanted.tty:
            size = await session.next_size()
            assert size is not None
            await session.write("stdout", f"{size.width}x{size.height} ".encode())
        while data := await session.stdin():
            await session.write("stdout", data)
        if len(request.command) > 1:
            await session.write("stderr", request.command[1].encode())
        return Outcome(code=int(request.command[0]))

    async def attach(self, request: Request, session: Session) -> Outcome:
        return Outcome(error="nobody is at home")

    async def dial(self, pod_id: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", port)


class Running:
    """A server in a loop of its own thread."""

    def __init__(self, **options: Any) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.backend = Echo()
        self.server = Server(self.backend, **options)
        self.call(self.server.start())

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def url(self, kind: str, request: Request) -> str:
        async def ask() -> str:
            return self.server.url(kind, request)

        return str(self.call(ask()))

    def exec_url(self, *command: str, wanted: Wanted = ALL) -> str:
        return self.url(EXEC, Request(target="box", command=command, wanted=wanted))

    def close(self) -> None:
        self.call(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def running() -> Iterator[Running]:
    server = Running()
    yield server
    server.close()


def opened(client: SpdyClient, *names: str) -> dict[str, int]:
    """Streams by name."""
    return {name: client.open({"streamType": name}) for name in names}


def status(client: SpdyClient, stream: int) -> dict[str, Any]:
    """The Status object on an error stream."""
    found: dict[str, Any] = json.loads(bytes(client.data[stream]))
    return found


def test_a_command_over_spdy(running: Running) -> None:
    client = SpdyClient.connect(running.exec_url("0", "warning"), [V4, "v3.channel.k8s.io"])
    assert client.protocol == V4
    streams = opened(client, "error", "stdin", "stdout", "stderr")
    sent = bytes(range(256)) * 5000
    for at in range(0, len(sent), 70_000):
        client.send(streams["stdin"], sent[at : at + 70_000])
    client.send(streams["stdin"], b"", fin=True)
    client.run()
    assert client.data[streams["stdout"]] == sent
    assert client.data[streams["stderr"]] == b"warning"
    assert status(client, streams["error"])["status"] == "Success"
    assert {streams["stdout"], streams["stderr"], streams["error"]} <= client.ended
    assert client.accepted == set(streams.values())
    assert client.gone_away == 0


@pytest.mark.parametrize(
    ("offered", "spoken"),
    [
        (["v4.channel.k8s.io"], "v4.channel.k8s.io"),
        (["v9.channel.k8s.io", "v3.channel.k8s.io"], "v3.channel.k8s.io"),
        (["v2.channel.k8s.io"], "v2.channel.k8s.io"),
        (["channel.k8s.io"], "channel.k8s.io"),
        ([], ""),
    ],
)
def test_an_exit_code_in_each_protocol(running: Running, offered: list[str], spoken: str) -> None:
    client = SpdyClient.connect(running.exec_url("3", wanted=Wanted(stdout=True)), offered)
    assert client.protocol == spoken
    streams = opened(client, "error", "stdout")
    client.run()
    said = bytes(client.data[streams["error"]])
    if spoken == V4:
        told = json.loads(said)
        assert told["reason"] == "NonZeroExitCode"
        assert told["details"]["causes"] == [{"reason": "ExitCode", "message": "3"}]
    else:
        assert said == b"command terminated with non-zero exit code: exit status 3"


def test_a_terminals_size_comes_before_its_command(running: Running) -> None:
    client = SpdyClient.connect(running.exec_url("0", wanted=TERMINAL), [V4])
    streams = opened(client, "error", "stdin", "stdout", "resize")
    client.send(streams["resize"], b'{"Width":120,')
    client.send(streams["resize"], b'"Height":40}\n')
    client.send(streams["stdin"], b"x", fin=True)
    client.run()
    assert client.data[streams["stdout"]] == b"120x40 x"


def test_a_url_is_good_once_and_for_its_own_kind(running: Running) -> None:
    url = running.exec_url("0", wanted=Wanted(stdout=True))
    with pytest.raises(NotUpgraded) as other:
        SpdyClient.connect(url.replace("/exec/", "/attach/"), [V4])
    assert other.value.status == 404
    SpdyClient.connect(url, [V4]).close()
    with pytest.raises(NotUpgraded) as again:
        SpdyClient.connect(url, [V4])
    assert again.value.status == 404
    assert b"used already" in again.value.body


def test_protocols_that_nobody_speaks_are_refused_and_leave_the_url_good(running: Running) -> None:
    url = running.exec_url("0", wanted=Wanted(stdout=True))
    with pytest.raises(NotUpgraded) as refused:
        SpdyClient.connect(url, ["v8.channel.k8s.io"])
    assert refused.value.status == 403
    SpdyClient.connect(url, [V4]).close()


def raw(running: Running, text: bytes) -> bytes:
    """What the server answers to bytes, to its end."""
    host, port = running.server.url(EXEC, Request(target="x")).split("/")[2].split(":")
    with socket.create_connection((host, int(port)), 20) as connection:
        connection.sendall(text)
        answer = b""
        while more := connection.recv(4096):
            answer += more
    return answer


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"DELETE /exec/abc HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"GET /exec/abc HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /exec/abc HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n", 400),
        (b"GET /exec/abc HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", 400),
        (b"POST /exec/abc HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n", 404),
        (b"\x16\x03\x01 no http\r\n\r\n", 400),
        (b"GET /exec/abc HTTP/1.1\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", 431),
    ],
)
def test_what_is_no_request_for_a_stream(running: Running, text: bytes, code: int) -> None:
    answer = raw(running, text)
    assert answer.startswith(b"HTTP/1.1 %d " % code)
    assert answer.count(b"\r\n\r\n") == 1


def test_streams_that_were_not_asked_for_end_the_session_with_words(running: Running) -> None:
    client = SpdyClient.connect(running.exec_url("0", wanted=Wanted(stdout=True)), [V4])
    streams = opened(client, "error", "stdin")
    client.run()
    assert "'stdin'" in status(client, streams["error"])["message"]


def test_an_attach_that_fails_says_why(running: Running) -> None:
    client = SpdyClient.connect(running.url(ATTACH, Request(target="box", wanted=Wanted(stdout=True))), [V4])
    streams = opened(client, "error", "stdout")
    client.run()
    assert status(client, streams["error"])["message"] == "nobody is at home"


# Port-forward


@pytest.fixture
def doubler() -> Iterator[int]:
    """A server that says everything twice, after its client has half closed."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                data = b""
                while more := connection.recv(65536):
                    data += more
                connection.sendall(data * 2)

    thread = threading.Thread(target=serve)
    thread.start()
    yield int(listener.getsockname()[1])
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def test_many_connections_through_one_session(running: Running, doubler: int) -> None:
    client = SpdyClient.connect(running.url(FORWARD, Request(target="pod")), ["portforward.k8s.io"])
    pairs = []
    for number in range(100):
        head = {"port": str(doubler), "requestID": str(number)}
        error, data = client.open({"streamType": "error", **head}), client.open({"streamType": "data", **head})
        client.send(error, b"", fin=True)
        client.send(data, b"%d," % number * 1000, fin=True)
        pairs.append((error, data))
    while not {data for _, data in pairs} <= client.ended or not {error for error, _ in pairs} <= client.ended:
        assert client.step()
    for number, (error, data) in enumerate(pairs):
        assert client.data[data] == b"%d," % number * 2000
        assert not client.data[error]
    client.close()


def test_a_closed_port_is_told_on_its_own_error_stream(running: Running, doubler: int) -> None:
    client = SpdyClient.connect(running.url(FORWARD, Request(target="pod")), ["portforward.k8s.io"])
    bad = {"port": "1", "requestID": "a"}
    error, data = client.open({"streamType": "error", **bad}), client.open({"streamType": "data", **bad})
    client.until(error, b"forward port 1: ")
    while data not in client.resets:
        assert client.step()
    good = {"port": str(doubler), "requestID": "b"}
    client.open({"streamType": "error", **good})
    well = client.open({"streamType": "data", **good})
    client.send(well, b"on", fin=True)
    client.until(well, b"onon")
    client.close()


def test_spdy_within_a_websocket(running: Running, doubler: int) -> None:
    url = running.url(FORWARD, Request(target="pod"))
    client = SpdyClient.tunnel(url, "SPDY/3.1+portforward.k8s.io")
    assert client.protocol == "SPDY/3.1+portforward.k8s.io"
    sent = b"0123456789" * 30_000
    for number in range(3):
        head = {"port": str(doubler), "requestID": str(number)}
        client.open({"streamType": "error", **head})
        data = client.open({"streamType": "data", **head})
        client.socket.sendall(b"")
        client.send(data, sent, fin=True)
        while data not in client.ended:
            assert client.step()
        assert client.data[data] == sent * 2
    client.close()


# WebSocket


def with_socket(running: Running, url: str, protocols: list[str], use: Callable[[Any], Any]) -> Any:
    """Use a WebSocket of a client library of its own."""

    async def go() -> Any:
        async with aiohttp.ClientSession() as http, http.ws_connect(url, protocols=protocols) as ws:
            return await use(ws)

    return asyncio.run(go())


async def all_channels(ws: Any) -> dict[int, bytes]:
    """What came on each channel until the end."""
    found: dict[int, bytes] = {}
    async for message in ws:
        assert message.type is aiohttp.WSMsgType.BINARY
        found[message.data[0]] = found.get(message.data[0], b"") + message.data[1:]
    return found


def test_a_command_over_a_websocket_with_its_stdin_closed(running: Running) -> None:
    async def use(ws: Any) -> dict[int, bytes]:
        assert ws.protocol == "v5.channel.k8s.io"
        for _ in range(10):
            await ws.send_bytes(b"\0" + b"words " * 10_000)
        await ws.send_bytes(b"\xff\0")
        return await all_channels(ws)

    url = running.exec_url("7", "warning")
    found = with_socket(running, url, ["v5.channel.k8s.io", V4], use)
    assert found[1] == b"words " * 100_000
    assert found[2] == b"warning"
    assert json.loads(found[3])["details"]["causes"][0]["message"] == "7"


def test_base64_channels(running: Running) -> None:
    async def use(ws: Any) -> list[str]:
        await ws.send_str("4" + "eyJXaWR0aCI6ODAsIkhlaWdodCI6MjR9")  # {"Width":80,"Height":24}
        await ws.send_str("0" + "aGk=")
        texts: list[str] = []
        while "1aGk=" not in texts:
            texts.append((await ws.receive(10)).data)
        return texts

    url = running.exec_url("0", wanted=TERMINAL)
    assert "1ODB4MjQg" in with_socket(running, url, ["base64.channel.k8s.io"], use)


def test_a_channel_that_is_none_ends_the_socket(running: Running) -> None:
    async def use(ws: Any) -> int | None:
        await ws.send_bytes(b"\x09nonsense")
        async for _ in ws:
            continue
        code: int | None = ws.close_code
        return code

    assert with_socket(running, running.exec_url("0"), [V4], use) == 1002


@pytest.mark.parametrize("named_by", ["CRI", "URL"])
def test_port_forward_over_a_websocket(running: Running, named_by: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(connection.recv(100).upper())

    thread = threading.Thread(target=serve)
    thread.start()

    async def use(ws: Any) -> dict[int, bytes]:
        await ws.send_bytes(b"\0hello")
        return await all_channels(ws)

    if named_by == "CRI":
        url = running.url(FORWARD, Request(target="pod", ports=(port, 1)))
    else:
        url = f"{running.url(FORWARD, Request(target='pod'))}?port={port}&port=1"
    found = with_socket(running, url, [V4], use)
    thread.join()
    listener.close()
    assert found[0] == struct.pack("<H", port) + b"HELLO"
    assert found[1] == struct.pack("<H", port)
    assert found[3][:2] == struct.pack("<H", 1)
    assert b"forward port 1: " in found[3]


@pytest.mark.parametrize("query", ["", "?port=0", "?port=http", "?port=65536"])
def test_port_forward_over_a_websocket_to_no_port(running: Running, query: str) -> None:
    async def use(ws: Any) -> None:
        return

    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        with_socket(running, running.url(FORWARD, Request(target="pod")) + query, [V4], use)
    assert refused.value.status == 400


def test_sizes_in_pieces() -> None:
    sizes = remote.Sizes()
    assert sizes.feed(b'{"Width":1,"Hei') == []
    assert sizes.feed(b'ght":2}{"Width":3,"Height":4}') == [Size(1, 2), Size(3, 4)]
    assert sizes.feed(b'{"Width":-1,"Height":4} 7 {"Width":5,"Height":6}') == [Size(5, 6)]
    with pytest.raises(ValueError, match="no JSON"):
        sizes.feed(b"{" * 5000)
    with pytest.raises(ValueError):
        remote.Sizes().feed(b"[" * 100_000)


def test_the_command_line_takes_what_comes_together_with_the_handshake() -> None:
    """As one segment may have it, when the server is quick and the client is not."""
    ours, theirs = socket.socketpair()
    answered = threading.Thread(target=answer_all_at_once, args=(theirs,))
    answered.start()
    channel = stream.Socket(ours, "http://here/exec/x", stream.PROTOCOL)
    answered.join()
    session = stream.Session(channel, stdin=False, tty=False, keys=b"")
    said: list[bytes] = []
    session.take = said.append  # type: ignore[method-assign, assignment]
    assert channel.early == [b"\1hi\n", b'\3{"status": "Success"}']
    with pytest.raises(stream.SessionFailed, match="hung up"):
        session.run()
    assert said == channel.early


def answer_all_at_once(connection: socket.socket) -> None:
    """The server's part, in one write."""
    server = WSConnection(ConnectionType.SERVER)
    with connection:
        server.receive_data(connection.recv(65536))
        (request,) = server.events()
        assert isinstance(request, WsRequest)
        answer = server.send(AcceptConnection(subprotocol=stream.PROTOCOL))
        for message in (b"\1hi\n", b'\3{"status": "Success"}'):
            answer += server.send(BytesMessage(data=message))
        connection.sendall(answer)
