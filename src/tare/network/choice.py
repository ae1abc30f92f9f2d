"""The two ways in which pods get a network, of which the settings name one.

Pods keep the network that they were given when the settings change: whoever gave it takes it away.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tare.errors import FailedPrecondition
from tare.network.attach import DEFAULT, Attachment, EmbeddedNetwork
from tare.network.cni.driver import CniNetwork
from tare.network.embedded import ANNOTATION, EmbeddedNetworks
from tare.network.wishes import Wishes


@dataclass(frozen=True, slots=True)
class Networks:
    """`mode` is "embedded" or "cni", for new pods."""

    mode: str
    embedded: EmbeddedNetworks
    cni: CniNetwork

    @property
    def current(self) -> EmbeddedNetworks | CniNetwork:
        """The one for new pods."""
        return self.cni if self.mode == "cni" else self.embedded

    async def setup(self) -> None:
        """Make the current one, or see that it is there. Raises TareError."""
        await self.current.setup()

    async def attach(self, pod_id: str, netns: int, netlink: socket.socket, wishes: Wishes) -> Attachment:
        """Put the pod on the current one. Raises FailedPrecondition where that has not what the pod asks for."""
        name = wishes.annotations.get(ANNOTATION) or DEFAULT
        if self.mode == "cni" and name != DEFAULT:
            hint = '[network] mode = "embedded" has networks by name'
            cause = "with CNI there is one network, that of the first configuration list"
            raise FailedPrecondition(f"put pod {pod_id} on network {name}", cause=cause, hint=hint)
        if os.fstat(netns).st_dev != os.stat("/proc/self/ns/net").st_dev:
            hint = "something has unmounted it: have the pod made again"
            raise FailedPrecondition(
                f"attach pod {pod_id}", cause=f"{wishes.netns} is no namespace any more", hint=hint
            )
        return await self.current.attach(pod_id, netns, netlink, wishes)

    async def detach(self, pod_id: str) -> None:
        """Take the pod off whichever it is on. Idempotent."""
        await self.cni.detach(pod_id)
        await self.embedded.detach(pod_id)

    async def recover(self, pods: set[str]) -> None:
        """Let go of what belongs to no pod of these, on both."""
        await self.cni.recover(pods)
        await self.embedded.recover(pods)

    async def use_ranges(self, ranges: Sequence[str]) -> None:
        """As the current one."""
        await self.current.use_ranges(ranges)

    async def look(self) -> None:
        """As the current one."""
        await self.current.look()

    def status(self) -> str | None:
        """As the current one."""
        return self.current.status()

    def describe(self) -> Mapping[str, object]:
        """As the current one."""
        return self.current.describe()

    async def path(self, pod_id: str, netns: str) -> Mapping[str, Any]:
        """A pod's way through the node, by whoever gave it its network; `troubles` is what is not as it was made. JSON-able."""
        return await (self.cni if self.cni.has(pod_id) else self.embedded).path(pod_id, netns)

    def list(self) -> list[Mapping[str, Any]]:
        """Every network that pods are on or can be put on. JSON-able."""
        embedded = self.embedded.list()
        if self.mode == "cni":  # of the embedded ones only what is there
            embedded = [item for item in embedded if item["pods"] or item["state"] == "ready"]
        return [*embedded, *self.cni.list()]

    async def remove(self, name: str) -> EmbeddedNetwork:
        """As `EmbeddedNetworks.remove`; a network of CNI's is its plugins'."""
        embedded = {key for network in self.embedded for key in (network.name, network.bridge)}
        if name not in embedded and name in {item["name"] for item in self.cni.list()}:
            hint = "take its configuration away from [network] conf_dir; what is left of it on the node is its plugins'"
            raise FailedPrecondition(f"remove network {name}", cause="it is CNI's", hint=hint)
        return await self.embedded.remove(name)

    async def close(self) -> None:
        """Both end."""
        await self.cni.close()
        await self.embedded.close()
