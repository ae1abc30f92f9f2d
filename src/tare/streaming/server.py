"""The HTTP server that exec, attach and port-forward are streamed over.

    POST or GET /exec/TICKET, /attach/TICKET, /portforward/TICKET
      Upgrade: SPDY/3.1    X-Stream-Protocol-Version: v4.channel.k8s.io, …    ─► 101, `SpdySession` or `Forward`
      Upgrade: websocket   Sec-WebSocket-Protocol: v5.channel.k8s.io, …       ─► 101, `WebSocketSession` or `SocketForward`
                           (its ports: those of CRI's request, or else ?port=80&port=443)

A ticket names a request that CRI granted (`tokens`). What a ticket's holder gets is the backend's: it runs the command, joins the container,
dials the port. h11 reads requests, wsproto makes WebSockets; a request's head is bounded in size and time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import h11
from wsproto.utilities import generate_accept_token

from tare.errors import FailedPrecondition, TareError, describe
from tare.streaming import carriers, channels, forward, remote
from tare.streaming.carriers import Stream, bounded
from tare.streaming.peers import SpdyPeer, Tunnel, WebSocketPeer
from tare.streaming.remote import Outcome, Wanted
from tare.streaming.sessions import BadClient, Session, SpdySession, WebSocketSession
from tare.streaming.tokens import Tickets

log = logging.getLogger(__name__)

HEAD_SECONDS = 10.0
HEAD_SIZE = 32 << 10
LIMIT = 512 << 10  # bytes of a connection that are read ahead
IDLE_SECONDS = 4 * 3600.0
MAX_CONNECTIONS = 1000
MAX_PORTS = 64  # in one URL
LINGER_SECONDS, LINGER_SIZE = 1.0, 1 << 20  # a client that was refused may say no more than this to its end
KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 9}  # seconds, seconds, times
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where a client on the node reaches what listens everywhere
SPDY = "SPDY/3.1"
TUNNEL = "SPDY/3.1+portforward.k8s.io"
EXEC, ATTACH, FORWARD = "exec", "attach", "portforward"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a ticket is for: a container's ID or a pod's, a command, the streams, the ports that the pod's client named."""

    target: str
    command: tuple[str, ...] = ()
    wanted: Wanted = Wanted()  # noqa: RUF009 - immutable
    ports: tuple[int, ...] = ()


