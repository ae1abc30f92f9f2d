"""`tare update --restart`: running containers that stand on an older image than their tag means now get the newer one.

made by `tare run -d`, or by another client    made anew in its pod (tare.v1 Renew)
of a kubelet's pod                             stopped: its kubelet starts it again, from the image that the tag means now
of a `tare run` that waits for it              left: its end would be the end of that
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tare.cli.client import CALL_SECONDS, Client
from tare.errors import TareError

if TYPE_CHECKING:
    from tare.cri.v1 import api_pb2

KUBELET_LABEL = "io.kubernetes.pod.uid"  # kubelet: pkg/kubelet/types/labels.go


@dataclass(frozen=True, slots=True)
class Restarted:
    """What became of a container; `new` is the ID of the one that was made in its place."""

    id: str
    name: str
    tag: str
    outcome: str
    new: str = ""
    failed: bool = False


def tag_of(container: api_pb2.Container) -> str:
    """The tag that a container was asked for by; "" where it was a digest or an ID."""
    from tare.images.reference import MalformedReference, parse

    try:
        return parse(container.image.user_specified_image or container.image.image).tagged or ""
    except MalformedReference:
        return ""


def restart(client: Client, tags: Mapping[str, str], timeout: int) -> Iterator[Restarted]:
    """Bring the containers of these tags to the images (IDs) that they mean, one after the other; what fails is told and not raised."""
    from tare.cli.request import ATTACHED_ANNOTATION
    from tare.cri.v1 import api_pb2

    pods = {pod.id: pod for pod in client.pods()}
    for container in client.containers():
        tag, pod = tag_of(container), pods.get(container.pod_sandbox_id)
        if container.state != api_pb2.CONTAINER_RUNNING or pod is None:
            continue
        if tag not in tags or tags[tag] == container.image_id:
            continue
        name = container.metadata.name
        if ATTACHED_ANNOTATION in pod.annotations:
            yield Restarted(container.id, name, tag, "left: a `tare run` waits for it")
            continue
        try:
            if KUBELET_LABEL in pod.labels:
                request = api_pb2.StopContainerRequest(container_id=container.id, timeout=timeout)
                client.call(client.runtime.StopContainer, request, timeout=timeout + CALL_SECONDS)
                yield Restarted(container.id, name, tag, "stopped: its kubelet starts it again")
            else:
                yield renewed(client, container, tag, tags[tag], timeout)
        except TareError as error:
            yield Restarted(container.id, name, tag, f"failed: {error}", failed=True)


def renewed(client: Client, container: api_pb2.Container, tag: str, image: str, timeout: int) -> Restarted:
    """One container made anew."""
    from tare.api.v1 import tare_pb2

    request = tare_pb2.RenewRequest(container_id=container.id, image=image, timeout=timeout)
    answer = client.call(client.renewal.Renew, request, timeout=timeout + CALL_SECONDS)
    outcome = f"rolled back: {answer.trouble}" if answer.trouble else "restarted"
    return Restarted(
        container.id, container.metadata.name, tag, outcome, answer.container_id, failed=bool(answer.trouble)
    )
