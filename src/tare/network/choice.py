"""The two ways in which pods get a network, of which the settings name one.

Pods keep the network that they were given when the settings change: whoever gave it takes it away.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tare.network.attach import Attachment, EmbeddedNetwork
from tare.network.cni.driver import CniNetwork
from tare.network.wishes import Wishes


@dataclass(frozen=True, slots=True)
class Networks:
    """`mode` is "embedded" or "cni", for new pods."""

    mode: str
    embedded: EmbeddedNetwork
    cni: CniNetwork

    @property
    def current(self) -> EmbeddedNetwork | CniNetwork:
        """The one for new pods."""
        return self.cni if self.mode == "cni" else self.embedded

    async def setup(self) -> None:
        """Make the current one, or see that it is there. Raises TareError."""
        await self.current.setup()

    async def attach(self, pod_id: str, netns: int, netlink: socket.socket, wishes: Wishes) -> Attachment:
        """Put the pod on the current one."""
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

    async def close(self) -> None:
        """Both end."""
        await self.cni.close()
        await self.embedded.close()
