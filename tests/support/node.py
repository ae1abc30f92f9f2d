"""A node for tests of the whole: a daemon, a registry with a busybox image, and CRI's calls in one line each.

    with busy_node(prefix) as node:
        pod = node.run_pod("web")
        container = node.start(node.create(pod, "main", "sh", "-c", "exit 3"))
        assert node.wait(container).exit_code == 3

`strays` tells what of the instance is there that belongs to no pod, container or image: nothing, whatever was killed.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tests.support import leaks
from tests.support.daemon import Daemon, mounts_below
from tests.support.images import Tree, busybox_image
from tests.support.registry import Registry

WAIT_SECONDS = 30.0
CGROUPS = Path("/sys/fs/cgroup")


class Node:
    """One daemon and one image to run, `image`."""

    def __init__(self, daemon: Daemon, image: str) -> None:
        self.daemon = daemon
        self.image = image
        self.logs = daemon.base / "logs"

    # Requests

    def pod_config(
        self,
        name: str,
        *,
        attempt: int = 0,
        pid: pb.NamespaceMode = pb.CONTAINER,
        network: pb.NamespaceMode = pb.POD,
        hostname: str = "",
        **more: Any,
    ) -> pb.PodSandboxConfig:
        """A pod; `more` are further fields of its configuration."""
        options = pb.NamespaceOption(pid=pid, network=network)
        security = pb.LinuxSandboxSecurityContext(namespace_options=options)
        return pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="tests", attempt=attempt),
            hostname=hostname or name,
            log_directory=str(self.logs / name),
            linux=pb.LinuxPodSandboxConfig(security_context=security),
            **more,
        )

    def container_config(
        self,
        name: str,
        *command: str,
        attempt: int = 0,
        resources: pb.LinuxContainerResources | None = None,
        security: pb.LinuxContainerSecurityContext | None = None,
        **more: Any,
    ) -> pb.ContainerConfig:
        """A container of the busybox image; `more` are further fields of its configuration."""
        return pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name, attempt=attempt),
            image=pb.ImageSpec(image=self.image),
            command=command,
            log_path=f"{name}/{attempt}.log",
            linux=pb.LinuxContainerConfig(resources=resources, security_context=security),
            **more,
        )

    # Calls

    def pull(self, image: str = "") -> str:
        """The image's ID."""
        client = self.daemon.client
        request = pb.PullImageRequest(image=pb.ImageSpec(image=image or self.image))
        return str(client.call(client.images.PullImage, request).image_ref)

    def remove_image(self, image: str = "") -> None:
        """All its tags."""
        client = self.daemon.client
        client.call(client.images.RemoveImage, pb.RemoveImageRequest(image=pb.ImageSpec(image=image or self.image)))

    def run_pod(self, config: pb.PodSandboxConfig | str, timeout: float | None = 60.0, handler: str = "") -> str:
        """A pod's ID."""
        client = self.daemon.client
        config = self.pod_config(config) if isinstance(config, str) else config
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return str(client.call(client.runtime.RunPodSandbox, request, timeout).pod_sandbox_id)

    def stop_pod(self, pod: str) -> None:
        """StopPodSandbox."""
        client = self.daemon.client
        client.call(client.runtime.StopPodSandbox, pb.StopPodSandboxRequest(pod_sandbox_id=pod))

    def remove_pod(self, pod: str) -> None:
        """RemovePodSandbox."""
        client = self.daemon.client
        client.call(client.runtime.RemovePodSandbox, pb.RemovePodSandboxRequest(pod_sandbox_id=pod))

    def remove_all(self) -> None:
        """Every pod."""
        for pod in self.daemon.client.pods():
            self.stop_pod(pod.id)
            self.remove_pod(pod.id)

    def pod_status(self, pod: str) -> pb.PodSandboxStatus:
        """PodSandboxStatus."""
        client = self.daemon.client
        request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod)
        status: pb.PodSandboxStatus = client.call(client.runtime.PodSandboxStatus, request).status
        return status

    def create(self, pod: str, config: pb.ContainerConfig | str, *command: str, timeout: float | None = 60.0) -> str:
        """A container's ID."""
        client = self.daemon.client
        config = self.container_config(config, *command) if isinstance(config, str) else config
        name = self.pod_status(pod).metadata.name
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=config, sandbox_config=self.pod_config(name))
        return str(client.call(client.runtime.CreateContainer, request, timeout).container_id)

    def start(self, container: str) -> str:
        """StartContainer; the same ID."""
        client = self.daemon.client
        client.call(client.runtime.StartContainer, pb.StartContainerRequest(container_id=container))
        return container

    def stop(self, container: str, timeout: int = 10) -> None:
        """StopContainer."""
        client = self.daemon.client
        client.call(client.runtime.StopContainer, pb.StopContainerRequest(container_id=container, timeout=timeout))

    def remove(self, container: str) -> None:
        """RemoveContainer."""
        client = self.daemon.client
        client.call(client.runtime.RemoveContainer, pb.RemoveContainerRequest(container_id=container))

    def exec(self, container: str, *command: str, timeout: int = 0) -> pb.ExecSyncResponse:
        """ExecSync."""
        client = self.daemon.client
        request = pb.ExecSyncRequest(container_id=container, cmd=command, timeout=timeout)
        response: pb.ExecSyncResponse = client.call(client.runtime.ExecSync, request)
        return response

    def update(self, container: str, **limits: Any) -> None:
        """UpdateContainerResources."""
        client = self.daemon.client
        linux = pb.LinuxContainerResources(**limits)
        request = pb.UpdateContainerResourcesRequest(container_id=container, linux=linux)
        client.call(client.runtime.UpdateContainerResources, request)

    def update_pod(self, pod: str, **limits: Any) -> None:
        """UpdatePodSandboxResources."""
        client = self.daemon.client
        resources = pb.LinuxContainerResources(**limits)
        request = pb.UpdatePodSandboxResourcesRequest(pod_sandbox_id=pod, resources=resources)
        client.call(client.runtime.UpdatePodSandboxResources, request)

    def status(self, container: str) -> pb.ContainerStatus:
        """ContainerStatus."""
        return self.daemon.client.container_status(container)

    def wait(self, container: str) -> pb.ContainerStatus:
        """Until it is EXITED."""
        deadline = time.monotonic() + WAIT_SECONDS
        while (status := self.status(container)).state != pb.CONTAINER_EXITED:
            assert time.monotonic() < deadline, f"container {container} has not ended"
            time.sleep(0.01)
        return status

    def log(self, container: str) -> list[str]:
        """The lines that it wrote to either stream, without their stamps."""
        text = Path(self.status(container).log_path).read_text()
        return [line.split(" ", 3)[3] for line in text.splitlines()]

    def said(self, container: str) -> list[str]:
        """The whole lines that it wrote, those that came in parts put together."""
        text = ""
        for line in Path(self.status(container).log_path).read_text().splitlines():
            _, _, tag, words = line.split(" ", 3)
            text += words + ("\n" if tag == "F" else "")
        return text.replace("\r", "").split("\n")[:-1]

    def wait_for_log(self, container: str, line: str) -> None:
        """Until it has written this line."""
        deadline = time.monotonic() + WAIT_SECONDS
        while line not in self.log(container):
            assert time.monotonic() < deadline, f"{line!r} did not come"
            time.sleep(0.01)

    def refused(self, status: str, words: str, call: object, *arguments: object) -> None:
        """A call must fail with this status, and say these words."""
        assert callable(call)
        try:
            call(*arguments)
        except CallFailed as error:
            assert (error.status, words in str(error)) == (status, True), f"{error.status}: {error}"
        else:
            raise AssertionError(f"it was not refused: {arguments}")

    # What is there

    def strays(self) -> list[str]:
        """What there is of the instance although it has no pod: mounts, namespaces, links, leases, cgroups, processes, files."""
        run, root = self.daemon.run, self.daemon.root
        found = [f"mount {point}" for point in mounts_below(self.daemon.base)]
        ours = ("pods", "containers", "exits", "tasks", "bundles", "consoles", "hooked")
        for directory in (*(run / name for name in ours), root / "containers"):
            found += [f"file {path}" for path in sorted(directory.glob("*"))]
        found += [f"link {line}" for line in self.links()]
        found += [f"lease {row}" for row in rows(root / "state.db", "leases WHERE released_at IS NULL")]
        for database, tables in ((root / "state.db", STATE_TABLES), (run / "boot.db", BOOT_TABLES)):
            found += [f"row of {table}: {row}" for table in tables for row in rows(database, table)]
        found += [f"process {process}" for process in self.processes()]
        return found

    def links(self) -> list[str]:
        """What pods have on the node, host ends of veths and devices for their rates: by the alias that names run directory and pod."""
        show = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True, timeout=10)
        return [line for line in show.stdout.splitlines() if f"{self.daemon.run.resolve()} " in line]

    def processes(self) -> list[str]:
        """Processes of this instance other than daemon, keeper, launcher and loggers."""
        everything = leaks.processes()
        keepers = {p.pid for p in everything if p.name == "tare-keeper" and str(self.daemon.run) in p.command}
        below = set[int]().union(*(leaks.descendants(everything, keeper) for keeper in keepers))
        helpers = ("tare-launcher", "tare-logger")
        return [f"{p.pid} {p.name} {p.command}" for p in everything if p.pid in below and p.name not in helpers]

    def settled(self) -> list[str]:
        """`strays`, once what the kernel takes its time with is gone."""
        deadline = time.monotonic() + 5.0
        while (found := self.strays()) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found


