"""Requests to one host: authorised, redirected, retried, and with failures in plain words.

- A 401 is answered once for each request (`auth.Authorizer`); 401 and 403 are not tried again.
- Redirects are followed here, so that credentials, configured headers and client certificates stay with the host.
- 429 and 5xx are tried again after a pause that doubles, or the one that Retry-After asks for.
- Nothing waits for ever: connecting and each read have a deadline.
- What is reported names host, step, status and the registry's own words, never a query string or a secret.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import os
import random
import ssl
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

import msgspec
from yarl import URL

from tare.images.auth import Authorizer, Credentials, TokenRequest, Unauthorized
from tare.images.errors import PullError, RegistryUnavailable
from tare.images.hosts import Host, is_loopback
from tare.images.tls import Tls, proxy_for

if TYPE_CHECKING:
    import aiohttp
else:
    from tare.images import later as aiohttp

log = logging.getLogger(__name__)

MAX_REDIRECTS = 8
MAX_TOKEN_BYTES = 256 << 10
MAX_WORDS = 4 << 10
REDIRECTS = frozenset({301, 302, 303, 307, 308})


Trace = Callable[[int, str], None]
Body = Callable[[], AsyncIterable[bytes] | bytes]


def silent(depth: int, text: str) -> None:
    """Nobody wants to know."""


class TooSlow(TimeoutError):
    """A transfer goes on, but so slowly that another host should be asked."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request, as its caller meant it."""

    method: str
    path: str
    scope: str
    step: str
    headers: dict[str, str]
    accept: frozenset[int]
    body: Body | None


