"""Taking pods and containers away, with the log files of those that `tare run` made."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

from tare.cli.request import NAMESPACE, RUN_ANNOTATION
from tare.cri.v1 import api_pb2
from tare.errors import FailedPrecondition

if TYPE_CHECKING:
    from tare.cli.client import Client


ATTEMPT = re.compile(r"[0-9]{1,9}\.log")


def is_run_pod(pod: api_pb2.PodSandbox) -> bool:
    """Whether `tare run` made it, for one container."""
    return pod.metadata.namespace == NAMESPACE and RUN_ANNOTATION in pod.annotations


def remove_pod(client: Client, pod_id: str, log_paths: list[str]) -> None:
    """Stop and remove a pod with its containers, then these log files (of containers that were in it) and the directory that held them."""
    client.call(client.runtime.StopPodSandbox, api_pb2.StopPodSandboxRequest(pod_sandbox_id=pod_id))
    client.call(client.runtime.RemovePodSandbox, api_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod_id))
    for path in log_paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    for directory in {os.path.dirname(path) for path in log_paths}:
        for path in attempts_in(directory):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        with contextlib.suppress(OSError):  # another file is in it, or it is gone already
            os.rmdir(directory)


def attempts_in(directory: str) -> list[str]:
    """The logs of a container's attempts, in their order: "0.log", "1.log", …; those of attempts that are no more are among them."""
    try:
        found = [name for name in os.listdir(directory) if ATTEMPT.fullmatch(name)]
    except FileNotFoundError:
        return []
    return [f"{directory}/{name}" for name in sorted(found, key=lambda name: int(name.partition(".")[0]))]


def log_paths(client: Client, containers: list[api_pb2.Container]) -> list[str]:
    """Where these containers' logs are."""
    return [path for c in containers if (path := client.container_status(c.id).log_path)]


def check_idle(what: str, containers: list[api_pb2.Container]) -> None:
    """Raises FailedPrecondition where one of the containers runs."""
    running = [c for c in containers if c.state == api_pb2.CONTAINER_RUNNING]
    if running:
        names = ", ".join(c.metadata.name for c in running)
        raise FailedPrecondition(f"{what} is running ({names})", hint="stop it first, or remove it with -f")
