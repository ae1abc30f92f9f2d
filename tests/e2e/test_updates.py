"""Limits of live containers and pods changed over CRI: all of them or none, and shown as they were last accepted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tare.cgroups.core import Groups
from tare.cri.v1 import api_pb2 as pb
from tests.support.handlers import SHARING, settings
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root
MIB = 1 << 20


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("upd") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


@pytest.fixture
def groups() -> Iterator[Groups]:
    found = Groups()
    yield found
    found.close()


def kernel(groups: Groups, path: str) -> dict[str, int]:
    """What the kernel has for a group, in version 1's terms."""
    v2 = groups.layout == "v2"

    def read(controller: str, file: str) -> list[str]:
        fd = groups.open_file(path, controller, file)
        assert fd is not None, f"{path} has no {file}"
        with os.fdopen(fd) as text:
            return text.read().split()

    quota, period = read("cpu", "cpu.max") if v2 else read("cpu", "cpu.cfs_quota_us") + read("cpu", "cpu.cfs_period_us")
    return {
        "memory": int(read("memory", "memory.max" if v2 else "memory.limit_in_bytes")[0]),
        "quota": -1 if quota == "max" else int(quota),
        "period": int(period),
        "shares": int(read("cpu", "cpu.weight" if v2 else "cpu.shares")[0]),
    }


def info(node: Node, container: str) -> dict[str, Any]:
    """What a verbose ContainerStatus adds."""
    client = node.daemon.client
    request = pb.ContainerStatusRequest(container_id=container, verbose=True)
    found: dict[str, Any] = json.loads(client.call(client.runtime.ContainerStatus, request).info["info"])
    return found


def running(node: Node, name: str, **limits: Any) -> tuple[str, str, str]:
    """A container that runs with these limits: its pod, its ID and its group."""
    pod = node.run_pod(name)
    config = node.container_config("main", "sleep", "1000", resources=pb.LinuxContainerResources(**limits))
    container = node.start(node.create(pod, config))
    return pod, container, group(node, container)


def group(node: Node, container: str) -> str:
    """Where a container's group is."""
    return str(info(node, container)["cgroup"])


def test_limits_change_under_a_running_process(node: Node, groups: Groups) -> None:
    _, container, path = running(
        node, "live", memory_limit_in_bytes=64 * MIB, cpu_quota=50_000, cpu_period=100_000, cpu_shares=512
    )
    pid, first = info(node, container)["pid"], kernel(groups, path)
    assert (first["memory"], first["quota"], first["period"]) == (64 * MIB, 50_000, 100_000)
    assert groups.layout == "v2" or first["shares"] == 512
    node.update(container, memory_limit_in_bytes=96 * MIB, cpu_quota=20_000)
    now = kernel(groups, path)
    assert (now["memory"], now["quota"], now["period"]) == (96 * MIB, 20_000, 100_000)
    assert info(node, container)["pid"] == pid
    shown = node.status(container).resources.linux
    assert (shown.memory_limit_in_bytes, shown.cpu_quota, shown.cpu_period, shown.cpu_shares) == (
        96 * MIB,
        20_000,
        100_000,
        512,
    )
    assert groups.processes(path) == [pid]


def test_a_refused_value_leaves_everything_as_it_was(node: Node, groups: Groups) -> None:
    _, container, path = running(node, "all", memory_limit_in_bytes=64 * MIB, cpu_shares=512)
    before, shown = kernel(groups, path), node.status(container).resources
    node.refused(
        "INVALID_ARGUMENT",
        "cpuset.cpus",
        lambda: node.update(container, memory_limit_in_bytes=96 * MIB, cpu_shares=100, cpuset_cpus="4000"),
    )
    assert kernel(groups, path) == before
    assert node.status(container).resources == shown