class Refused(PullError):
    """The host answered with a status that means no."""

    def __init__(self, doing: str, status: int, **more: str | None) -> None:
        super().__init__(doing, **more)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Deadlines and pauses in seconds. `progress` ends a read on which nothing arrives, or over so long less than `min_rate` bytes a second.

    Blobs of more than `range_size` bytes are asked for in ranges of that size, `ranges` at a time.
    """

    progress: float = 60.0
    attempts: int = 4
    pause: float = 0.5
    longest_pause: float = 30.0
    min_rate: int = 8 << 10
    range_size: int = 64 << 20
    ranges: int = 3


class _ErrorItem(msgspec.Struct):
    code: str = ""
    message: str = ""


class _ErrorBody(msgspec.Struct):
    """Distribution spec, "Error Codes"."""

    errors: list[_ErrorItem] = []


class Endpoint:
    """One host, as one pull speaks to it."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        host: Host,
        credentials: Credentials | None,
        tls: Tls,
        patience: Patience,
        trace: Trace = silent,
    ) -> None:
        self.host = host
        self._trace = trace
        self._session = session
        self._tls = tls
        self._contexts: dict[bool, ssl.SSLContext] = {}
        self._patience = patience
        self._base = host.url
        known = credentials if host.upstream else None  # never to a mirror
        self._authorizer = Authorizer(known, host.name, secure=host.url.startswith("https"))

    @asynccontextmanager
    async def request(
        self,
        method: str,
        path: str,
        *,
        scope: str,
        step: str,
        headers: Mapping[str, str] | None = None,
        accept: Collection[int] = (200, 206),
        body: Body | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response of a status in `accept` to a request for `path` below the API's root, or for an address that this host gave.

        The response's body is the caller's to read; `body` makes the request's own, anew for each attempt.
        Raises RegistryUnavailable, Unauthorized, Refused or PullError.
        """
        asked = Asked(method, path, scope, step, dict(headers or {}), frozenset(accept), body)
        response = await self._with_retries(asked)
        try:
            yield response
        finally:
            # Closing costs the connection, but what is left of a body is not waited for.
            response.release() if response.content.at_eof() else response.close()

    async def _with_retries(self, asked: Asked) -> aiohttp.ClientResponse:
        attempt, step = 0, asked.step
        while True:
            attempt += 1
            try:
                response = await self._authorised(asked)
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                if isinstance(error, aiohttp.ClientConnectorError) or attempt >= self._patience.attempts:
                    raise self._unreachable(step, error) from error
                await asyncio.sleep(self._pause(attempt, None))
                continue
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                raise self._unreachable(step, error) from error
            if response.status in asked.accept:
                return response
            again = response.status == 429 or response.status >= 500
            pause = self._pause(attempt, response.headers.get("Retry-After"))
            if again and attempt < self._patience.attempts and pause <= self._patience.longest_pause:
                log.info("%s: %s: status %d, again in %.1f s", self.host.name, step, response.status, pause)
                response.close()
                await asyncio.sleep(pause)
                continue
            raise await self._refusal(response, step)

    def _pause(self, attempt: int, retry_after: str | None) -> float:
        """Seconds until the next attempt: what the server asks for, else doubling, with some chance in it so that a crowd spreads out."""
        if retry_after is not None:
            if retry_after.strip().isdigit():
                return float(retry_after)
            try:
                until = email.utils.parsedate_to_datetime(retry_after).timestamp()
            except (ValueError, TypeError, OverflowError):
                until = 0.0
            if until:
                return max(until - time.time(), 0.0)
        doubled: float = self._patience.pause * 2 ** (attempt - 1)
        return min(doubled, self._patience.longest_pause) * random.uniform(0.75, 1.0)

    async def _authorised(self, asked: Asked) -> aiohttp.ClientResponse:
        """Send it, and once more after a challenge."""
        scope = asked.scope
        authorization = self._authorizer.authorization(scope, time.monotonic())
        response = await self._send(asked, authorization)
        if response.status != 401:
            return response
        challenges = response.headers.getall("WWW-Authenticate", [])
        try:
            if authorization is not None and authorization.startswith("Basic"):
                raise await self._refusal(response, asked.step)
            request = self._authorizer.challenged(challenges, scope)
        finally:
            response.close()
        if request is not None:
            await self._fetch_token(request)
        return await self._send(asked, self._authorizer.authorization(scope, time.monotonic()))

    def location(self, response: aiohttp.ClientResponse, path: str) -> str:
        """The address that an answer to a request for `path` names; it may be relative. Raises PullError."""
        text = response.headers.get("Location", "")
        url = urljoin(self._url(path), text)
        if not text or urlsplit(url).scheme not in ("http", "https"):
            raise PullError(f"ask {self.host.name}", cause="its answer does not say where to go on")
        return url

    def _url(self, path: str) -> str:
        if "://" in path:
            return path
        mark = "&" if "?" in path else "?"
        query = f"{mark}ns={self.host.namespace}" if self.host.namespace else ""
        return f"{self._base}{self.host.path}{path}{query}"

    async def _send(self, asked: Asked, authorization: str | None) -> aiohttp.ClientResponse:
        own = {**asked.headers, **dict(self.host.headers)}
        if authorization:
            own["Authorization"] = authorization
            self._trace(1, f"authorised by {authorization.partition(' ')[0]}")
        base = self._base
        try:
            return await self._follow(asked, self._url(asked.path), own)
        except (aiohttp.ClientConnectorSSLError, aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
            if self._base == base and not self._falls_back(error):
                raise
        log.debug("%s does not speak TLS; it is on this machine, so plain HTTP is used", self.host.name)
        self._base = "http://" + base.removeprefix("https://")
        self._trace(1, "it does not speak TLS and is on this machine: plain HTTP")
        return await self._follow(asked, self._url(asked.path), own)

    def _falls_back(self, error: Exception) -> bool:
        """Is it a registry on this machine's loopback that cannot do TLS? A bad certificate is no such thing."""
        if not self.host.plain_fallback or not self._base.startswith("https"):
            return False
        if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, aiohttp.ClientSSLError):
            return isinstance(error.os_error, ConnectionResetError)
        return not isinstance(error, aiohttp.ClientConnectorCertificateError)

    async def _follow(self, asked: Asked, url: str, own: dict[str, str]) -> aiohttp.ClientResponse:
        """Send a request, following redirects: with the headers `own` at this host, with none but those of the request elsewhere."""
        home, method = origin(self._base), asked.method
        for _ in range(MAX_REDIRECTS):
            at_home = origin(url) == home
            response = await self._session.request(
                method,
                URL(url, encoded=True),
                headers={"Accept-Encoding": "identity", **(own if at_home else asked.headers)},
                data=asked.body() if asked.body else None,
                allow_redirects=False,
                ssl=await self._context(url, foreign=not at_home),
                proxy=proxy_for(url),
                timeout=aiohttp.ClientTimeout(
                    total=None, sock_connect=self.host.dial_timeout, sock_read=self._patience.progress
                ),
            )
            location = response.headers.get("Location")
            self._trace(1, f"{method} {shown(url)}: status {response.status}")
            if response.status not in REDIRECTS or not location:
                return response
            self._trace(1, "a redirect" + ("" if at_home else ", without credentials"))
            response.close()
            url = urljoin(url, location)
            if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
                raise PullError(f"ask {self.host.name}", cause="it redirects to what is no http or https address")
        raise PullError(f"ask {self.host.name}", cause=f"more than {MAX_REDIRECTS} redirects")

    async def _context(self, url: str, *, foreign: bool) -> ssl.SSLContext | bool:
        if not url.startswith("https:"):
            return True
        if foreign not in self._contexts:
            self._contexts[foreign] = await self._tls.context(self.host, foreign=foreign)
        return self._contexts[foreign]

    async def _fetch_token(self, request: TokenRequest) -> None:
        """Ask the token server. It is not followed anywhere: the request carries credentials."""
        server = urlsplit(request.url).netloc
        how = "with credentials" if request.authorization or request.method == "POST" else "anonymously"
        self._trace(
            1, f"asks for a token for {request.fields.get('scope', '')}: {request.method} {shown(request.url)}, {how}"
        )
        headers = {"Authorization": request.authorization} if request.authorization else {}
        fields = [(name, value) for name, value in request.fields.items() if name != "scope"]
        fields += [("scope", scope) for scope in request.fields.get("scope", "").split()]
        response = await self._session.request(
            request.method,
            URL(request.url).update_query(fields) if request.method == "GET" else URL(request.url),
            data=request.fields if request.method == "POST" else None,
            headers=headers,
            allow_redirects=False,
            ssl=await self._context(request.url, foreign=server != self.host.name),
            proxy=proxy_for(request.url),
            timeout=aiohttp.ClientTimeout(total=self._patience.progress, sock_connect=self.host.dial_timeout),
        )
        try:
            body = await read_at_most(response, MAX_TOKEN_BYTES)
            if response.status >= 300:
                error = await self._refusal(response, "authorise", body=body, who=server)
                raise (
                    error
                    if response.status >= 500 or response.status == 429
                    else Unauthorized(error.doing, cause=error.cause)
                )
        finally:
            response.close()
        self._authorizer.granted(request, body, time.monotonic())

    async def _refusal(
        self, response: aiohttp.ClientResponse, step: str, *, body: bytes | None = None, who: str = ""
    ) -> PullError:
        """What a status other than success means."""
        status = response.status
        try:
            content = body if body is not None else await read_at_most(response, MAX_WORDS)
        except (aiohttp.ClientError, TimeoutError, PullError):
            content = b""
        finally:
            response.close()
        words = self._authorizer.redact(registry_words(content, response.content_type))
        doing = f"{step} at {who or self.host.name}"
        cause = f"status {status}" + (f": {words}" if words else "")
        if status in (401, 403):
            return Unauthorized(
                doing, cause=cause, hint="are the credentials right, and do they allow this repository?"
            )
        if status == 404:
            hint = "is the name right? registries also answer so for repositories that these credentials may not see"
            return Refused(doing, status, cause=f"not found: {cause}", hint=hint)
        if status >= 500:
            return RegistryUnavailable(doing, cause=cause)
        return Refused(doing, status, cause=cause)

    def _unreachable(self, step: str, error: Exception) -> PullError:
        hint = None
        if isinstance(error, aiohttp.ClientConnectorCertificateError):
            hint = "name its certificate authority in hosts.toml: ca = ..."
        elif isinstance(error, aiohttp.ClientSSLError) and not is_loopback(urlsplit(self.host.url).hostname or ""):
            hint = "a registry without TLS must be named with http:// in hosts.toml"
        return RegistryUnavailable(f"{step} at {self.host.name}", cause=transport_words(error), hint=hint)

    def note(self, words: str) -> None:
        """Something that was decided about this host, for who wants to know."""
        self._trace(1, f"{self.host.name}: {words}")

    def interrupted(self, step: str, error: Exception) -> PullError:
        """A body that broke off, as this host's failure."""
        return self._unreachable(step, error)


