"""How a client answers a registry that asks who it is: Basic (RFC 7617) and Bearer tokens (distribution spec, "token authentication"). Sans-io.

    request ─► 401, WWW-Authenticate ─► challenged() ─► None: ask again with `authorization()`
                                                    └─► TokenRequest: perform it, hand its answer to granted(), ask again

An `Authorizer` belongs to one host of one pull, so that one tenant's token never serves another. Without credentials it
asks for an anonymous token. Nothing here is printed: secrets are kept out of every repr, and `redact` takes them out of
what a server echoes.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec

from tare.images.errors import PullError
from tare.images.hosts import is_loopback

CLIENT_ID = "tare"
MIN_TOKEN_SECONDS = 60.0  # how long a token holds where its server does not say (distribution spec)
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'\s*({_TOKEN})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))')
_SCHEME = re.compile(rf"[\s,]*({_TOKEN})(?=[\s,]|$)")
_DOCKER_HUB = {"index.docker.io", "registry-1.docker.io", "docker.io"}


class Unauthorized(PullError):
    """The registry does not let this client have it (401, 403). Not retried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryAuth:
    """CRI AuthConfig. `auth` is base64 of "user:password", used where `username` is empty."""

    username: str = ""
    password: str = field(default="", repr=False)
    auth: str = field(default="", repr=False)
    server_address: str = ""
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What of a RegistryAuth applies to one registry."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of a Basic Authorization header."""
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


@dataclass(frozen=True, slots=True)
class Challenge:
    """One challenge: the scheme in lowercase, and its parameters with names in lowercase."""

    scheme: str
    parameters: dict[str, str]


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """What to ask a token server: GET with `fields` as query, or POST with them as a form."""

    method: str
    url: str
    scope: str
    fields: dict[str, str] = field(repr=False)
    authorization: str | None = field(default=None, repr=False)


class _TokenAnswer(msgspec.Struct):
    token: str = ""
    access_token: str = ""
    expires_in: float | None = None


def credentials_for(auth: RegistryAuth | None, domain: str) -> Credentials | None:
    """The credentials for the registry `domain`; None where there are none, or where they are another server's.

    Raises PullError if `auth.auth` is not base64 of "user:password".
    """
    if auth is None or (auth.server_address and not _is_server(auth.server_address, domain)):
        return None
    username, password = auth.username, auth.password
    if not username and auth.auth:
        try:
            text = base64.b64decode(auth.auth, validate=True).decode()
        except (binascii.Error, UnicodeDecodeError):
            text = ""
        username, mark, password = text.partition(":")
        if not mark:
            raise PullError("read credentials", cause="the field auth is not base64 of user:password")
        password = password.rstrip("\0")
    if not (username or auth.identity_token or auth.registry_token):
        return None
    return Credentials(username, password, auth.identity_token, auth.registry_token)


def _is_server(address: str, domain: str) -> bool:
    """Does a server address ("https://index.docker.io/v1/", "quay.io") mean the registry of this domain?"""
    try:
        netloc = urlsplit(address if "://" in address else f"//{address}").netloc.lower()
    except ValueError:
        return False
    return netloc == domain.lower() or (domain in _DOCKER_HUB and netloc in _DOCKER_HUB)


def parse_challenges(values: Iterable[str]) -> list[Challenge]:
    """The challenges of WWW-Authenticate headers (RFC 9110, 11.6.1), in order; what is not understood is passed over."""
    challenges: list[Challenge] = []
    for value in values:
        position = 0
        while position < len(value):
            parameter = _PARAMETER.match(value, position)
            scheme = None if parameter else _SCHEME.match(value, position)
            if parameter and challenges:
                quoted = parameter[2]
                text = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else parameter[3]
                challenges[-1].parameters.setdefault(parameter[1].lower(), text)
            elif scheme:
                challenges.append(Challenge(scheme[1].lower(), {}))
            found = parameter or scheme
            position = found.end() if found else position + 1
            while value.startswith((",", " "), position):
                position += 1
    return challenges


