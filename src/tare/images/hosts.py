"""Where a registry's images are fetched: containerd's `hosts.toml` files (containerd docs, "hosts.md"), one folder for each registry.

    <hosts_dir>/docker.io/hosts.toml        or quay.io, registry.example_5000_ (or registry.example:5000), _default for all others

        server = "https://registry-1.docker.io"         # the registry itself, asked last; without it, the registry's own address
        [host."https://mirror.example"]                 # asked before, in the file's order
          capabilities = ["pull", "resolve"]            # without resolve it is asked for digests only
          skip_verify, ca, client, header, override_path, dial_timeout

Files are read for each pull, so that a change holds at once. A registry on this machine's loopback that no file speaks of
is spoken to over TLS and, where it does not know TLS, in plain HTTP.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from tare.errors import UnknownError

FILE = "hosts.toml"
DOCKER_HUB = "docker.io"
DOCKER_HUB_HOST = "registry-1.docker.io"
CAPABILITIES = frozenset({"pull", "resolve", "push", "referrers"})
DIAL_SECONDS = 30.0
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+")
_KEYS = {"capabilities", "skip_verify", "ca", "client", "header", "override_path", "dial_timeout"}


class HostsError(UnknownError):
    """A hosts.toml cannot be used; the message names the file and the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One place to ask. `url` is scheme://host[:port], `path` the root of the API there.

    `namespace` is sent as `?ns=` where the place stands in for a registry of another name. `ca` and `client` are paths of
    PEM files (client: pairs of certificate and key, the key "" where it is in the same file). `dial_timeout` in seconds.
    """

    url: str
    path: str = "/v2"
    capabilities: frozenset[str] = CAPABILITIES
    upstream: bool = False
    namespace: str = ""
    plain_fallback: bool = False
    skip_verify: bool = False
    ca: tuple[str, ...] = ()
    client: tuple[tuple[str, str], ...] = ()
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    dial_timeout: float = DIAL_SECONDS

    @property
    def name(self) -> str:
        """host[:port], for messages."""
        return urlsplit(self.url).netloc

    def serves(self, *, by_tag: bool) -> bool:
        """Is it to be asked for a tag, or for a digest?"""
        return "resolve" in self.capabilities if by_tag else bool(self.capabilities & {"pull", "resolve"})


def is_loopback(hostname: str) -> bool:
    """localhost, 127.0.0.0/8 or ::1 (without a port)."""
    if hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(hostname.strip("[]")).is_loopback
    except ValueError:
        return False


def upstream(domain: str) -> Host:
    """The registry itself, where no file says otherwise."""
    address = DOCKER_HUB_HOST if domain == DOCKER_HUB else domain
    parts = urlsplit(f"//{address}")
    port = _port(address)
    scheme = "http" if port == 80 else "https"
    return Host(
        url=f"{scheme}://{address}",
        upstream=True,
        plain_fallback=scheme == "https" and port != 443 and is_loopback(parts.hostname or ""),
    )


def _port(address: str) -> int | None:
    _, mark, port = address.rpartition(":")
    return int(port) if mark and port.isdigit() else None


def folders(hosts_dir: Path, domain: str) -> list[Path]:
    """Where a registry's file may be; the first folder that exists decides."""
    name, mark, port = domain.rpartition(":")
    names = [f"{name}_{port}_"] if mark and port.isdigit() else []
    return [hosts_dir / folder for folder in (*names, domain, "_default")]


def read(hosts_dir: Path, domain: str) -> tuple[Host, ...]:
    """The hosts to ask for images of `domain`, in order, the registry itself last. Raises HostsError."""
    folder = next((path for path in folders(hosts_dir, domain) if path.is_dir()), None)
    if folder is None:
        return (upstream(domain),)
    file = folder / FILE
    try:
        text = file.read_text()
    except FileNotFoundError:
        return (upstream(domain),)
    except (OSError, UnicodeDecodeError) as error:
        raise HostsError(f"read {file}", cause=error) from error
    return parse(text, domain, file)