STATE_TABLES = ("pods", "containers", "plans", "ports")
BOOT_TABLES = ("pod_facts", "container_facts", "offers", "intents")


def rows(database: Path, table: str) -> list[tuple[object, ...]]:
    """What is in a table (or what a condition leaves of it)."""
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return connection.execute(f"SELECT * FROM {table}").fetchall()


def cgroups_named(name: str) -> list[str]:
    """Control groups whose own name has `name` in it."""
    return [f"{at}/{child}" for at, children, _ in os.walk(CGROUPS) for child in children if name in child]


@contextmanager
def busy_node(
    prefix: str, settings: str = "", environment: Mapping[str, str] | None = None, extra: Sequence[Tree | bytes] = ()
) -> Iterator[Node]:
    """A node whose image is in a registry and has been pulled. `prefix` names its directory, shortly; `extra` are layers over busybox."""
    with tempfile.TemporaryDirectory(prefix=f"tare-{prefix}-", dir="/var/lib") as name:
        base = Path(name)
        with (
            Registry(base / "registry") as registry,
            Daemon(base / "tare", settings=settings, environment=environment) as daemon,
        ):
            registry.push(busybox_image(base / "busybox", extra=extra), "tests/busybox:1")
            node = Node(daemon, f"{registry.url}/tests/busybox:1")
            node.pull()
            yield node
