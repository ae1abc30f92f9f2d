"""A proxy that stands before a registry and does what registries and networks do at their worst, exactly when a test says so.

    def script(request: Asked) -> Fault | None: ...
    with FaultProxy(registry.url, script) as proxy: pull(f"{proxy.url}/demo/hello")

`seen` lists every request that came; `sent` counts the bytes of bodies that went out.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PIECE = 16 << 10


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: header names in lowercase."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def is_blob(self) -> bool:
        """Does it ask for a blob?"""
        return "/blobs/" in self.path


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What to do instead of passing a request on whole.

    `status` (with `headers` and `body`) answers it here; otherwise the registry's answer is passed on, but the connection is
    closed (`cut`) or nothing more is sent (`stall`) after so many bytes of body, or one byte is changed (`corrupt`);
    `ignore_range` takes the Range header away. `drop` closes the connection at once.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    cut: int | None = None
    stall: int | None = None
    corrupt: bool = False
    ignore_range: bool = False
    drop: bool = False


Script = Callable[[Asked], Fault | None]


class FaultProxy:
    """Listens on a free loopback port and passes requests on to `target` (host:port)."""

    def __init__(self, target: str, script: Script = lambda _: None) -> None:
        self.target = target
        self.script = script
        self.seen: list[Asked] = []
        self.sent = 0
        self._over = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.handle(self)

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def blobs(self) -> list[str]:
        """The digests of the blobs that were asked for, in order."""
        return [asked.path.rpartition("/")[2].partition("?")[0] for asked in self.seen if asked.is_blob]

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        """Serve one request."""
        asked = Asked(handler.command, handler.path, {name.lower(): value for name, value in handler.headers.items()})
        self.seen.append(asked)
        fault = self.script(asked) or Fault()
        try:
            if fault.drop:
                handler.close_connection = True
            elif fault.status:
                self._answer(handler, fault.status, fault.headers, fault.body)
            else:
                self._pass_on(handler, asked, fault)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True  # the client has gone, as it may

    def _answer(self, handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if handler.command != "HEAD":
            handler.wfile.write(body)

    def _pass_on(self, handler: BaseHTTPRequestHandler, asked: Asked, fault: Fault) -> None:
        upstream = http.client.HTTPConnection(self.target, timeout=30)
        try:
            skipped = {"host", "connection"} | ({"range"} if fault.ignore_range else set())
            upstream.request(
                asked.method, asked.path, headers={k: v for k, v in asked.headers.items() if k not in skipped}
            )
            response = upstream.getresponse()
            handler.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("connection", "date", "transfer-encoding"):
                    handler.send_header(name, value)
            handler.end_headers()
            self._body(handler, response, fault)
        finally:
            upstream.close()

    def _body(self, handler: BaseHTTPRequestHandler, response: http.client.HTTPResponse, fault: Fault) -> None:
        position = 0
        limit = fault.cut if fault.cut is not None else fault.stall
        while piece := response.read(PIECE):
            if limit is not None:
                piece = piece[: limit - position]
            if fault.corrupt and position == 0:
                middle = len(piece) // 2
                piece = piece[:middle] + bytes([piece[middle] ^ 1]) + piece[middle + 1 :]
            handler.wfile.write(piece)
            position += len(piece)
            self.sent += len(piece)
            if limit is not None and position >= limit:
                handler.close_connection = True
                handler.wfile.flush()
                if fault.stall is not None:
                    self._over.wait(60)
                return