def parse(text: str, domain: str, file: Path) -> tuple[Host, ...]:
    """What the text of `file` says for `domain`. Raises HostsError."""
    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise HostsError(f"read {file}", cause=error) from error
    mirrors = document.pop("host", {})
    server = document.pop("server", "")
    if not isinstance(mirrors, dict) or not isinstance(server, str):
        raise HostsError(f"read {file}", cause="host must be tables and server a string")
    hosts = []
    for url, table in mirrors.items():
        if not isinstance(table, dict):
            raise HostsError(f"read {file}", cause=f"host {url} is no table")
        hosts.append(_host(url, table, domain, file, upstream=False))
    own = upstream(domain)
    last = _host(server or own.url, document, domain, file, upstream=True)
    return (*hosts, last if server or document else own)


def _host(url: str, table: Mapping[str, object], domain: str, file: Path, *, upstream: bool) -> Host:
    reader = _Reader(table, file, f'host."{url}"' if not upstream else "server")
    full = url if "://" in url else f"https://{url}"
    try:
        parts = urlsplit(full)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
        _ = parts.port
    except ValueError:
        valid = False
    if not valid:
        raise reader.error(f"{url!r} is no http or https address")
    override = reader.flag("override_path")
    path = posixpath.normpath(parts.path) if parts.path.strip("/") else ""
    if not override and not path.endswith("/v2"):
        path += "/v2"
    stands_in = parts.netloc != domain and not (domain == DOCKER_HUB and parts.netloc == DOCKER_HUB_HOST)
    capabilities = frozenset(reader.strings("capabilities")) or CAPABILITIES
    if not capabilities <= CAPABILITIES:
        raise reader.error(f"unknown capability {', '.join(sorted(capabilities - CAPABILITIES))}")
    return Host(
        url=f"{parts.scheme}://{parts.netloc}",
        path=path,
        capabilities=capabilities,
        upstream=upstream,
        namespace=domain if stands_in else "",
        skip_verify=reader.flag("skip_verify"),
        ca=tuple(str(file.parent / path) for path in reader.strings("ca")),
        client=reader.pairs("client"),
        headers=reader.headers(),
        dial_timeout=reader.duration("dial_timeout", DIAL_SECONDS),
    )


class _Reader:
    """One table of a file, with the checks that its types ask for."""

    def __init__(self, table: Mapping[str, object], file: Path, where: str) -> None:
        self._table = table
        self._file = file
        self._where = where
        for key in table:
            if key not in _KEYS:
                raise self.error(f"unknown key {key}")

    def error(self, cause: str) -> HostsError:
        return HostsError(f"read {self._file}", cause=f"{self._where}: {cause}")

    def flag(self, key: str) -> bool:
        value = self._table.get(key, False)
        if not isinstance(value, bool):
            raise self.error(f"{key} is neither true nor false")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """A string or an array of strings."""
        value = self._table.get(key, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise self.error(f"{key} is neither a string nor an array of strings")
        return tuple(values)

    def pairs(self, key: str) -> tuple[tuple[str, str], ...]:
        """A file, several files, or several pairs of certificate and key."""
        value = self._table.get(key, [])
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list):
            raise self.error(f"{key} is neither a string nor an array")
        found = []
        for entry in entries:
            files = [entry, ""] if isinstance(entry, str) else entry
            if not isinstance(files, list) or len(files) != 2 or not all(isinstance(item, str) for item in files):
                raise self.error(f"{key} holds something else than a file or a pair of files")
            certificate, private = files
            found.append((str(self._file.parent / certificate), str(self._file.parent / private) if private else ""))
        return tuple(found)

    def headers(self) -> tuple[tuple[str, str], ...]:
        table = self._table.get("header", {})
        if not isinstance(table, dict):
            raise self.error("header is no table")
        found = []
        for name, value in table.items():
            values = value if isinstance(value, list) else [value]
            if not all(isinstance(item, str) and item.isprintable() for item in values):
                raise self.error(f"header {name} is not text")
            found += [(name, item) for item in values]
        return tuple(found)

    def duration(self, key: str, default: float) -> float:
        """A Go duration ("1m30s") in seconds."""
        value = self._table.get(key)
        if value is None:
            return default
        if not isinstance(value, str) or not _DURATION.fullmatch(value):
            raise self.error(f"{key} is no duration such as 3s")
        return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([a-zµ]+)", value))
