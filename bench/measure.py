"""What is measured, through CRI alone: lifecycles, commands, CPU time, memory. Times are in seconds, sizes in bytes."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from bench.groups import pss
from bench.peers import Peer
from tare.cli.request import MASKED_PATHS, READONLY_PATHS
from tare.cri.v1 import api_pb2

STEPS = ("RunPodSandbox", "CreateContainer", "StartContainer", "StopContainer", "StopPodSandbox", "RemovePodSandbox")
SETTLE_SECONDS = 1.0


@dataclass(slots=True)
class Samples:
    """What was seen of one runtime."""

    steps: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    start: list[float] = field(default_factory=list)
    stop: list[float] = field(default_factory=list)
    execs: list[float] = field(default_factory=list)
    cpu_lifecycle: float = 0.0
    cpu_exec: float = 0.0
    memory_empty: dict[str, int] = field(default_factory=dict)
    memory_full: dict[str, int] = field(default_factory=dict)
    pods: int = 0


def pod_config(peer: Peer) -> api_pb2.PodSandboxConfig:
    """A pod like any other, with a name of its own."""
    uid = uuid.uuid4().hex
    namespaces = api_pb2.NamespaceOption(pid=api_pb2.CONTAINER)
    security = api_pb2.LinuxSandboxSecurityContext(namespace_options=namespaces)
    return api_pb2.PodSandboxConfig(
        metadata=api_pb2.PodSandboxMetadata(name=f"bench-{uid[:8]}", uid=uid, namespace="bench"),
        hostname="bench",
        log_directory=str(peer.logs / uid),
        linux=api_pb2.LinuxPodSandboxConfig(cgroup_parent=peer.group.cgroup_parent, security_context=security),
    )


def container_config(image: str) -> api_pb2.ContainerConfig:
    """A container that sleeps, with the rights and limits that a kubelet's have."""
    seccomp = api_pb2.SecurityProfile(profile_type=api_pb2.SecurityProfile.RuntimeDefault)
    security = api_pb2.LinuxContainerSecurityContext(
        namespace_options=api_pb2.NamespaceOption(pid=api_pb2.CONTAINER),
        masked_paths=MASKED_PATHS,
        readonly_paths=READONLY_PATHS,
        seccomp=seccomp,
    )
    limits = api_pb2.LinuxContainerResources(
        cpu_period=100_000, cpu_quota=100_000, cpu_shares=256, memory_limit_in_bytes=256 << 20
    )
    return api_pb2.ContainerConfig(
        metadata=api_pb2.ContainerMetadata(name="main"),
        image=api_pb2.ImageSpec(image=image),
        command=["/bin/sleep", "1000000"],
        log_path="main.log",
        linux=api_pb2.LinuxContainerConfig(resources=limits, security_context=security),
    )


