"""Pods whose control groups systemd makes, through the gRPC socket of a real daemon: for a guest that systemd runs (`--systemd`).

Named by the guest's selection alone: elsewhere there is no systemd to ask.
"""

from __future__ import annotations

import asyncio
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.cgroups.scopes import SystemdGroups
from tare.cgroups.systemd import Systemd
from tare.cgroups.units import place_of, slice_properties
from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, busy_node, cgroups_named

pytestmark = pytest.mark.root

MIB = 1 << 20
CGROUPS = Path("/sys/fs/cgroup")
SLICE = "kubepods-burstable-podone.slice"
SLICE_PATH = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podone.slice"


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("sysd") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing, nor in systemd."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []
    assert units() == []
    assert cgroups_named("kubepods") == cgroups_named("tare.slice") == []


def systemctl(*words: str) -> str:
    return subprocess.run(["systemctl", *words], check=True, capture_output=True, text=True, timeout=60).stdout


def units() -> list[str]:
    """Tare's units and pods' that systemd knows, failed ones among them."""
    lines = systemctl("list-units", "--all", "--plain", "--no-legend", "tare-*.scope", "tare*.slice", "kubepods*")
    return [line.split()[0] for line in lines.splitlines()]


def shown(unit: str, *properties: str) -> dict[str, str]:
    text = systemctl("show", unit, *(f"--property={name}" for name in properties))
    return dict(line.split("=", 1) for line in text.splitlines())


def pod_in(node: Node, name: str, parent: str) -> str:
    config = node.pod_config(name)
    config.linux.cgroup_parent = parent
    return node.run_pod(config)


def limited(node: Node, *command: str, memory: int = 64 * MIB) -> pb.ContainerConfig:
    limits = pb.LinuxContainerResources(
        memory_limit_in_bytes=memory,
        memory_swap_limit_in_bytes=memory,
        cpu_shares=512,
        cpu_quota=50000,
        cpu_period=100000,
    )
    return node.container_config("main", *command, resources=limits)


def files(directory: Path, *names: str) -> list[str]:
    return [(directory / name).read_text().strip() for name in names]


def update(run: Path, path: str, resources: dict[str, object]) -> None:
    """As the daemon does it."""

    async def body() -> None:
        groups = SystemdGroups(Systemd(), run)
        try:
            await groups.update(path, resources)
        finally:
            await groups.leave()
            groups.close()

    asyncio.run(body())


def start_slices() -> None:
    """As a kubelet does it."""

    async def body() -> None:
        systemd = Systemd()
        try:
            where = place_of(SLICE_PATH)
            assert where is not None
            await systemd.start(where.unit, slice_properties(where, "a kubelet's"))
        finally:
            await systemd.close()

    asyncio.run(body())


def test_systemd_is_found_and_told(node: Node) -> None:
    client = node.daemon.client
    answer = client.call(client.runtime.RuntimeConfig, pb.RuntimeConfigRequest())
    assert answer.linux.cgroup_driver == pb.SYSTEMD


def test_a_container_from_first_to_last(node: Node) -> None:
    pod = pod_in(node, "whole", SLICE)
    assert (CGROUPS / SLICE_PATH[1:]).is_dir()
    container = node.start(node.create(pod, limited(node, "sleep", "1000")))
    unit = f"tare-{container}.scope"
    path = f"{SLICE_PATH}/{unit}"
    directory = CGROUPS / path[1:]
    wanted = {
        "ControlGroup": path,
        "Slice": SLICE,
        "Delegate": "yes",
        "MemoryMax": str(64 * MIB),
        "MemorySwapMax": "0",
        "CPUQuotaPerSecUSec": "500ms",
        "TasksMax": "infinity",
        "DevicePolicy": "strict",
    }
    assert shown(unit, *wanted) == wanted
    limits = ("memory.max", "memory.swap.max", "cpu.max", "pids.max")
    assert files(directory, *limits) == [str(64 * MIB), "0", "50000 100000", "max"]
    [main] = files(directory, "cgroup.procs")
    assert Path(f"/proc/{main}/cgroup").read_text() == f"0::{path}\n"
    assert Path(f"/proc/{main}/comm").read_text() == "sleep\n"

    # A device that is not among the container's: also after an update, and when systemd has loaded everything anew.
    open_kmsg = ("sh", "-c", "mknod /kmsg c 1 11; head -c 1 /kmsg; echo $?; head -c 1 /dev/zero | wc -c; rm /kmsg")
    assert node.exec(container, *open_kmsg).stdout == b"1\n1\n"
    update(node.daemon.base, path, {"memory": {"limit": 48 * MIB, "swap": 48 * MIB}, "pids": {"limit": 100}})
    systemctl("daemon-reload")
    assert files(directory, *limits) == [str(48 * MIB), "0", "50000 100000", "100"]
    assert shown(unit, "MemoryMax", "TasksMax") == {"MemoryMax": str(48 * MIB), "TasksMax": "100"}
    assert node.exec(container, *open_kmsg).stdout == b"1\n1\n"
    assert node.exec(container, "cat", "/proc/self/cgroup").stdout.startswith(b"0::/tare-exec-")

    node.daemon.kill()
    node.daemon.start()
    assert node.exec(container, "echo", "here").stdout == b"here\n"
    node.stop(container, timeout=0)
    status = node.wait(container)
    assert (status.exit_code, status.reason) == (137, "Error")
    node.remove(container)
    assert not directory.exists() and unit not in units()
    node.stop_pod(pod)
    assert units() == []


