"""A bearer token server for docker-registry (distribution spec, "Token Authentication"): JSON web tokens signed by openssl.

    with TokenServer(tmp_path / "tokens", users={"alice": "secret"}, allowed={"alice": {"demo/*"}, "": {"public/*"}}) as tokens:
        with Registry(tmp_path / "registry", token=tokens.auth) as registry: ...

GET takes Basic credentials or none; POST takes `refresh_token` (identity tokens are "idt-USER"). `seen` lists what was asked.
"""

from __future__ import annotations

import base64
import fnmatch
import json
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from tests.support.certificates import self_signed
from tests.support.registry import TokenAuth

ISSUER, SERVICE = "tare tests", "registry.tests"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request for a token."""

    method: str
    fields: dict[str, str]
    authorization: str


class TokenServer:
    """Gives tokens for what `allowed` lets a user ("" for anybody) pull and push: patterns of repository names."""

    def __init__(
        self, directory: Path, *, users: Mapping[str, str], allowed: Mapping[str, set[str]], seconds: int = 300
    ) -> None:
        self.certificate = self_signed(directory, "issuer")
        self.users = dict(users)
        self.allowed = dict(allowed)
        self.seconds = seconds
        self.seen: list[Asked] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self, urlsplit(self.path).query)

            def do_POST(self) -> None:
                server.answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)

    @property
    def auth(self) -> TokenAuth:
        """What a registry must be told to use these tokens."""
        realm = f"http://127.0.0.1:{self._http.server_port}/token"
        return TokenAuth(realm=realm, service=SERVICE, issuer=ISSUER, certificate=self.certificate.certificate)

    def __enter__(self) -> TokenServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def answer(self, handler: BaseHTTPRequestHandler, query: str) -> None:
        """Answer one request."""
        fields = {name: " ".join(values) for name, values in parse_qs(query).items()}  # scope may come several times
        authorization = handler.headers.get("Authorization", "")
        self.seen.append(Asked(handler.command, fields, authorization))
        user = self._user(handler.command, fields, authorization)
        status = 200 if user is not None else 401
        body: dict[str, object] = {"errors": [{"code": "UNAUTHORIZED", "message": f"no such user: {authorization}"}]}
        if user is not None:
            token = self._token(user, fields.get("scope", ""))
            body = {"access_token" if handler.command == "POST" else "token": token, "expires_in": self.seconds}
        data = json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    def _user(self, method: str, fields: Mapping[str, str], authorization: str) -> str | None:
        """Who asks: "" without credentials, None with wrong ones."""
        if method == "POST":
            user = fields.get("refresh_token", "").removeprefix("idt-")
            return user if fields.get("grant_type") == "refresh_token" and user in self.users else None
        if not authorization:
            return ""
        user, _, password = base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")
        return user if self.users.get(user) == password else None

    def _token(self, user: str, scope: str) -> str:
        access = []
        for one in scope.split():
            kind, _, rest = one.partition(":")
            repository, _, actions = rest.rpartition(":")
            if any(fnmatch.fnmatch(repository, pattern) for pattern in self.allowed.get(user, ())):
                access.append({"type": kind, "name": repository, "actions": actions.split(",")})
        now = int(time.time())
        claims = {
            "iss": ISSUER, "sub": user, "aud": SERVICE, "exp": now + self.seconds, "nbf": now - 10, "iat": now - 10,
            "jti": f"{now}-{len(self.seen)}", "access": access,
        }  # fmt: skip
        chain = "".join(self.certificate.certificate.read_text().split("-----")[2].split())
        head = {"typ": "JWT", "alg": "RS256", "x5c": [chain]}
        signed = f"{_base64(json.dumps(head).encode())}.{_base64(json.dumps(claims).encode())}"
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self.certificate.key)],
            input=signed.encode(), capture_output=True, check=True, timeout=30,
        )  # fmt: skip
        return f"{signed}.{_base64(signature.stdout)}"


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
