"""What ContainerStatus and PodSandboxStatus say, whole: everything that a kubelet and a person look for in them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("stat") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


def verbose(node: Node, container: str) -> dict[str, Any]:
    """What a verbose ContainerStatus adds."""
    client = node.daemon.client
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    found: dict[str, Any] = json.loads(client.call(client.runtime.ContainerStatus, request).info["info"])
    return found


def test_a_container_tells_all_of_itself(node: Node) -> None:
    source = node.daemon.base / "source"
    source.mkdir()
    pod = node.run_pod("all")
    config = node.container_config(
        "main",
        "sh",
        "-c",
        "trap 'exit 9' USR1; while :; do sleep 0.02; done",
        security=pb.LinuxContainerSecurityContext(
            run_as_user=pb.Int64Value(value=1000), run_as_group=pb.Int64Value(value=1001), supplemental_groups=[1002]
        ),
        resources=pb.LinuxContainerResources(cpu_shares=300, cpu_quota=40_000, cpu_period=80_000),
        mounts=[
            # Neither path is written as the kernel would: both come back as they were sent.
            pb.Mount(container_path="/data//x/", host_path=f"{source}/./", readonly=True),
            pb.Mount(container_path="/image", image=pb.ImageSpec(image=node.image), readonly=True),
        ],
        annotations={"a": "b\n\u00e9"},
        labels={"l": ""},
        stop_signal=pb.SIGNAL_SIGUSR1,
    )
    container = node.start(node.create(pod, config))
    status = node.status(container)
    who = status.user.linux
    assert (who.uid, who.gid, sorted(who.supplemental_groups)) == (1000, 1001, [1001, 1002])
    data, image = status.mounts
    assert (data.container_path, data.host_path, data.readonly) == ("/data//x/", f"{source}/./", True)
    assert (image.container_path, image.image.image, image.image.image_ref) == ("/image", node.image, node.pull())
    limits = status.resources.linux
    assert (limits.cpu_shares, limits.cpu_quota, limits.cpu_period) == (300, 40_000, 80_000)
    assert status.log_path == str(node.logs / "all" / "main" / "0.log")
    assert status.stop_signal == pb.SIGNAL_SIGUSR1
    assert (dict(status.annotations), dict(status.labels)) == ({"a": "b\n\u00e9"}, {"l": ""})
    assert (status.image_id, status.image.image) == (node.pull(), node.image)
    assert status.image_ref.partition("@")[0] == node.image.rpartition(":")[0] and "@sha256:" in status.image_ref
    assert (status.reason, status.message, status.finished_at) == ("", "", 0)
    node.stop(container, 20)
    ended = node.status(container)
    assert (ended.exit_code, ended.reason) == (9, "Error")


def test_a_pod_tells_its_containers_and_when(node: Node) -> None:
    pod = node.run_pod("pod")
    made = [node.create(pod, name, "true") for name in ("first", "second")]
    client = node.daemon.client
    before = time.time_ns()
    request = pb.PodSandboxStatusRequest(pod_sandbox_id=pod, verbose=True)
    reply = client.call(client.runtime.PodSandboxStatus, request)
    assert before <= reply.timestamp <= time.time_ns()
    assert [status.id for status in reply.containers_statuses] == made
    assert list(reply.containers_statuses) == [node.status(container) for container in made]
    info = json.loads(reply.info["info"])
    assert info["network"]["ips"] == [reply.status.network.ip]
    assert info["network"]["namespace"] == info["namespaces"]["net"]
    assert info["timings"]["createdAt"] == reply.status.created_at


def test_verbose_says_what_and_where(node: Node) -> None:
    pod = node.run_pod("verbose")
    container = node.create(pod, "main", "sleep", "1000")
    assert verbose(node, container)["pid"] == 0
    node.start(container)
    info, status = verbose(node, container), node.status(container)
    assert info["pid"] > 0 and info["sandboxID"] == pod
    assert info["runtimeSpec"]["process"]["args"] == ["sleep", "1000"]
    assert "/proc" in [mount["destination"] for mount in info["runtimeSpec"]["mounts"]]
    assert info["timings"] == {"createdAt": status.created_at, "startedAt": status.started_at, "finishedAt": 0}