class Authorizer:
    """What one host has been told and is to be told. `secure` says that the host is spoken to over TLS."""

    def __init__(self, credentials: Credentials | None, host: str, *, secure: bool) -> None:
        self._credentials = credentials
        self._host = host
        self._secure = secure
        self._basic = False
        self._tokens: dict[str, tuple[str, float]] = {}

    def authorization(self, scope: str, now: float) -> str | None:
        """The Authorization header for a request of `scope` ("repository:NAME:pull") at `now` (monotonic seconds), if one is known to be wanted."""
        token, expiry = self._tokens.get(scope, ("", 0.0))
        if token and now < expiry:
            return f"Bearer {token}"
        return self._credentials.basic if self._basic and self._credentials else None

    def challenged(self, values: Iterable[str], scope: str) -> TokenRequest | None:
        """Answer a 401 to a request that was not yet answered for once. Raises Unauthorized where nothing can be offered."""
        challenges = {challenge.scheme: challenge for challenge in reversed(parse_challenges(values))}
        if "bearer" in challenges:
            if self._credentials and self._credentials.registry_token:
                self._tokens[scope] = (self._credentials.registry_token, float("inf"))
                return None
            return self._token_request(challenges["bearer"].parameters, scope)
        if "basic" in challenges:
            if self._credentials is None or not self._credentials.username:
                raise Unauthorized(
                    f"authorise at {self._host}", cause="it asks for a user and a password, and none were given"
                )
            self._basic = True
            return None
        offered = ", ".join(challenges) or "nothing"
        raise Unauthorized(
            f"authorise at {self._host}", cause=f"401, and the ways to authorise that it offers are: {offered[:200]}"
        )

    def _token_request(self, parameters: dict[str, str], scope: str) -> TokenRequest:
        realm = parameters.get("realm", "")
        try:
            url = urlsplit(realm)
            valid = url.scheme in ("http", "https") and bool(url.hostname) and "@" not in url.netloc
        except ValueError:
            valid = False
        if not valid:
            raise Unauthorized(f"authorise at {self._host}", cause=f"its token server {realm[:200]!r} is no address")
        fields = {"scope": parameters.get("scope") or scope}
        if "service" in parameters:
            fields["service"] = parameters["service"]
        known = self._credentials
        if known is None:
            return TokenRequest("GET", realm, scope, fields)
        if self._secure and url.scheme == "http" and not is_loopback(url.hostname or ""):
            raise Unauthorized(
                f"authorise at {self._host}",
                cause=f"its token server {url.netloc[:200]} is not on TLS; credentials are not sent there",
            )
        if known.identity_token:
            grant = {"grant_type": "refresh_token", "refresh_token": known.identity_token, "client_id": CLIENT_ID}
            return TokenRequest("POST", realm, scope, fields | grant)
        return TokenRequest("GET", realm, scope, {**fields, "account": known.username}, known.basic)

    def granted(self, request: TokenRequest, body: bytes, now: float) -> None:
        """Keep the token that the server answered with. Raises PullError if there is none in it."""
        try:
            answer = msgspec.json.decode(body, type=_TokenAnswer)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise PullError(
                f"authorise at {self._host}", cause="the token server's answer is not what it should be"
            ) from error
        token = answer.token or answer.access_token
        if not token or not token.isascii() or not token.isprintable():
            raise PullError(f"authorise at {self._host}", cause="the token server answered without a token")
        self._tokens[request.scope] = (token, now + max(answer.expires_in or 0.0, MIN_TOKEN_SECONDS))

    def redact(self, text: str) -> str:
        """`text` without any secret of this host's that it holds."""
        secrets = [token for token, _ in self._tokens.values()]
        if self._credentials:
            known = self._credentials
            secrets += [known.password, known.identity_token, known.registry_token, known.basic.removeprefix("Basic ")]
        for secret in filter(None, secrets):
            text = text.replace(secret, "***")
        return text
