"""A reboot: the run directory is gone with everything that was of that boot, and what lasts says so and is whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from tare.api.v1 import tare_pb2
from tare.cri.v1 import api_pb2 as pb
from tare.launch import linux
from tests.support import leaks
from tests.support.cni import cni_node, until
from tests.support.daemon import mounts_below, remove_cgroups
from tests.support.node import Node, busy_node, rows

pytestmark = pytest.mark.root
COUNTS = "i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done"


def power_off(node: Node) -> None:
    """All of the instance that does not outlive a boot goes: processes, mounts, namespaces, links, groups, the run directory."""
    daemon = node.daemon
    daemon.kill()
    everything = leaks.processes()
    ours = {p.pid for p in everything if str(daemon.run) in p.command.split(" ")}
    ours |= set[int]().union(*(leaks.descendants(everything, pid) for pid in ours))
    for pid in ours:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    names = {*daemon.containers, *os.listdir(daemon.run / "containers")}
    names |= {f"tare-{pod}" for pod in os.listdir(daemon.run / "pods")}
    for point in reversed(mounts_below(daemon.run)):
        linux.umount(os.fsencode(point), linux.MNT_DETACH)
    remove_cgroups(names)
    shutil.rmtree(daemon.run)
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in ours) and time.monotonic() < deadline:
        time.sleep(0.02)


def after(node: Node, pod: str, ran: str, ended: str, created: str) -> None:
    """What a kubelet sees then, and what there is no more."""
    client = node.daemon.client
    status = node.pod_status(pod)
    assert status.state == pb.SANDBOX_NOTREADY
    lost = node.status(ran)
    assert (lost.state, lost.exit_code, lost.reason) == (pb.CONTAINER_EXITED, 255, "Unknown")
    assert "restarted" in lost.message and lost.finished_at >= lost.started_at > 0
    assert (node.status(ended).exit_code, node.status(created).state) == (3, pb.CONTAINER_CREATED)
    assert rows(node.daemon.root / "state.db", "leases WHERE released_at IS NULL") == []
    assert mounts_below(node.daemon.base) == node.links() == node.processes() == []
    lines = node.log(ran)
    assert lines == [str(number) for number in range(len(lines))] and lines
    found = client.call(client.node.Audit, tare_pb2.AuditRequest()).findings
    assert not found, found
    assert not any(item.trouble for item in client.stream(client.tare.Verify, tare_pb2.VerifyRequest()))
    other = node.run_pod(node.pod_config(status.metadata.name, attempt=1))
    assert node.wait(node.start(node.create(other, "again", "sh", "-c", "exit 6"))).exit_code == 6
    node.remove_all()
    assert node.settled() == []


def pod_with_all(node: Node) -> tuple[str, str, str, str]:
    """A pod, and in it a container that runs, one that has ended, and one that never ran."""
    pod = node.run_pod("reboot")
    ran = node.start(node.create(pod, "ran", "sh", "-c", COUNTS))
    ended = node.start(node.create(pod, "ended", "sh", "-c", "exit 3"))
    created = node.create(pod, "created", "true")
    node.wait(ended)
    node.wait_for_log(ran, "5")
    return pod, ran, ended, created


def test_with_the_embedded_network() -> None:
    with busy_node("boot") as node:
        names = pod_with_all(node)
        power_off(node)
        node.daemon.start()
        after(node, *names)


def test_with_plugins() -> None:
    """What they have noted of the pod (attachments, results, addresses) goes with it, though nobody asks for that."""
    with cni_node("cniboot") as node:
        bridge = {"type": "bridge", "bridge": "cni8", "isGateway": True, "ipam": node.ipam("10.78.0.0/24")}
        node.bring(bridge)
        pod = node.run_pod("reboot")
        assert node.addresses_held() and any(node.results.glob("*"))
        power_off(node)
        node.daemon.start()
        assert node.pod_status(pod).state == pb.SANDBOX_NOTREADY
        until(
            lambda: not node.addresses_held() and not any(node.results.glob("*"))
        )  # in the background, as plugins may hang
        assert rows(node.daemon.root / "state.db", "cni_attachments") == []
        assert node.pod_status(node.run_pod(node.pod_config("reboot", attempt=1))).network.ip
        node.remove_all()
        assert node.settled() == []
