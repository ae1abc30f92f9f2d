"""What pods and containers see of plugins (`runtime.plugins.Plugins`): nothing until one connects, and the hub from then on.

With no plugin, NRI's messages and all that knows them are not even imported.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from tare.config import NriConfig
from tare.runtime.bounds import deadline
from tare.runtime.plugins import Adjusted, Moment, Subject
from tare.runtime.records import Resources
from tare.runtime.store import Store

if TYPE_CHECKING:
    from tare.nri.hub import Hub


class Containers(Protocol):
    """What plugins may have done to containers that there are (`runtime.service.Runtime`)."""

    async def limit_container(self, container_id: str, wanted: Resources) -> None:
        """These limits hold, all or none; plugins are not asked. Raises TareError."""

    async def stop_container(self, container_id: str, timeout: float) -> None:
        """It does not run any more."""


class Front:
    """`active` is set by the hub, and from the beginning where the settings have a validator."""

    def __init__(self, settings: NriConfig, store: Store) -> None:
        self.active = settings.enable and settings.default_validator.enable
        self.settings = settings
        self.store = store
        self.containers: Containers | None = None
        self._hub: Hub | None = None
        self._making: set[str] = set()
        self._unmade = asyncio.Event()
        self._syncing: asyncio.Future[None] | None = None

    def begin(self, containers: Containers) -> None:
        """From now on plugins can have containers changed."""
        self.containers = containers

    async def load(self) -> None:
        """Have what `hub` needs imported, without anybody waiting for that: plugins are about to be there."""
        await asyncio.to_thread(import_module, "tare.nri.hub")

    @property
    def hub(self) -> Hub:
        """The plugins."""
        if self._hub is None:
            from tare.nri.hub import Hub

            self._hub = Hub(self)
        return self._hub

    def titles(self) -> list[str]:
        """As `Plugins.titles`."""
        return self._hub.titles() if self._hub is not None else []

    async def close(self) -> None:
        """Tell the plugins that this is the end."""
        self.active = False
        if self._hub is not None:
            await self._hub.close()

    # What is on its way

    async def making(self, thing: str) -> None:
        """As `Plugins.making`."""
        while self._syncing is not None:
            await asyncio.shield(self._syncing)
        self._making.add(thing)

    def made(self, thing: str) -> None:
        """As `Plugins.made`."""
        self._making.discard(thing)
        if not self._making:
            self._unmade.set()

    @asynccontextmanager
    async def quiet(self) -> AsyncIterator[None]:
        """Nothing is between its request and its record within the block, and nothing comes there. Raises DeadlineExceeded."""
        while self._syncing is not None:
            await asyncio.shield(self._syncing)
        self._syncing = asyncio.get_running_loop().create_future()
        try:
            async with deadline(self.settings.registration_timeout, "wait for pods and containers that are being made"):
                while self._making:
                    self._unmade.clear()
                    await self._unmade.wait()
            yield
        finally:
            syncing, self._syncing = self._syncing, None
            syncing.set_result(None)

    # Requests, which only come while it is active

    async def ask(
        self, moment: Moment, subject: Subject, wanted: Resources | None = None, overhead: Resources | None = None
    ) -> None:
        """As `Plugins.ask`."""
        await self.hub.ask(moment, subject, wanted, overhead)

    async def tell(self, moment: Moment, subject: Subject) -> None:
        """As `Plugins.tell`."""
        await self.hub.tell(moment, subject)

    async def adjust(self, subject: Subject, cgroup: str) -> Adjusted | None:
        """As `Plugins.adjust`."""
        return await self.hub.adjust(subject, cgroup)

    async def change(self, subject: Subject, wanted: Resources) -> Resources:
        """As `Plugins.change`."""
        return await self.hub.change(subject, wanted)

    def ended(self, subject: Subject) -> None:
        """As `Plugins.ended`."""
        self.hub.ended(subject)
