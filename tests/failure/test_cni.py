"""CNI plugins that fail, in every way; deletions that fail; daemons killed in between. Nothing is left, and no pod waits for a plugin."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tare.network.cni import cache
from tests.support.cni import CniNode, cni_node, until

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shared() -> Iterator[CniNode]:
    with cni_node("cnif", settings="plugin_timeout = 1.0") as node:
        yield node


@pytest.fixture
def node(shared: CniNode) -> Iterator[CniNode]:
    """The node, on which each test must leave nothing."""
    shared.clear()
    yield shared
    shared.remove_all()
    assert shared.settled() == [], shared.daemon.told()


def bridge(node: CniNode) -> dict[str, Any]:
    """A plugin that works, whose work has to be taken back where one after it does not."""
    return {"type": "bridge", "bridge": "cni7", "isGateway": True, "ipam": node.ipam("10.77.0.0/24")}


@pytest.mark.parametrize(
    ("do", "status", "words"),
    [
        ("garbage", "INTERNAL", "what it printed is not JSON: 'segmentation fault: here be dragons'"),
        ("silent", "INTERNAL", "it ended with 0 and printed no result"),
        ("empty", "INTERNAL", "has no address of eth0"),
        ("error", "INTERNAL", "the sky fell; so it seems; its configuration is not valid (code 7)"),
        ("late", "INTERNAL", "it ended with 0 and printed an error"),
        ("again", "INTERNAL", "the moon is not up; so it seems; it asks to be tried again later (code 11)"),
        ("crash", "INTERNAL", "it ended with 3; it said: I could not find the door"),
        ("killed", "INTERNAL", "it ended with 137"),
        ("hang", "DEADLINE_EXCEEDED", "it did not end within 1 s"),
    ],
)
def test_one_that_fails_at_add(node: CniNode, do: str, status: str, words: str) -> None:
    """The error names network and plugin, and what the one before has made is taken back."""
    node.bring(bridge(node), node.scripted(do={"ADD": do}))
    with pytest.raises(CallFailed) as caught:
        node.run_pod("fails")
    assert (caught.value.status, words in str(caught.value)) == (status, True), caught.value
    assert "network pods" in str(caught.value) and "plugin scripted, ADD" in str(caught.value)
    assert len(node.noted("DEL")) == 1
    assert node.settled() == []


def test_one_that_is_not_there(node: CniNode) -> None:
    node.bring(bridge(node), {"type": "nowhere"})
    condition = node.network_condition()
    assert not condition.status and "plugin nowhere: there is no such program in" in condition.message
    node.refused("FAILED_PRECONDITION", "install the plugin", node.run_pod, "fails")
    (node.programs / "nowhere").write_text("\x00\x01 not a program")
    assert "is not executable" in node.network_condition().message
    (node.programs / "nowhere").chmod(0o755)
    assert "a program of this machine" in node.network_condition().message
    (node.programs / "nowhere").unlink()


def test_one_that_does_not_speak_the_version(node: CniNode) -> None:
    node.bring(node.scripted("old"), version="1.0.0")
    node.refused(
        "FAILED_PRECONDITION", "plugin old does not speak version 1.0.0, but 0.3.1, 0.4.0", node.run_pod, "old"
    )
    node.bring(node.scripted("old"), version="1.0.0", cniVersions=["0.4.0", "1.0.0"])
    node.run_pod("new")
    assert node.noted("ADD")[0]["told"]["cniVersion"] == "0.4.0"


def test_an_exhausted_range(node: CniNode) -> None:
    plugin = {**bridge(node), "bridge": "cni8", "ipam": node.ipam("10.76.0.0/30")}
    node.bring(plugin)
    node.run_pod("one")
    node.refused("INTERNAL", "no IP addresses available in range set", node.run_pod, "two")
    assert len(node.addresses_held()) == 1


@pytest.mark.parametrize("do", ["error", "hang", "crash"])
def test_a_deletion_that_fails_does_not_hold_the_pod(node: CniNode, do: str) -> None:
    """The pod is taken down and removed; DEL is due, is seen, and is done when it works, also by the next daemon."""
    node.bring(bridge(node), node.scripted())
    pod = node.run_pod("stuck")
    node.tell("DEL", do)
    began = time.monotonic()
    node.stop_pod(pod)
    assert time.monotonic() - began < 10
    node.remove_pod(pod)
    assert node.addresses_held() == ["10.77.0.2"]
    assert "plugin scripted, DEL" in node.network_info()["deletionsDue"][pod]
    node.daemon.kill()
    node.daemon.start()
    assert pod in node.network_info()["deletionsDue"]
    node.tell("DEL", None)
    until(lambda: node.settled() == [])
    last = node.noted("DEL")[-1]
    assert last["environment"]["CNI_NETNS"] == "" and last["told"]["prevResult"]["ips"]


@pytest.mark.parametrize("point", ["before", "after"])
def test_a_daemon_killed_around_the_addition(node: CniNode, point: str) -> None:
    node.bring(bridge(node), node.scripted())
    node.daemon.stop()
    node.daemon.start({"TARE_FAILPOINTS": f"RunPodSandbox.network.{point}=kill"})
    with pytest.raises(CallFailed):
        node.run_pod("killed")
    node.daemon.kill()
    node.daemon.start()
    assert node.settled() == []


def test_a_daemon_killed_while_a_plugin_runs(node: CniNode) -> None:
    """The plugin is ended, and DEL is done by the next daemon before anything else."""
    node.bring(bridge(node), node.scripted(do={"ADD": "hang"}))
    future = node.daemon.client.runtime.RunPodSandbox.future(
        pb.RunPodSandboxRequest(config=node.pod_config("hangs")), timeout=20
    )
    until(lambda: node.noted("ADD"))
    node.daemon.kill()
    assert future.exception() is not None
    node.daemon.start()
    until(lambda: node.noted("DEL"))
    assert node.settled() == []


def test_status_and_collection(node: CniNode) -> None:
    """CNI 1.1: a plugin says that it cannot work; at start it is told who is valid: whoever's, with a live namespace."""
    node.bring(node.scripted(do={"STATUS": "away"}), version="1.1.0")
    condition = node.network_condition()
    assert not condition.status and "gone for lunch" in condition.message and "(code 50)" in condition.message
    node.tell("STATUS", "hang")
    assert "it did not end within 1 s" in node.network_condition().message
    node.tell("STATUS", "pass")
    assert node.network_condition().status
    pod = node.run_pod("valid")
    for container, netns in (("live", "/proc/self/ns/net"), ("dead", "/run/netns/none"), ("unknown", "")):
        there = cache.Attachment(container_id=container, network="pods", interface="net1", netns=netns, config=b"{}")
        cache.Cache(node.results.parent).put(there)
    try:
        node.daemon.kill()
        node.daemon.start()
        until(lambda: node.noted("GC"))
        [note] = node.noted("GC")
        valid = {(item["containerID"], item["ifname"]) for item in note["told"]["cni.dev/valid-attachments"]}
        assert valid == {(pod, "eth0"), ("live", "net1"), ("unknown", "net1")}
        assert "runtimeConfig" not in note["told"] and note["environment"].get("CNI_CONTAINERID") is None
        assert sorted(path.name for path in node.results.glob("*-net1")) == [
            "pods-dead-net1",
            "pods-live-net1",
            "pods-unknown-net1",
        ]
    finally:
        for path in node.results.glob("*-net1"):
            path.unlink()


def test_pods_are_checked_at_start(node: CniNode) -> None:
    node.bring(node.scripted())
    pod = node.run_pod("broken")
    node.tell("CHECK", "error")
    node.daemon.kill()
    node.daemon.start()
    until(lambda: "the sky fell" in node.network_info()["failedChecks"].get(pod, ""))


def test_pods_outlive_a_change_of_mode(node: CniNode) -> None:
    """Who gave a pod its network takes it away."""
    node.bring(bridge(node), node.scripted())
    pod = node.run_pod("old")
    settings = node.daemon.settings
    node.daemon.stop()
    node.daemon.settings = settings.replace(
        'mode = "cni"', 'mode = "embedded"\nbridge = "tarecni0"\nsubnet = "10.99.0.0/24"'
    )
    node.daemon.start()
    try:
        assert node.network_info()["mode"] == "embedded"
        node.stop_pod(pod)
        assert [note["verb"] for note in map(json.loads, node.notes.read_text().splitlines())][-1] == "DEL"
        node.remove_all()
        assert node.settled() == []
    finally:
        node.daemon.stop()
        node.daemon.settings = settings
        node.daemon.start()