class Backend(Protocol):
    """Who does what the tickets say. Raises TareError."""

    async def exec(self, request: Request, session: Session) -> Outcome:
        """Run the command to its end with the session as its streams."""

    async def attach(self, request: Request, session: Session) -> Outcome:
        """Join the container's main process, until it ends or the client leaves."""

    async def dial(self, pod_id: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to a port of the pod."""


class Refused(Exception):
    """A request that gets an HTTP status instead of a session."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class Server:
    """Listens on `host` and `port` (0: any free one), with TLS where a context is given, and for local clients on a unix socket at `path`."""

    def __init__(
        self,
        backend: Backend,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        path: Path | None = None,
        idle: float = IDLE_SECONDS,
    ) -> None:
        self._backend, self._host, self._port, self._tls, self._idle = backend, host, port, tls, idle
        self._path = path
        self._local: asyncio.Server | None = None
        self._tickets: Tickets[Request] = Tickets()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: set[asyncio.StreamWriter] = set()  # connections; a task may outlive its own, by a command
        self._crowded = False  # as the log has been told

    async def start(self) -> None:
        """Listen. Raises FailedPrecondition."""
        try:
            self._server = await asyncio.start_server(self._connected, self._host, self._port, limit=LIMIT)
            if self._path is not None:
                self._path.unlink(missing_ok=True)
                self._local = await asyncio.start_unix_server(self._connected_here, self._path, limit=LIMIT)
                self._path.chmod(0o600)
        except OSError as error:
            raise FailedPrecondition(f"stream on {self._host} port {self._port}", cause=error) from error
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """End every session, whose clients have a while to take what they were told."""
        for server in (self._server, self._local):
            if server is not None:
                server.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=carriers.CLOSE_SECONDS)
        for writer in self._open:
            writer.transport.abort()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=carriers.CLOSE_SECONDS)
            if late:
                log.warning("streaming: %d sessions do not end", len(late))

    def url(self, kind: str, request: Request) -> str:
        """A URL that is good once, for a minute. Raises ResourceExhausted."""
        host = ANY.get(self._host, self._host)
        host = f"[{host}]" if ":" in host else host
        scheme = "https" if self._tls else "http"
        return f"{scheme}://{host}:{self._port}/{kind}/{self._tickets.issue(kind, request)}"

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._begin(reader, writer, self._tls)

    def _connected_here(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._begin(reader, writer, None)

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tls: ssl.SSLContext | None) -> None:
        if len(self._open) >= MAX_CONNECTIONS:
            if not self._crowded:
                log.warning("streaming: %d connections are open, further ones are turned away", len(self._open))
            self._crowded = True
            writer.close()
            return
        self._crowded = False
        self._open.add(writer)
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer, tls))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tls: ssl.SSLContext | None
    ) -> None:
        """One connection, counted from before its TLS handshake."""
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_SIZE)
        try:
            if tls is not None:
                await writer.start_tls(tls, ssl_handshake_timeout=HEAD_SECONDS)
            try:
                head = await read_head(http, reader)
                await self._answer(http, head, reader, writer)
            except Refused as refusal:
                await refuse(http, reader, writer, refusal)
        except (OSError, TimeoutError, h11.RemoteProtocolError, h11.LocalProtocolError) as error:
            log.debug("streaming connection: %s", describe(error))
        except Exception as error:  # noqa: BLE001 - a session's failure is its own; the server goes on
            log.warning("streaming: %s", describe(error))
        finally:
            writer.close()
            self._open.discard(writer)

    async def _answer(
        self, http: h11.Connection, head: h11.Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        path, _, query = head.target.decode("ascii", "replace").partition("?")
        kind, _, ticket = path.strip("/").partition("/")
        if kind not in (EXEC, ATTACH, FORWARD):
            raise Refused(404, "no such path")
        if head.method not in (b"GET", b"POST"):
            raise Refused(405, "only GET and POST are possible here")
        upgrade = values(head, b"upgrade")
        if not any("upgrade" in value.lower() for value in values(head, b"connection")) or not upgrade:
            raise Refused(400, "this takes an upgrade, to SPDY/3.1 or to a WebSocket")
        spdy = upgrade[0].lower() == SPDY.lower()
        if not spdy and upgrade[0].lower() != "websocket":
            raise Refused(400, f"there is no upgrade to {upgrade[0]!r}")
        protocol = self._protocol(kind, head, spdy=spdy)
        headers = answer(head, protocol, spdy=spdy)
        ports = ports_of(query) if kind == FORWARD and protocol in (channels.V4, channels.V4_BASE64) else None
        request = self._tickets.redeem(kind, ticket)
        if request is None:
            raise Refused(404, "this URL was used already, is too old, or was never handed out")
        if ports is not None and not request.ports:
            request = replace(request, ports=ports)
            if not ports:
                raise Refused(400, "no port was named: CRI's request did not, and there is no port= here")
        writer.write(http.send(h11.InformationalResponse(status_code=101, headers=headers)) or b"")
        await writer.drain()
        carrier = Stream(reader, writer, http.trailing_data[0], partial(self._open.discard, writer))
        peer = SpdyPeer(carrier, self._idle) if spdy else WebSocketPeer(carrier, self._idle)
        peer.begin()
        await self._session(kind, request, protocol, peer)

    def _protocol(self, kind: str, head: h11.Request, *, spdy: bool) -> str:
        """The sub-protocol. Raises Refused where client and server have none in common."""
        offered = words(values(head, b"x-stream-protocol-version" if spdy else b"sec-websocket-protocol"))
        if kind == FORWARD:
            known: Sequence[str] = (forward.PROTOCOL,) if spdy else (TUNNEL, channels.V4, channels.V4_BASE64)
            found = remote.chosen(offered, known) if offered or not spdy else forward.PROTOCOL
        elif spdy:
            known = remote.SPDY_PROTOCOLS
            found = remote.chosen(offered, known)
        else:
            known = channels.PROTOCOLS
            found = remote.chosen(offered, known) if offered else ""
        if found is None or (not spdy and offered and found not in offered):
            raise Refused(403, f"none of the protocols {', '.join(offered)} is spoken here: {', '.join(known)} are")
        return found

    async def _session(self, kind: str, request: Request, protocol: str, peer: SpdyPeer | WebSocketPeer) -> None:
        """What follows the upgrade."""
        if kind == FORWARD:
            await self._forward(request, protocol, peer)
            return
        session = (
            SpdySession(peer, protocol, request.wanted)
            if isinstance(peer, SpdyPeer)
            else WebSocketSession(peer, protocol, request.wanted)
        )
        try:
            await session.open()
            run = self._backend.exec if kind == EXEC else self._backend.attach
            outcome = await run(request, session)
        except BadClient as error:
            outcome = Outcome(error=str(error))
        except (TareError, OSError) as error:
            outcome = Outcome(error=describe(error))
        except asyncio.CancelledError:
            await bounded(session.finish(Outcome(error="the server ends")))
            peer.drop()
            raise
        await session.finish(outcome)

    async def _forward(self, request: Request, protocol: str, peer: SpdyPeer | WebSocketPeer) -> None:
        async def dial(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            return await self._backend.dial(request.target, port)

        if isinstance(peer, SpdyPeer):
            await forward.Forward(peer, dial).serve()
        elif protocol == TUNNEL:
            inner = SpdyPeer(Tunnel(peer), self._idle)
            inner.begin()
            await forward.Forward(inner, dial).serve()
        else:
            await forward.SocketForward(peer, protocol, request.ports, dial).serve()


async def read_head(http: h11.Connection, reader: asyncio.StreamReader) -> h11.Request:
    """A request's head. Raises Refused, TimeoutError, RemoteProtocolError."""
    async with asyncio.timeout(HEAD_SECONDS):
        while True:
            try:
                event = http.next_event()
            except h11.RemoteProtocolError as error:
                raise Refused(error.error_status_hint, "a request that is none, or whose head is too big") from error
            if isinstance(event, h11.Request):
                return event
            if event is not h11.NEED_DATA:
                raise h11.RemoteProtocolError("no request")
            http.receive_data(await reader.read(HEAD_SIZE))


async def refuse(
    http: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, refusal: Refused
) -> None:
    """An HTTP answer in plain words. What else the client says is read: closed with something unread, TCP would throw the answer away."""
    body = f"{refusal}\n".encode()
    headers = [
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    data = http.send(h11.Response(status_code=refusal.status, headers=headers)) or b""
    data += http.send(h11.Data(data=body)) or b""
    data += http.send(h11.EndOfMessage()) or b""
    writer.write(data)
    await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            left = LINGER_SIZE
            while left > 0 and (more := await reader.read(HEAD_SIZE)):
                left -= len(more)


def values(head: h11.Request, name: bytes) -> list[str]:
    """A header's values."""
    return [value.decode("latin-1").strip() for key, value in head.headers if key == name]


def ports_of(query: str) -> tuple[int, ...]:
    """The ports that a URL names. Raises Refused."""
    try:
        ports = tuple(forward.port_of(text) for name, text in urllib.parse.parse_qsl(query) if name == "port")
    except forward.BadPort as error:
        raise Refused(400, str(error)) from error
    if len(ports) > MAX_PORTS:
        raise Refused(400, f"{len(ports)} ports were named, at most {MAX_PORTS} are possible")
    return ports


def words(given: Sequence[str]) -> list[str]:
    """Comma-separated words."""
    return [word.strip() for value in given for word in value.split(",") if word.strip()]


def answer(head: h11.Request, protocol: str, *, spdy: bool) -> list[tuple[str, str]]:
    """The headers of 101. Raises Refused for a WebSocket's handshake that is none."""
    if spdy:
        named = [("X-Stream-Protocol-Version", protocol)] if values(head, b"x-stream-protocol-version") else []
        return [("Connection", "Upgrade"), ("Upgrade", SPDY), *named]
    key, version = values(head, b"sec-websocket-key"), values(head, b"sec-websocket-version")
    if len(key) != 1 or version != ["13"] or head.method != b"GET":
        raise Refused(400, "a WebSocket begins with GET, one Sec-WebSocket-Key and version 13")
    accept = generate_accept_token(key[0].encode()).decode()
    named = [("Sec-WebSocket-Protocol", protocol)] if protocol else []
    return [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Accept", accept), *named]
