"""A network's plugins one after the other: each of CNI's operations on a whole list.

    ADD     first to last, each told the result of the one before      DEL     last to first, each told the final result
    CHECK   first to last, each told the final result (0.4.0)          STATUS, GC   first to last, for no container (1.1.0)

An operation ends at the first plugin that fails, but for GC, which goes on. Source: CNI specification 1.1.0, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from tare.errors import TareError
from tare.network.cni import config, result
from tare.network.cni.cache import Attachment
from tare.network.cni.config import NetworkList, Plugin
from tare.network.cni.plugins import Plugins, broken


class Chain:
    """Runs lists of plugins. All raise TareError."""

    def __init__(self, plugins: Plugins) -> None:
        self._plugins = plugins

    async def ready(self, network: NetworkList) -> NetworkList:
        """The list in the version that all its plugins speak, which are there."""
        doing = f"use CNI network {network.name} of {network.source}"
        kinds = dict.fromkeys(item.type for item in network.plugins)
        return config.negotiate(network, {kind: await self._plugins.versions(kind, doing) for kind in kinds})

    async def add(self, network: NetworkList, attachment: Attachment) -> Mapping[str, Any]:
        """The result of the last plugin. What a failed one leaves is for `delete` to take away."""
        doing = f"attach pod {attachment.container_id}"
        last: Mapping[str, Any] | None = None
        for item in network.plugins:
            output = await self._call("ADD", network, item, replace(attachment, result=last), doing)
            try:
                last = result.parse(output, network.version)
            except result.NoResult as error:
                raise broken(f"{doing}: network {network.name}", item.type, "ADD", str(error)) from error
        assert last is not None
        return last

    async def delete(self, network: NetworkList, attachment: Attachment) -> None:
        """Take an attachment away, as far as there is something of it."""
        known = attachment if config.since(network.version, config.CHECKED_SINCE) else replace(attachment, result=None)
        for item in reversed(network.plugins):
            await self._call("DEL", network, item, known, f"detach pod {attachment.container_id}")

    async def check(self, network: NetworkList, attachment: Attachment) -> None:
        """Whether an attachment is as it was made; nothing where the list or its version has no CHECK."""
        if network.disable_check or not config.since(network.version, config.CHECKED_SINCE):
            return
        for item in network.plugins:
            await self._call("CHECK", network, item, attachment, f"check pod {attachment.container_id}")

    async def status(self, network: NetworkList) -> None:
        """Whether the plugins can add containers; nothing where the version has no STATUS."""
        if not config.since(network.version, config.STATUS_SINCE):
            return
        for item in network.plugins:
            told = config.payload(network, item)
            await self._plugins.call("STATUS", network, item, told, {}, "see whether pods can be attached")

    async def collect(self, network: NetworkList, valid: Iterable[tuple[str, str]]) -> list[TareError]:
        """Have the plugins give up what belongs to no attachment of these (container, interface); what went wrong."""
        if network.disable_gc or not config.since(network.version, config.GC_SINCE):
            return []
        attachments = [{"containerID": container, "ifname": interface} for container, interface in valid]
        # The second name is what plugins look for that were built after an early draft.
        more = {"cni.dev/valid-attachments": attachments, "cni.dev/attachments": attachments}
        failures = []
        for item in network.plugins:
            told = config.payload(network, item, more=more)
            try:
                await self._plugins.call("GC", network, item, told, {}, "collect what belongs to no pod")
            except TareError as error:
                failures.append(error)
        return failures

    async def _call(self, verb: str, network: NetworkList, item: Plugin, attachment: Attachment, doing: str) -> str:
        environment = {
            "CNI_CONTAINERID": attachment.container_id,
            "CNI_NETNS": attachment.netns,
            "CNI_IFNAME": attachment.interface,
            "CNI_ARGS": ";".join(f"{name}={value}" for name, value in attachment.args),
        }
        told = config.payload(network, item, previous=attachment.result, capabilities=attachment.capabilities)
        return await self._plugins.call(verb, network, item, told, environment, doing)
