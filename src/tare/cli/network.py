"""`tare network`: which networks there are, whether pods' are as they were made, and taking away what nobody is on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from tare.cli.client import Client
from tare.cli.containers import pod_candidates
from tare.cli.lookup import pick
from tare.cli.options import output_option
from tare.cli.output import print_json, print_table, short_id
from tare.errors import NotFound

if TYPE_CHECKING:
    from tare.api.v1 import tare_pb2

CHECK_SECONDS = 600.0


@click.group()
def network() -> None:
    """Pods' networks: list them, look at them, check them, take them away."""


@network.command("ls")
@output_option
@click.pass_obj
def list_networks(socket: str, output: str) -> None:
    """List the networks that pods are on, or can be put on."""
    with Client(socket) as client:
        found = networks(client)
    if output == "json":
        print_json([json.loads(item.about) for item in found])
        return
    columns = ["NAME", "MODE", "STATE", "BRIDGE", "SUBNETS", "PODS", "FREE"]
    print_table(columns, [row(item) for item in found])


def networks(client: Client) -> list[tare_pb2.Network]:
    """All of them. Raises CallFailed."""
    from tare.api.v1 import tare_pb2

    return list(client.call(client.networks.List, tare_pb2.NetworksRequest()).networks)


def row(item: tare_pb2.Network) -> list[str]:
    """A network's line."""
    subnets = ", ".join(item.subnets) or "-"
    free = str(item.free) if item.state == "ready" and item.mode == "embedded" else "-"
    return [item.name, item.mode, item.state, item.bridge or "-", subnets, str(item.pods), free]


@network.command()
@click.argument("names", metavar="NETWORK...", nargs=-1, required=True)
@click.pass_obj
def inspect(socket: str, names: tuple[str, ...]) -> None:
    """Print all about networks, as a JSON list. What a pod has of its network is in `tare inspect POD`."""
    with Client(socket) as client:
        found = networks(client)
        pods = {pod.id: f"{pod.metadata.namespace}/{pod.metadata.name}" for pod in client.pods()}
    print_json([about(found, name, pods) for name in names])


def about(found: list[tare_pb2.Network], name: str, pods: dict[str, str]) -> dict[str, Any]:
    """The network of a name, or on a bridge of that name, with pods' names beside their addresses. Raises NotFound."""
    for item in found:
        if name in (item.name, item.bridge):
            told: dict[str, Any] = json.loads(item.about)
            told["pods"] = {
                pod_id: {"name": pods.get(pod_id, ""), "address": address} for pod_id, address in told["pods"].items()
            }
            return told
    raise NotFound(f"there is no network {name}", hint="see  tare network ls")


@network.command()
@click.argument("words", metavar="[POD]...", nargs=-1)
@output_option
@click.pass_obj
def check(socket: str, words: tuple[str, ...], output: str) -> int:
    """Look whether pods' networks are as they were made: links, addresses, routes, rules, ports; by CNI's CHECK where plugins made them.

    All pods where none is named. Ends with 1 where something is not.
    """
    from tare.api.v1 import tare_pb2

    with Client(socket) as client:
        pods = client.pods()
        wanted = [pick(pod_candidates(pods), word, "pod").id for word in words]
        names = {pod.id: pod.metadata.name for pod in pods}
        request = tare_pb2.CheckNetworksRequest(pod_ids=wanted)
        found = list(client.stream(client.networks.Check, request, timeout=CHECK_SECONDS))
    if output == "json":
        print_json([{"pod": item.pod_id, "network": item.network, "troubles": list(item.troubles)} for item in found])
    else:
        rows = [
            [short_id(item.pod_id), names.get(item.pod_id, "-"), item.network or "-", trouble]
            for item in found
            for trouble in item.troubles or ["ok"]
        ]
        print_table(["POD", "NAME", "NETWORK", "FOUND"], rows)
    return int(any(item.troubles for item in found))


@network.command("rm")
@click.argument("names", metavar="NETWORK...", nargs=-1, required=True)
@click.pass_obj
def remove(socket: str, names: tuple[str, ...]) -> None:
    """Take networks away, with bridge and nftables table, that no pod is on.

    One that the settings name is made anew when a pod asks for it, or by the next daemon.
    """
    from tare.api.v1 import tare_pb2

    with Client(socket) as client:
        for name in names:
            tell(client.call(client.networks.Remove, tare_pb2.RemoveNetworkRequest(name=name)))


@network.command()
@click.option(
    "--settings", is_flag=True, help="Set back what Tare changed of the node's settings, such as net.ipv4.ip_forward."
)
@click.pass_obj
def prune(socket: str, settings: bool) -> None:
    """Take away every network that no pod is on: before Tare is removed from a machine, say.

    Settings are only set back where no pod and no bridge of other software is left that may need them.
    """
    from tare.api.v1 import tare_pb2

    with Client(socket) as client:
        tell(client.call(client.networks.Prune, tare_pb2.PruneNetworksRequest(settings=settings)))


def tell(reply: tare_pb2.RemovedNetworks) -> None:
    """What was done."""
    for item in reply.networks:
        print(f"removed {item.name} ({item.bridge})")
    for setting in reply.settings:
        print(f"set {setting}")
    if reply.kept:
        print(f"the node's settings stay: {reply.kept}")