def shown(url: str) -> str:
    """An address without its query, which may hold a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}{parts.path}"


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: what credentials belong to."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme)


async def read_at_most(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """A body of up to `limit` bytes. Raises PullError for a longer one."""
    parts: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        parts.append(chunk)
        size += len(chunk)
        if size > limit:
            raise PullError("read answer", cause=f"it has more than {limit} bytes")
    return b"".join(parts)


def registry_words(body: bytes, content_type: str) -> str:
    """What a registry says of an error, in one line of at most 300 characters; "" where it says nothing for people."""
    try:
        document = msgspec.json.decode(body, type=_ErrorBody)
        words = "; ".join(": ".join(filter(None, (item.code, item.message))) for item in document.errors)
    except (msgspec.DecodeError, ValueError, RecursionError):
        words = body.decode("utf-8", "replace") if content_type == "text/plain" else ""
    return " ".join("".join(char if char.isprintable() else " " for char in words).split())[:300]


def transport_words(error: Exception) -> str:
    """Why a host could not be spoken to, without addresses that may hold secrets."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"its certificate is not to be trusted: {error.certificate_error}"
    if isinstance(error, aiohttp.ClientConnectorError):
        inner = error.os_error
        text = os.strerror(inner.errno) if inner.errno and inner.errno > 0 else inner.strerror or str(inner)
        return f"no TLS connection: {text}" if isinstance(inner, ssl.SSLError) else text
    if isinstance(error, TooSlow):
        return str(error)
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "it closed the connection"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the transfer broke off"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"its answer is not HTTP ({type(error).__name__})"
