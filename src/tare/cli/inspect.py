"""`tare inspect`: everything that the daemon tells of one thing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from tare.cli.client import Client
from tare.cli.containers import container_candidates, pod_candidates, prefer_containers
from tare.cli.health import supervised
from tare.cli.images import find
from tare.cli.lookup import pick
from tare.cli.output import as_dict, print_json
from tare.errors import NotFound

if TYPE_CHECKING:
    from google.protobuf.message import Message


def unfold(answer: Message) -> dict[str, Any]:
    """A verbose status with the JSON in its `info` texts taken apart."""
    found = as_dict(answer)
    for key, text in found.get("info", {}).items():
        try:
            found["info"][key] = json.loads(text)
        except ValueError:
            continue  # plain text, as it is
    return found


@click.command()
@click.argument("words", metavar="CONTAINER|POD|IMAGE...", nargs=-1, required=True)
@click.pass_obj
def inspect(socket: str, words: tuple[str, ...]) -> None:
    """Print all about containers, pods or images, as a JSON list.

    Each is named by its name, its ID or the beginning of its ID.
    """
    with Client(socket) as client:
        print_json([describe(client, word) for word in words])


def describe(client: Client, word: str) -> dict[str, Any]:
    """The verbose status of what `word` means. Raises NotFound."""
    from tare.cri.v1 import api_pb2

    candidates = container_candidates(client.containers()) + pod_candidates(client.pods())
    try:
        target = pick(prefer_containers(candidates, word), word, "container, pod or image")
    except NotFound:
        if find(client, word) is None:
            raise
        image = api_pb2.ImageStatusRequest(image=api_pb2.ImageSpec(image=word), verbose=True)
        return {"kind": "image", **unfold(client.call(client.images.ImageStatus, image))}
    if target.kind == "pod":
        pod = api_pb2.PodSandboxStatusRequest(pod_sandbox_id=target.id, verbose=True)
        return {"kind": "pod", **unfold(client.call(client.runtime.PodSandboxStatus, pod))}
    container = api_pb2.ContainerStatusRequest(container_id=target.id, verbose=True)
    found = {"kind": "container", **unfold(client.call(client.runtime.ContainerStatus, container))}
    looked_after = (as_dict(item) for item in supervised(client).values() if item.container_id == target.id)
    return found | {"supervision": next(looked_after, None)}
