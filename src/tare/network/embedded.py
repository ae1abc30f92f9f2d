"""All embedded networks of an instance: the default one, those that the settings name, and former ones that pods are still on.

    [network]                      "default"     made when the daemon starts
    [network.networks.NAME]        NAME          made when the first pod asks for it by the annotation network.tare.dev/network
    state.db knows another bridge  former        its pods keep it; it goes with the last of them

A pod is on one of them: that in whose subnet its lease is. What else a pod has (links, ports) is told apart by the pod, so that nothing is lost where
settings change. Pods of different networks reach each other by published ports alone, as `firewall` sees to.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tare.config import NetworkConfig
from tare.errors import FailedPrecondition, InvalidArgument, NotFound, TareError, describe
from tare.network import bridge, inspection, subnets
from tare.network.addresses import Leases, capacity
from tare.network.attach import DEFAULT, Attachment, EmbeddedNetwork, Remembered, node
from tare.network.forwarding import Forwarding
from tare.network.subnets import Occupied
from tare.network.wishes import Wishes
from tare.state.database import Database

log = logging.getLogger(__name__)
ANNOTATION = "network.tare.dev/network"


class EmbeddedNetworks:
    """`database` is state.db. Raises InvalidArgument for networks that cannot be side by side."""

    def __init__(self, database: Database, config: NetworkConfig, run: Path) -> None:
        self._run = run.resolve()
        self._leases = Leases(database)
        self._forwarding = Forwarding(database)
        self._troubles: dict[str, str] = {}  # why a network is not there, by its bridge
        self._turn = asyncio.Lock()  # no pod comes to a network while one is taken away
        self.default = EmbeddedNetwork(database, config, run)
        self._named = {DEFAULT: self.default}
        for name, settings in config.networks.items():
            own = NetworkConfig(
                bridge=settings.bridge,
                subnet=settings.subnet,
                subnet6=settings.subnet6,
                mtu=settings.mtu,
                isolation=settings.isolation,
            )
            self._named[name] = EmbeddedNetwork(database, own, run, name)
        check_apart(config, self._named, self._run)
        bridges = {network.bridge for network in self._named.values()}
        self._former = [
            EmbeddedNetwork(database, former_settings(name, row), run, row.name or DEFAULT)
            for name, row in database.table("networks", Remembered).items()
            if name not in bridges
        ]
        self._tell_of_each_other()

    def __iter__(self) -> Iterator[EmbeddedNetwork]:
        yield from self._named.values()
        yield from self._former

    async def setup(self) -> None:
        """Make the default one and those that pods are on; former ones without pods go. Raises TareError for the default one."""
        for network in list(self._former):
            if not network.pods():
                await self._attempt(network, "remove", self._remove(network))
        for network in self:
            if network is not self.default and network.pods():
                await self._attempt(network, "set up", network.setup())
        await self.default.setup()

    async def use_ranges(self, ranges: Sequence[str]) -> None:
        """The default one's, as it has it."""
        async with self._turn:
            await self.default.use_ranges(ranges)
            self._tell_of_each_other()

    def status(self) -> str | None:
        """The default one's; what is missing of others that are there is made as well, and told by `list` and the log where it cannot be."""
        for network in self:
            if network is self.default or network.ready is not None or network.bridge in self._troubles:
                trouble = network.status()
                if trouble != self._troubles.get(network.bridge):
                    log.warning("network %s: %s", network.name, trouble or "it is there again")
                self._note(network, trouble)
        return self._troubles.get(self.default.bridge)

    def _note(self, network: EmbeddedNetwork, trouble: str | None) -> None:
        if trouble is None:
            self._troubles.pop(network.bridge, None)
        else:
            self._troubles[network.bridge] = trouble

    async def attach(self, pod_id: str, netns: int, netlink: socket.socket, wishes: Wishes | None = None) -> Attachment:
        """Put the pod on the one that it asks for. Raises as that one does, and InvalidArgument where there is no such network."""
        name = (wishes.annotations.get(ANNOTATION) if wishes is not None else None) or DEFAULT
        network = self._named.get(name)
        if network is None:
            doing, hint = f"put pod {pod_id} on network {name}", f"[network.networks.{name}] in the settings makes it"
            raise InvalidArgument(doing, cause=f"there are only {', '.join(sorted(self._named))}", hint=hint)
        async with self._turn:
            first = network.ready is None
            attachment = await network.attach(pod_id, netns, netlink, wishes)
            self._note(network, None)
            if first:
                self._tell_of_each_other()  # it may have chosen a subnet only now
        return attachment

    async def detach(self, pod_id: str) -> None:
        """Take the pod off whichever it is on; a former one goes with its last pod. Idempotent."""
        network = self.of(pod_id)
        await network.detach(pod_id)
        if network in self._former and not network.pods():
            async with self._turn:
                if network in self._former:
                    await self._attempt(network, "remove", self._remove(network))

    def of(self, pod_id: str) -> EmbeddedNetwork:
        """The one that a pod is on, by its lease; without one the default one, which finds what there is."""
        held = self._leases.of(pod_id)
        return next((network for network in self if network.subnet in held), self.default)

    async def recover(self, pods: set[str]) -> None:
        """Remove what belongs to pods other than these: links, ports, leases. Works before `setup` too."""
        with node() as host:
            strays = [link for pod_id, link in bridge.pod_links(host, self._run) if pod_id not in pods]
            self.default.unplug(host, strays)
        for pod_id in (self._leases.pods() | self.default.publisher.pods()) - pods:
            await self.detach(pod_id)

    async def look(self) -> None:
        """What `status` tells is looked at when it is asked."""

    def describe(self) -> Mapping[str, object]:
        """For who asks what the daemon knows of itself."""
        ready = self.default.ready
        return {
            "mode": "embedded",
            "bridge": self.default.bridge,
            "subnet": str(ready.subnet) if ready is not None else None,
            "networks": {network.name: network.bridge for network in self if network is not self.default},
            "troubles": dict(self._troubles),
        }

    async def remove(self, name: str) -> EmbeddedNetwork:
        """Take a network's bridge and table away; the settings' networks are made anew when a pod asks for them, or at the next start.

        Raises NotFound, FailedPrecondition while pods are on it.
        """
        async with self._turn:
            found = [network for network in self if name in (network.name, network.bridge)]
            if not found:
                raise NotFound(f"there is no network {name}", hint="see  tare network ls")
            network = next((item for item in found if item.bridge == name), found[0])  # the settings' own come first
            if pods := sorted(network.pods()):
                cause = f"{len(pods)} pods are on it: {', '.join(pod[:13] for pod in pods[:5])}"
                raise FailedPrecondition(f"remove network {name}", cause=cause, hint="tare rm POD takes one away")
            await self._remove(network)
        return network

    async def prune(self, *, forwarding: bool) -> tuple[list[EmbeddedNetwork], list[str], str]:
        """Remove every network that no pod is on; if that is all of them, and it is asked for, the node forwards as it did before.

        What was removed, what was set back, and why nothing was ("" where it was, or was not asked for). Raises TareError.
        """
        removed = []
        async with self._turn:
            for network in list(self):
                if not network.pods():
                    removed += [network] if network.exists() else []
                    await self._remove(network)
            if not forwarding:
                return removed, [], ""
            if left := [network.name for network in self if network.pods()]:
                return removed, [], f"pods are on {', '.join(left)}"
            with node() as host:
                settings, why = self._forwarding.give_back(bridge.look(host), [network.bridge for network in removed])
            return removed, settings, why

    async def teardown(self) -> None:
        """Remove all of them, whoever is on them; leases stay. Idempotent."""
        for network in self:
            await network.teardown()

    async def close(self) -> None:
        """What was begun is finished."""
        await self.settle()

    async def settle(self) -> None:
        """As each of them."""
        for network in self:
            await network.settle()

    async def path(self, pod_id: str, netns: str) -> Mapping[str, Any]:
        """A pod's way through the node, with what is wrong with it."""
        return await inspection.path(self.of(pod_id), pod_id, netns)

    def list(self) -> list[Mapping[str, Any]]:
        """Every network: what it has, whether it is there, and the pods with their addresses. JSON-able."""
        return [self._listed(network) for network in self]

    def _listed(self, network: EmbeddedNetwork) -> Mapping[str, Any]:
        ready = network.ready
        trouble = self._troubles.get(network.bridge, "")
        state = "ready" if ready is not None else "made when needed"
        if network in self._former:
            state = "former"
        elif trouble:
            state = "broken"
        held = network.leases.held(network.subnet) if network.subnet else {}
        return {
            "name": network.name,
            "mode": "embedded",
            "state": state,
            "trouble": trouble,
            "bridge": network.bridge,
            "table": f"inet {network.publisher.table}",
            "subnets": list(network.ranges),
            "gateways": [str(item) for item in ready.gateways()] if ready is not None else [],
            "mtu": ready.mtu if ready is not None else 0,
            "isolation": sorted(network.isolation),
            "free": capacity(ready.subnet) - len(held) if ready is not None else 0,
            "pods": {pod_id: address for address, pod_id in held.items()},
        }

    async def _remove(self, network: EmbeddedNetwork) -> None:
        await network.teardown()
        if network in self._former:
            network.forget()
            self._former.remove(network)
            self._tell_of_each_other()

    async def _attempt(self, network: EmbeddedNetwork, doing: str, effect: Awaitable[None]) -> None:
        try:
            await effect
        except TareError as error:
            log.warning("%s network %s: %s", doing, network.name, describe(error))
            self._note(network, str(error))

    def _tell_of_each_other(self) -> None:
        """Which bridges and ranges are the others'."""
        for network in self:
            others = [other for other in self if other is not network]
            network.others = tuple(sorted(other.bridge for other in others))
            network.reserved = tuple(
                Occupied(subnets.any_network(item), f"network {other.name}")
                for other in others
                for item in other.ranges
            )