def test_an_oom_kill_is_told_although_systemd_takes_the_group_away(node: Node) -> None:
    pod = pod_in(node, "oom", SLICE)
    beside = node.start(node.create(pod, "beside", "sleep", "1000"))
    for attempt in range(3):
        config = limited(node, "tail", "/dev/zero", memory=16 * MIB)
        config.metadata.attempt = attempt
        status = node.wait(node.start(node.create(pod, config)))
        assert (status.exit_code, status.reason) == (137, "OOMKilled")
    node.stop(beside, timeout=0)
    assert node.wait(beside).reason == "Error"


def test_an_oom_kill_is_told_by_the_next_daemon(node: Node) -> None:
    pod = pod_in(node, "away", SLICE)
    beside = node.start(node.create(pod, "beside", "sleep", "1000"))
    config = limited(node, "sh", "-c", "until [ -e /now ]; do sleep 0.1; done; exec tail /dev/zero", memory=16 * MIB)
    container = node.start(node.create(pod, config))
    [main] = files(CGROUPS / SLICE_PATH[1:] / f"tare-{container}.scope", "cgroup.procs")
    gone = os.pidfd_open(int(main.split()[0]))
    try:
        node.daemon.kill()
        Path(f"/proc/{main.split()[0]}/root/now").touch()
        assert select.select([gone], [], [], 60)[0]
    finally:
        os.close(gone)
    node.daemon.start()
    status = node.wait(container)
    assert (status.exit_code, status.reason) == (137, "OOMKilled")
    node.stop(beside, timeout=0)
    assert node.wait(beside).reason == "Error"


def test_a_pod_without_a_parent_has_a_slice_of_tares(node: Node) -> None:
    pod = node.run_pod("alone")
    container = node.start(node.create(pod, "main", "true"))
    assert node.wait(container).exit_code == 0
    assert shown(f"tare-{pod}.slice", "ControlGroup") == {"ControlGroup": f"/tare.slice/tare-{pod}.slice"}


def test_a_slice_that_was_there_stays(node: Node) -> None:
    start_slices()
    try:
        pod = pod_in(node, "there", SLICE)
        node.wait(node.start(node.create(pod, "main", "true")))
        node.stop_pod(pod)
        node.remove_pod(pod)
        assert shown(SLICE, "ActiveState") == {"ActiveState": "active"}
    finally:
        systemctl("stop", SLICE, "kubepods-burstable.slice", "kubepods.slice")


def test_starts_that_fail_leave_no_unit(node: Node) -> None:
    pod = pod_in(node, "failing", SLICE)
    container = node.create(pod, "main", "no-such-command")
    node.refused("INTERNAL", "no-such-command", node.start, container)
    assert not any(unit.endswith(".scope") for unit in units())
    wrong = node.create(
        pod, node.container_config("wrong", "true", resources=pb.LinuxContainerResources(cpuset_cpus="999"))
    )
    node.refused("INVALID_ARGUMENT", "cpuset.cpus", node.start, wrong)
    assert not any(unit.endswith(".scope") for unit in units())


def test_a_parent_that_is_no_slice_is_refused(node: Node) -> None:
    node.refused("INVALID_ARGUMENT", "is no slice of systemd's", pod_in, node, "path", "/kubepods/podone")
