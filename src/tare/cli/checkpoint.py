"""`tare checkpoint` and `tare restore`: a container or a pod written down with CRIU, and made again out of that."""

from __future__ import annotations

import os
import uuid
from typing import TYPE_CHECKING, Any

import click

from tare.cli.client import Client
from tare.cli.lookup import pick
from tare.cli.run import LOG_DIRECTORY, Session
from tare.cli.signals import Signals
from tare.errors import InvalidArgument

if TYPE_CHECKING:
    from tare.cri.v1 import api_pb2

LONG_SECONDS = 24 * 3600.0


@click.command()
@click.option("--pod", "whole", is_flag=True, help="A pod with all its containers that run, into the directory PATH.")
@click.option("-t", "--timeout", type=click.IntRange(min=0), default=0, help="Seconds until it is given up.")
@click.argument("word", metavar="CONTAINER|POD")
@click.argument("path", metavar="PATH")
@click.pass_obj
def checkpoint(socket: str, whole: bool, timeout: int, word: str, path: str) -> None:
    """Write what a running container is and does into the archive PATH. It goes on afterwards.

    It stands still meanwhile; the containers of a pod do so together. The archive is in the form that CRI-O, containerd and checkpointctl
    read. It has the container's memory in it, with all its secrets.
    """
    from tare.cli.containers import container_candidates, pod_candidates
    from tare.cri.v1 import api_pb2

    with Client(socket) as client:
        target = os.path.abspath(path)
        if whole:
            found = pick(pod_candidates(client.pods()), word, "pod")
            pod = api_pb2.CheckpointPodRequest(pod_sandbox_id=found.id, output_path=target)
            client.call(client.runtime.CheckpointPod, pod, timeout=float(timeout) or LONG_SECONDS)
        else:
            found = pick(container_candidates(client.containers()), word, "container")
            request = api_pb2.CheckpointContainerRequest(container_id=found.id, location=target, timeout=timeout)
            client.call(client.runtime.CheckpointContainer, request, timeout=LONG_SECONDS)
    print(path)


@click.command(context_settings={"max_content_width": 110})
@click.option("--name", default="", help="A name for the container, its pod and its host.  [default: made up]")
@click.option("-v", "--volume", "volumes", multiple=True, metavar="SRC:DST[:ro]", help="What is to be at a mount.")
@click.option("--network", default="pod", show_default=True, metavar="pod|host|NAME", help="As for run.")
@click.option("--hostname", default="", metavar="NAME", help="Its host name.  [default: the container's name]")
@click.option("-l", "--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label for it and its pod.")
@click.option("-i", "--interactive", is_flag=True, help="Its standard input was open.")
@click.option("--read-only", is_flag=True, help="Its root file system could not be written.")
@click.option("--privileged", is_flag=True, help="It had all rights of this machine's root.")
@click.option("--cap-add", multiple=True, metavar="NAME", help="It was granted a capability.")
@click.option("--cap-drop", multiple=True, metavar="NAME", help="It was taken a capability.")
@click.option(
    "--log-dir", envvar="TARE_LOG_DIR", default=LOG_DIRECTORY, show_default=True, metavar="DIR", help="Where logs go."
)
@click.argument("path", metavar="PATH|IMAGE")
@click.pass_obj
def restore(socket: str, /, path: str, log_dir: str, **options: Any) -> None:
    """Have the container of an archive (or of an image that is one), or the pod of a directory, go on where it was written down.

    Its IDs are printed. A container gets a pod of its own, and takes the same options as it was run with; of the pod of a directory
    the checkpoint says all. Restore only what you trust as root: what is in it runs.
    """
    with Client(socket) as client:
        if os.path.isdir(path):
            restore_directory(client, os.path.abspath(path))
        else:
            restore_archive(client, path, log_dir, options)


def restore_directory(client: Client, path: str) -> None:
    """A pod, whose containers go on together."""
    from tare.cri.v1 import api_pb2

    request = api_pb2.RestorePodRequest(checkpoint_path=path)
    answer: api_pb2.RestorePodResponse = client.call(client.runtime.RestorePod, request, timeout=LONG_SECONDS)
    for item in answer.restored_containers:
        start = api_pb2.StartContainerRequest(container_id=item.container_id)
        client.call(client.runtime.StartContainer, start, timeout=LONG_SECONDS)
    print(answer.pod_sandbox_id)


def restore_archive(client: Client, path: str, log_dir: str, options: dict[str, Any]) -> None:
    """A container in a pod of its own. Raises CallFailed, after which nothing of it is left."""
    from tare.cli.request import RunOptions

    archive = os.path.abspath(path)
    here = os.path.exists(archive)
    if not here and path.startswith(("/", "./", "../")):
        raise InvalidArgument(f"there is no file {path}")
    token = uuid.uuid4().hex
    directory = os.path.join(os.path.abspath(log_dir), token)
    wanted = RunOptions(
        image=archive if here else path, token=token, log_directory=directory, attached=False, **options
    )
    session = Session(client, Signals(), wanted)
    session.check()
    try:
        session.create()
        session.start()
    except BaseException:
        session.remove()
        raise
    print(session.container_id)
