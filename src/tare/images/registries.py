"""From a reference to the registry that has it: hosts.toml as it is now, the credentials that apply, and one HTTP session for all."""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tare import __version__
from tare.config import ImagesConfig
from tare.handlers.commands import Commands
from tare.images import docker_config, helpers, hosts, later
from tare.images.auth import Credentials, RegistryAuth, credentials_for
from tare.images.reference import Reference
from tare.images.registry import Registry
from tare.images.threads import in_thread
from tare.images.tls import Tls
from tare.images.transport import Endpoint, Patience, Trace, silent

if TYPE_CHECKING:
    import aiohttp
else:
    from tare.images import later as aiohttp

READ_BYTES = 512 << 10


class Registries:
    """All registries, as the settings have them. `commands` runs credential helpers."""

    def __init__(
        self, config: ImagesConfig, patience: Patience, executor: Executor, commands: Commands | None = None
    ) -> None:
        self._config = config
        self._commands = commands
        self._patience = patience
        self._executor = executor
        self._tls = Tls()
        self._session: aiohttp.ClientSession | None = None

    async def of(
        self, reference: Reference, auth: RegistryAuth | None, *, actions: str = "pull", trace: Trace = silent
    ) -> Registry:
        """The registry of a reference with its mirrors. Credentials are `auth`, else those of the auth file.

        `actions` are what its tokens are to allow ("pull", "pull,push"); `trace` is told of all that is asked there. Raises HostsError, PullError.
        """
        read = partial(hosts.read, Path(self._config.hosts_dir), reference.domain)
        places = await in_thread(self._executor, read)
        for place in places:
            kind = "the registry" if place.upstream else "mirror"
            trace(0, f"{kind} {place.url}{place.path} ({', '.join(sorted(place.capabilities))})")
        credentials = await self._credentials(reference, auth, trace)
        await in_thread(self._executor, later.load)
        session = self._opened()
        endpoints = [Endpoint(session, host, credentials, self._tls, self._patience, trace) for host in places]
        return Registry(
            reference, endpoints, self._patience, self._config.max_manifest_size, self._executor, actions=actions
        )

    async def _credentials(self, reference: Reference, auth: RegistryAuth | None, trace: Trace) -> Credentials | None:
        found, source = credentials_for(auth, reference.domain), "the request"
        if found is None and self._config.auth_file:
            path = Path(self._config.auth_file)
            listed = await in_thread(self._executor, partial(docker_config.read, path))
            entry, source = None, str(path)
            if helper := docker_config.helper(listed, reference.domain):
                entry, source = await helpers.ask(self._commands, *helper), f"docker-credential-{helper[0]}"
            if entry is None:
                entry, source = docker_config.choose(listed, reference), str(path)
            found = credentials_for(entry and replace(entry, server_address=""), reference.domain)
        trace(0, f"credentials come from {source}" if found else "there are no credentials")
        return found

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                read_bufsize=READ_BYTES,
                headers={"User-Agent": f"tare/{__version__}"},
            )
        return self._session

    async def close(self) -> None:
        """End all connections."""
        if self._session is not None:
            await self._session.close()
