"""`tare ps`, `tare pods`, `tare stop`, `tare rm`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from tare.cli.client import CALL_SECONDS, Client
from tare.cli.health import shown, supervised
from tare.cli.lookup import Candidate, pick
from tare.cli.options import output_option, quiet_option
from tare.cli.output import age, as_dict, print_json, print_table, short_id

if TYPE_CHECKING:
    from tare.cri.v1 import api_pb2


def container_candidates(containers: list[api_pb2.Container]) -> list[Candidate]:
    """What a word can mean among these. Of several attempts at one container the last has the name, the others their IDs alone."""
    last: dict[tuple[str, str], int] = {}
    for c in containers:
        key = (c.pod_sandbox_id, c.metadata.name)
        last[key] = max(last.get(key, 0), c.metadata.attempt)
    named = {c.id for c in containers if c.metadata.attempt == last[c.pod_sandbox_id, c.metadata.name]}
    return [Candidate("container", c.id, c.metadata.name if c.id in named else "") for c in containers]


def pod_candidates(pods: list[api_pb2.PodSandbox]) -> list[Candidate]:
    """What a word can mean among these."""
    return [Candidate("pod", p.id, p.metadata.name) for p in pods]


def describe_state(client: Client, container: api_pb2.Container) -> str:
    """ "Running", or how it ended: "Exited (137, OOMKilled) 2 minutes ago"."""
    from tare.cri.v1 import api_pb2

    name = api_pb2.ContainerState.Name(container.state).removeprefix("CONTAINER_").capitalize()
    if container.state != api_pb2.CONTAINER_EXITED:
        return name
    status = client.container_status(container.id)
    reason = "" if status.reason in ("", "Completed", "Error") else f", {status.reason}"
    return f"{name} ({status.exit_code}{reason}) {age(status.finished_at, time.time_ns())}"


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="Those that do not run, too.")
@quiet_option
@output_option
@click.pass_obj
def ps(socket: str, everything: bool, quiet: bool, output: str) -> None:
    """List the containers that run."""
    from tare.cri.v1 import api_pb2

    with Client(socket) as client:
        known = {item.container_id: item for item in supervised(client).values()}
        waiting = {container for container, item in known.items() if item.state == "waiting"}
        containers = [
            c for c in client.containers() if everything or c.state == api_pb2.CONTAINER_RUNNING or c.id in waiting
        ]
        if output == "json":
            print_json(as_dict(api_pb2.ListContainersResponse(containers=containers)))
            return
        if quiet:
            print("\n".join(c.id for c in containers), end="\n" if containers else "")
            return
        pods = {p.id: p.metadata.name for p in client.pods()}
        now = time.time_ns()
        rows = [
            [
                short_id(c.id),
                c.metadata.name,
                c.image.user_specified_image or c.image.image,
                shown(describe_state(client, c), known.get(c.id), now),
                age(c.created_at, now),
                pods.get(c.pod_sandbox_id, short_id(c.pod_sandbox_id)),
            ]
            for c in containers
        ]
    print_table(["CONTAINER", "NAME", "IMAGE", "STATE", "CREATED", "POD"], rows)


@click.command()
@quiet_option
@output_option
@click.pass_obj
def pods(socket: str, quiet: bool, output: str) -> None:
    """List the pods, with their addresses."""
    from tare.cri.v1 import api_pb2

    with Client(socket) as client:
        found = client.pods()
        if output == "json":
            print_json(as_dict(api_pb2.ListPodSandboxResponse(items=found)))
            return
        if quiet:
            print("\n".join(p.id for p in found), end="\n" if found else "")
            return
        counts: dict[str, int] = {}
        for container in client.containers():
            if container.state == api_pb2.CONTAINER_RUNNING:
                counts[container.pod_sandbox_id] = counts.get(container.pod_sandbox_id, 0) + 1
        rows = [pod_row(client, pod, counts.get(pod.id, 0)) for pod in found]
    print_table(["POD", "NAME", "NAMESPACE", "STATE", "IP", "RUNNING", "CREATED"], rows)


def pod_row(client: Client, pod: api_pb2.PodSandbox, running: int) -> list[str]:
    """A pod's line in the table."""
    from tare.cri.v1 import api_pb2

    request = api_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod.id)
    network = client.call(client.runtime.PodSandboxStatus, request).status.network
    state = "Ready" if pod.state == api_pb2.SANDBOX_READY else "NotReady"
    name, namespace = pod.metadata.name, pod.metadata.namespace
    return [
        short_id(pod.id),
        name,
        namespace,
        state,
        network.ip or "-",
        str(running),
        age(pod.created_at, time.time_ns()),
    ]


@click.command()
@click.argument("words", metavar="CONTAINER|POD...", nargs=-1, required=True)
@click.option(
    "-t", "--timeout", type=click.IntRange(min=0), default=10, show_default=True, help="Seconds until it is killed."
)
@click.pass_obj
def stop(socket: str, words: tuple[str, ...], timeout: int) -> None:
    """Stop containers, or pods with all their containers."""
    from tare.cri.v1 import api_pb2

    with Client(socket) as client:
        everything = container_candidates(client.containers()) + pod_candidates(client.pods())
        for word in words:
            target = pick(prefer_containers(everything, word), word, "container or pod")
            if target.kind == "container":
                request = api_pb2.StopContainerRequest(container_id=target.id, timeout=timeout)
                client.call(client.runtime.StopContainer, request, timeout=timeout + CALL_SECONDS)
            else:
                client.call(client.runtime.StopPodSandbox, api_pb2.StopPodSandboxRequest(pod_sandbox_id=target.id))
            print(word)


def prefer_containers(candidates: list[Candidate], word: str) -> list[Candidate]:
    """Where a container and a pod have the name, as after `tare run`, the container is meant."""
    if any(c.kind == "container" and c.name == word for c in candidates):
        return [c for c in candidates if c.kind == "container" or c.name != word]
    return candidates


@click.command("rm")
@click.argument("words", metavar="CONTAINER|POD...", nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="Kill what still runs; nothing there is no failure.")
@click.pass_obj
def remove(socket: str, words: tuple[str, ...], force: bool) -> None:
    """Remove containers, or pods with all their containers.

    A container that `tare run` made goes with its pod and its log.
    """
    from tare.errors import NotFound

    with Client(socket) as client:
        for word in words:
            try:
                remove_one(client, word, force)
            except NotFound:
                if not force:
                    raise
                continue
            print(word)


def remove_one(client: Client, word: str, force: bool) -> None:
    """Remove what `word` means. Raises NotFound, FailedPrecondition."""
    from tare.cli import removal
    from tare.cri.v1 import api_pb2

    containers, all_pods = client.containers(), client.pods()
    candidates = container_candidates(containers) + pod_candidates(all_pods)
    target = pick(prefer_containers(candidates, word), word, "container or pod")
    run_pods = {p.id for p in all_pods if removal.is_run_pod(p)}
    pod_id = target.id if target.kind == "pod" else next(c.pod_sandbox_id for c in containers if c.id == target.id)
    whole_pod = target.kind == "pod" or pod_id in run_pods
    concerned = [c for c in containers if c.id == target.id or (whole_pod and c.pod_sandbox_id == pod_id)]
    if not force:
        removal.check_idle(f"{target.kind} {word}", concerned)
    if whole_pod:
        removal.remove_pod(client, pod_id, removal.log_paths(client, concerned) if pod_id in run_pods else [])
    else:
        client.call(client.runtime.RemoveContainer, api_pb2.RemoveContainerRequest(container_id=target.id))