def test_a_limit_below_what_is_used_kills_nothing(node: Node, groups: Groups) -> None:
    fill = "head -c 30000000 /dev/zero > /dev/shm/full; echo full; sleep 1000"
    pod = node.run_pod("below")
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB)
    container = node.start(node.create(pod, node.container_config("main", "sh", "-c", fill, resources=limits)))
    node.wait_for_log(container, "full")
    path = group(node, container)
    node.refused(
        "INVALID_ARGUMENT" if groups.layout != "v2" else "FAILED_PRECONDITION",
        "memory",
        lambda: node.update(container, memory_limit_in_bytes=8 * MIB),
    )
    assert kernel(groups, path)["memory"] == 64 * MIB
    assert node.status(container).state == pb.CONTAINER_RUNNING


def test_a_created_container_starts_with_what_it_was_given_since(node: Node, groups: Groups) -> None:
    pod = node.run_pod("created")
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB)
    container = node.create(pod, node.container_config("main", "sleep", "1000", resources=limits))
    node.update(container, memory_limit_in_bytes=48 * MIB, cpu_shares=300, oom_score_adj=777)
    assert node.status(container).resources.linux.memory_limit_in_bytes == 48 * MIB
    node.start(container)
    now = kernel(groups, group(node, container))
    assert now["memory"] == 48 * MIB
    pid = info(node, container)["pid"]
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "777"
    assert (
        node.exec(container, "sh", "-c", "echo > /dev/full").exit_code == 1
    )  # the rules about devices are the former ones


def test_an_ended_or_unknown_container_is_refused(node: Node) -> None:
    pod = node.run_pod("ended")
    container = node.start(node.create(pod, "main", "true"))
    node.wait(container)
    node.refused("FAILED_PRECONDITION", "EXITED", lambda: node.update(container, cpu_shares=100))
    node.refused("NOT_FOUND", "f00d", lambda: node.update("f00d", cpu_shares=100))
    node.refused("INVALID_ARGUMENT", "linux.cpu_period", lambda: node.update(container, cpu_period=-1))


def test_what_was_updated_survives_the_daemon(node: Node, groups: Groups) -> None:
    _, container, path = running(node, "again", cpu_shares=512)
    node.update(container, cpu_shares=700)
    node.daemon.kill()
    node.daemon.start()
    assert node.status(container).resources.linux.cpu_shares == 700
    assert groups.layout == "v2" or kernel(groups, path)["shares"] == 700


def test_a_daemon_killed_halfway_leaves_the_former_limits(groups: Groups) -> None:
    for point in ("record.after", "limits.after"):
        with busy_node("updk", environment={}) as node:
            _, container, path = running(node, "half", cpu_shares=512, memory_limit_in_bytes=64 * MIB)
            node.daemon.stop()
            node.daemon.start({"TARE_FAILPOINTS": f"UpdateContainerResources.{point}=kill"})
            node.refused("UNAVAILABLE", "", lambda c=container, n=node: n.update(c, cpu_shares=700, cpu_quota=10_000))
            node.daemon.kill()
            node.daemon.start()
            shown = node.status(container).resources.linux
            assert (shown.cpu_shares, shown.cpu_quota, shown.memory_limit_in_bytes) == (512, 0, 64 * MIB)
            now = kernel(groups, path)
            assert (now["quota"], now["memory"]) == (-1, 64 * MIB)
            assert groups.layout == "v2" or now["shares"] == 512


def test_a_pod_whose_group_is_ours_is_limited_and_another_noted(node: Node, groups: Groups) -> None:
    pod, _, path = running(node, "pod")
    node.update_pod(pod, memory_limit_in_bytes=200 * MIB, cpu_shares=2000)
    parent = path.rpartition("/")[0]
    assert kernel(groups, parent)["memory"] == 200 * MIB
    node.refused("INVALID_ARGUMENT", "cpuset", lambda: node.update_pod(pod, cpu_shares=10, cpuset_cpus="4000"))
    assert groups.layout == "v2" or kernel(groups, parent)["shares"] == 2000
    node.stop_pod(pod)
    node.refused("FAILED_PRECONDITION", "NOTREADY", lambda: node.update_pod(pod, cpu_shares=10))
    node.refused("NOT_FOUND", "f00d", lambda: node.update_pod("f00d", cpu_shares=10))