class Bench:
    """The measurements of one runtime."""

    def __init__(self, peer: Peer, image: str) -> None:
        self.peer = peer
        self.image = image
        self.samples = Samples()

    def pull(self, image: str) -> None:
        """So that no pull is measured."""
        self.call("images", "PullImage", api_pb2.PullImageRequest(image=api_pb2.ImageSpec(image=image)))

    def call(self, service: str, method: str, request: object) -> object:
        """One call, unmeasured."""
        client = self.peer.client
        return client.call(getattr(getattr(client, service), method), request)

    def timed(self, method: str, request: object, keep: bool) -> object:
        """One call to the runtime service; its time is kept if asked for."""
        begin = time.perf_counter()
        answer = self.call("runtime", method, request)
        if keep:
            self.samples.steps[method].append(time.perf_counter() - begin)
        return answer

    def start(self, keep: bool = True) -> tuple[str, str]:
        """A pod with its container running: their IDs."""
        pod = pod_config(self.peer)
        begin = time.perf_counter()
        request = api_pb2.RunPodSandboxRequest(config=pod, runtime_handler=self.peer.handler)
        pod_id = self.timed("RunPodSandbox", request, keep).pod_sandbox_id  # type: ignore[attr-defined]
        create = api_pb2.CreateContainerRequest(
            pod_sandbox_id=pod_id, config=container_config(self.image), sandbox_config=pod
        )
        container_id = self.timed("CreateContainer", create, keep).container_id  # type: ignore[attr-defined]
        self.timed("StartContainer", api_pb2.StartContainerRequest(container_id=container_id), keep)
        if keep:
            self.samples.start.append(time.perf_counter() - begin)
        state = self.peer.client.container_status(container_id).state
        if state != api_pb2.CONTAINER_RUNNING:
            raise RuntimeError(f"{self.peer.name}: the container is in state {state} after StartContainer")
        return pod_id, container_id

    def stop(self, pod_id: str, container_id: str, keep: bool = True) -> None:
        """The container killed, the pod stopped, both removed."""
        begin = time.perf_counter()
        self.timed("StopContainer", api_pb2.StopContainerRequest(container_id=container_id, timeout=0), keep)
        self.timed("StopPodSandbox", api_pb2.StopPodSandboxRequest(pod_sandbox_id=pod_id), keep)
        self.timed("RemovePodSandbox", api_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod_id), keep)
        if keep:
            self.samples.stop.append(time.perf_counter() - begin)

    def lifecycle(self, keep: bool = True) -> None:
        """Start, then stop; its CPU time is added up until the runtime has come to rest."""
        before = self.peer.group.cpu_seconds()
        self.stop(*self.start(keep), keep)
        if keep:
            time.sleep(SETTLE_SECONDS / 10)
            self.samples.cpu_lifecycle += self.peer.group.cpu_seconds() - before

    def execute(self, count: int) -> None:
        """`true` in a running container, so many times (and twice before that are not counted)."""
        pod_id, container_id = self.start(keep=False)
        request = api_pb2.ExecSyncRequest(container_id=container_id, cmd=["/bin/true"], timeout=10)
        for _ in range(2):
            self.call("runtime", "ExecSync", request)
        before = self.peer.group.cpu_seconds()
        for _ in range(count):
            begin = time.perf_counter()
            answer = self.call("runtime", "ExecSync", request)
            self.samples.execs.append(time.perf_counter() - begin)
            if answer.exit_code:  # type: ignore[attr-defined]
                raise RuntimeError(f"{self.peer.name}: ExecSync of true ended with {answer.exit_code}")  # type: ignore[attr-defined]
        self.samples.cpu_exec = self.peer.group.cpu_seconds() - before
        self.stop(pod_id, container_id, keep=False)

    def idle(self, count: int) -> None:
        """Memory without pods and with so many that do nothing."""
        time.sleep(SETTLE_SECONDS)
        self.samples.memory_empty = self.memory()
        pods = [self.start(keep=False) for _ in range(count)]
        time.sleep(SETTLE_SECONDS)
        self.samples.memory_full = self.memory()
        self.samples.pods = count
        for pod_id, container_id in pods:
            self.stop(pod_id, container_id, keep=False)

    def memory(self) -> dict[str, int]:
        """PSS by role."""
        found: dict[str, int] = defaultdict(int)
        for pid in self.peer.group.processes():
            found[role(pid)] += pss(pid)
        return dict(found)


def role(pid: int) -> str:
    """What a process is in its runtime: by its first argument's file name, or the name it gave itself."""
    try:
        name = Path("/proc", str(pid), "comm").read_text().strip()
        words = Path("/proc", str(pid), "cmdline").read_bytes().decode(errors="replace").split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return "gone"
    if name.startswith("tare-"):
        return name.removeprefix("tare-")
    if "serve" in words:
        return "daemon"
    program = Path(words[0]).name
    known = {"containerd": "daemon", "containerd-shim-runc-v2": "shim", "pause": "pause", "sleep": "workload"}
    return known.get(program, program)
