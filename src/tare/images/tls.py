"""TLS and proxy settings of requests to registries. Contexts are made in threads: reading the system's certificates takes some 20 ms."""

from __future__ import annotations

import asyncio
import ssl
import urllib.request
from urllib.parse import urlsplit

from tare.images.errors import PullError
from tare.images.hosts import Host

Key = tuple[tuple[str, ...], tuple[tuple[str, str], ...], bool]


class Tls:
    """TLS contexts for hosts; the one without files of its own is kept, others are read anew for each pull."""

    def __init__(self) -> None:
        self._plain: dict[bool, ssl.SSLContext] = {}

    async def context(self, host: Host, *, foreign: bool = False) -> ssl.SSLContext:
        """The context to speak to `host`, or (`foreign`) to where it redirects, which never sees its client certificate.

        Raises PullError naming the file that cannot be used.
        """
        client = () if foreign else host.client
        if not host.ca and not client:
            if host.skip_verify not in self._plain:
                self._plain[host.skip_verify] = await asyncio.to_thread(_make, (), (), host.skip_verify)
            return self._plain[host.skip_verify]
        return await asyncio.to_thread(_make, host.ca, client, host.skip_verify)


def _make(ca: tuple[str, ...], client: tuple[tuple[str, str], ...], skip_verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    path = ""
    try:
        for path in ca:
            context.load_verify_locations(cafile=path)
        for path, key in client:
            context.load_cert_chain(path, key or None)
    except (OSError, ssl.SSLError) as error:
        raise PullError(f"read the certificate {path} named in hosts.toml", cause=error) from error
    return context


def proxy_for(url: str) -> str | None:
    """The proxy that the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY, curl's rules) names for a URL."""
    proxies = urllib.request.getproxies()
    parts = urlsplit(url)
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"
