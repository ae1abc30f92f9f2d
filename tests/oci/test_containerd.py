"""containerd with Tare as its runtime binary: a pod by CRI, its container's limits, exec, log, exit code, and its end."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import images, peers
from bench.peers import Peer
from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2
from tests.support.oci import wait_for
from tests.support.registry import serving

pytestmark = [pytest.mark.root, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def node() -> Iterator[tuple[Peer, str]]:
    """containerd with an image."""
    base = Path(tempfile.mkdtemp(prefix="tare-test-", dir="/var/lib"))
    try:
        with (
            serving(base / "registry", images.make(base / "layouts")) as registry,
            peers.containerd(base, registry.url, False) as peer,
        ):
            image = f"{registry.url}/{images.BUSYBOX}"
            client = peer.client
            client.call(client.images.PullImage, api_pb2.PullImageRequest(image=api_pb2.ImageSpec(image=image)))
            yield peer, image
    finally:
        shutil.rmtree(base)


def pod_of(peer: Peer) -> api_pb2.PodSandboxConfig:
    """A pod in the node's network."""
    uid = uuid.uuid4().hex
    namespaces = api_pb2.NamespaceOption(pid=api_pb2.CONTAINER, network=api_pb2.NODE)
    return api_pb2.PodSandboxConfig(
        metadata=api_pb2.PodSandboxMetadata(name=f"test-{uid[:8]}", uid=uid, namespace="test"),
        log_directory=str(peer.logs / uid),
        linux=api_pb2.LinuxPodSandboxConfig(
            cgroup_parent=peer.group.cgroup_parent,
            security_context=api_pb2.LinuxSandboxSecurityContext(namespace_options=namespaces),
        ),
    )


def container_of(image: str, script: str) -> api_pb2.ContainerConfig:
    """A container that runs a script, with a limit and the default filter."""
    options = api_pb2.NamespaceOption(pid=api_pb2.CONTAINER, network=api_pb2.NODE)
    profile = api_pb2.SecurityProfile(profile_type=api_pb2.SecurityProfile.RuntimeDefault)
    return api_pb2.ContainerConfig(
        metadata=api_pb2.ContainerMetadata(name="main"),
        image=api_pb2.ImageSpec(image=image),
        command=["/bin/sh", "-c", script],
        log_path="main.log",
        linux=api_pb2.LinuxContainerConfig(
            resources=api_pb2.LinuxContainerResources(memory_limit_in_bytes=64 << 20, cpu_shares=256),
            security_context=api_pb2.LinuxContainerSecurityContext(namespace_options=options, seccomp=profile),
        ),
    )


def test_containerd_runs_a_pod(node: tuple[Peer, str]) -> None:
    peer, image = node
    client, runtime = peer.client, peer.client.runtime
    pod = pod_of(peer)
    pod_id = client.call(
        runtime.RunPodSandbox, api_pb2.RunPodSandboxRequest(config=pod, runtime_handler="tare")
    ).pod_sandbox_id
    script = "trap 'exit 4' TERM; echo begun; while :; do sleep 0.1; done"
    config = container_of(image, script)
    made = client.call(
        runtime.CreateContainer,
        api_pb2.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=pod),
    ).container_id
    client.call(runtime.StartContainer, api_pb2.StartContainerRequest(container_id=made))
    assert client.container_status(made).state == api_pb2.CONTAINER_RUNNING
    log = Path(pod.log_directory) / "main.log"
    wait_for(lambda: True if log.exists() and " stdout F begun\n" in log.read_text() else None)
    command = ["sh", "-c", "cat /proc/1/cmdline | tr '\\0' ' '; grep Seccomp: /proc/self/status; exit 3"]
    answer = client.call(runtime.ExecSync, api_pb2.ExecSyncRequest(container_id=made, cmd=command, timeout=20))
    assert answer.exit_code == 3
    assert b"sleep 0.1" in answer.stdout
    assert answer.stdout.endswith(b"Seccomp:\t2\n")
    update = api_pb2.UpdateContainerResourcesRequest(
        container_id=made, linux=api_pb2.LinuxContainerResources(memory_limit_in_bytes=96 << 20)
    )
    client.call(runtime.UpdateContainerResources, update)
    stats = client.call(runtime.ContainerStats, api_pb2.ContainerStatsRequest(container_id=made)).stats
    assert stats.memory.working_set_bytes.value > 0
    client.call(runtime.StopContainer, api_pb2.StopContainerRequest(container_id=made, timeout=20))
    status = client.container_status(made)
    assert (status.state, status.exit_code) == (api_pb2.CONTAINER_EXITED, 4)
    client.call(runtime.StopPodSandbox, api_pb2.StopPodSandboxRequest(pod_sandbox_id=pod_id))
    client.call(runtime.RemovePodSandbox, api_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod_id))


def test_a_program_that_is_missing_is_said_to_be(node: tuple[Peer, str]) -> None:
    peer, image = node
    client, runtime = peer.client, peer.client.runtime
    pod = pod_of(peer)
    pod_id = client.call(
        runtime.RunPodSandbox, api_pb2.RunPodSandboxRequest(config=pod, runtime_handler="tare")
    ).pod_sandbox_id
    config = container_of(image, "")
    config.command[:] = ["/no/such/program"]
    made = client.call(
        runtime.CreateContainer,
        api_pb2.CreateContainerRequest(pod_sandbox_id=pod_id, config=config, sandbox_config=pod),
    ).container_id
    with pytest.raises(CallFailed, match=r"(?i)no such file or directory"):
        client.call(runtime.StartContainer, api_pb2.StartContainerRequest(container_id=made))
    client.call(runtime.StopPodSandbox, api_pb2.StopPodSandboxRequest(pod_sandbox_id=pod_id))
    client.call(runtime.RemovePodSandbox, api_pb2.RemovePodSandboxRequest(pod_sandbox_id=pod_id))