def former_settings(name: str, row: Remembered) -> NetworkConfig:
    """What a network that the settings name no more goes on with."""
    return NetworkConfig(bridge=name, subnet=row.subnet, subnet6=row.subnet6, isolation=row.isolation)


def check_apart(config: NetworkConfig, networks: Mapping[str, EmbeddedNetwork], run: Path) -> None:
    """Raise InvalidArgument where two networks of the settings have one bridge, or share addresses."""
    bridges: dict[str, str] = {}
    ranges: list[Occupied] = []
    for name, network in networks.items():
        settings = config if name == DEFAULT else config.networks[name]
        section = "[network]" if name == DEFAULT else f"[network.networks.{name}]"
        if network.bridge in bridges:
            raise InvalidArgument(f"{section} bridge = {network.bridge!r}", cause=f"{bridges[network.bridge]} has it")
        bridges[network.bridge] = section
        usual = str(subnets.DEFAULT_SUBNET) if name == DEFAULT and run == subnets.DEFAULT_RUN else ""
        for key, text in (("subnet", settings.subnet or usual), ("subnet6", settings.subnet6)):
            if not text:
                continue
            mine = subnets.parse_subnet(text) if key == "subnet" else subnets.any_network(text)
            if (other := subnets.overlap(mine, ranges)) is not None:
                hint = "give each network a range of its own"
                raise InvalidArgument(f"{section} {key} = {text!r}", cause=f"it overlaps {other.where}", hint=hint)
            ranges.append(Occupied(mine, f"{key} {mine} of {section}"))