def limited(node: Node, name: str, **limits: Any) -> pb.PodSandboxConfig:
    """A pod whose configuration has limits."""
    config = node.pod_config(name)
    config.linux.resources.CopyFrom(pb.LinuxContainerResources(**limits))
    return config


def test_a_pod_begins_with_the_limits_of_its_configuration(node: Node, groups: Groups) -> None:
    pod = node.run_pod(limited(node, "begin", memory_limit_in_bytes=128 * MIB, cpu_quota=60_000, cpu_period=100_000))
    container = node.start(node.create(pod, "main", "sleep", "1000"))
    parent = group(node, container).rpartition("/")[0]
    now = kernel(groups, parent)
    assert (now["memory"], now["quota"], now["period"]) == (128 * MIB, 60_000, 100_000)
    node.update_pod(pod, memory_limit_in_bytes=160 * MIB)
    now = kernel(groups, parent)
    assert (now["memory"], now["quota"]) == (160 * MIB, 60_000)
    bad = limited(node, "bad", cpu_shares=100, cpuset_cpus="4000")
    node.refused("INVALID_ARGUMENT", "cpuset.cpus", node.run_pod, bad)
    assert [item.id for item in node.daemon.client.pods()] == [pod]


def test_a_group_that_another_has_made_keeps_its_limits(node: Node, groups: Groups) -> None:
    name = f"tare-upd-{os.getpid()}"
    other = node.run_pod(limited(node, "other", memory_limit_in_bytes=96 * MIB))
    theirs = group(node, node.start(node.create(other, "main", "sleep", "1000"))).rpartition("/")[0]
    config = limited(node, name, memory_limit_in_bytes=64 * MIB)
    config.linux.cgroup_parent = theirs
    node.run_pod(config)
    assert kernel(groups, theirs)["memory"] == 96 * MIB


@pytest.fixture(scope="module")
def mixed() -> Iterator[Node]:
    with busy_node("updh", settings=settings()) as node:
        yield node


@pytest.mark.parametrize("handler", SHARING)
def test_other_runtimes_containers_are_updated_in_the_same_groups(mixed: Node, groups: Groups, handler: str) -> None:
    pod = mixed.run_pod(f"upd-{handler}", handler=handler)
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=64 * MIB)
    container = mixed.start(mixed.create(pod, mixed.container_config("main", "sleep", "1000", resources=limits)))
    mixed.update(container, memory_limit_in_bytes=96 * MIB, cpu_quota=20_000, cpu_period=50_000)
    now = kernel(groups, group(mixed, container))
    assert (now["memory"], now["quota"], now["period"]) == (96 * MIB, 20_000, 50_000)
    assert len(groups.processes(group(mixed, container))) == 1
    mixed.remove_pod(pod)


def test_a_sandboxs_limits_are_those_of_its_group(mixed: Node, groups: Groups) -> None:
    # runsc has no update of its own, and needs none: the whole sandbox is in the container's group.
    pod = mixed.run_pod("upd-runsc", handler="runsc")
    limits = pb.LinuxContainerResources(memory_limit_in_bytes=256 * MIB)
    container = mixed.start(mixed.create(pod, mixed.container_config("main", "sleep", "1000", resources=limits)))
    mixed.update(container, memory_limit_in_bytes=96 * MIB, cpu_quota=20_000, cpu_period=50_000)
    path = group(mixed, container)
    now = kernel(groups, path)
    assert (now["memory"], now["quota"], now["period"]) == (96 * MIB, 20_000, 50_000)
    assert mixed.status(container).resources.linux.memory_limit_in_bytes == 96 * MIB
    assert info(mixed, container)["pid"] in groups.processes(path)
    mixed.remove_pod(pod)
