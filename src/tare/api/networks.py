"""The service tare.v1.Networks: what there is of networks, whether pods' are as they were made, and taking away what nobody is on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from tare.api.v1 import tare_pb2 as pb
from tare.errors import NotFound, TareError
from tare.network.attach import EmbeddedNetwork
from tare.network.choice import Networks as Choice


class Networks:
    """Over both kinds of networks. `namespaces` says which pods have one of their own now, and where it is pinned."""

    lasting: frozenset[str] = frozenset({"Remove", "Prune"})

    def __init__(self, networks: Choice, namespaces: Callable[[], Mapping[str, str]]) -> None:
        self._networks = networks
        self._namespaces = namespaces

    async def List(self, request: pb.NetworksRequest) -> pb.NetworksReply:
        """The settings' own first."""
        return pb.NetworksReply(networks=map(listed, self._networks.list()))

    async def Check(self, request: pb.CheckNetworksRequest) -> AsyncIterator[pb.NetworkFinding]:
        """Each pod when it has been looked at."""
        namespaces = self._namespaces()
        for pod_id in request.pod_ids or sorted(namespaces):
            if pod_id not in namespaces:
                hint = "it was stopped, or has the node's network"
                raise NotFound(f"check the network of pod {pod_id}", cause="it has none of its own", hint=hint)
            try:
                found = await self._networks.path(pod_id, namespaces[pod_id])
            except TareError as error:
                found = {"name": "", "troubles": [str(error)]}
            yield pb.NetworkFinding(pod_id=pod_id, network=found["name"], troubles=found["troubles"])

    async def Remove(self, request: pb.RemoveNetworkRequest) -> pb.RemovedNetworks:
        """Its bridge and its table."""
        return pb.RemovedNetworks(networks=[removed(await self._networks.remove(request.name))])

    async def Prune(self, request: pb.PruneNetworksRequest) -> pb.RemovedNetworks:
        """As far as no pod is on them."""
        networks, settings, kept = await self._networks.embedded.prune(forwarding=request.settings)
        return pb.RemovedNetworks(networks=map(removed, networks), settings=settings, kept=kept)


def listed(item: Mapping[str, Any]) -> pb.Network:
    """A network as a message."""
    return pb.Network(
        name=item["name"],
        mode=item["mode"],
        state=item["state"],
        bridge=item.get("bridge", ""),
        subnets=item.get("subnets", ()),
        pods=len(item["pods"]),
        free=item.get("free", 0),
        about=json.dumps(item),
    )


def removed(network: EmbeddedNetwork) -> pb.Network:
    """One that is no more."""
    return pb.Network(name=network.name, mode="embedded", bridge=network.bridge)
