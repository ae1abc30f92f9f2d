"""Networks as people and their tools see them: `tare run --network`, `tare network`, and the whole path in `tare inspect POD`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root
USUAL, BLUE, SUBNET = (
    f"tareu{os.getpid()}",
    f"tareb{os.getpid()}",
    f"10.214.{os.getpid() % 250}",
)  # apart from another run's
SETTINGS = f"""\
[network]
bridge = "{USUAL}"
[network.networks.blue]
bridge = "{BLUE}"
subnet = "{SUBNET}.0/24"
"""


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("nets", SETTINGS) as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


def tare(node: Node, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line."""
    environment = {**os.environ, "TARE_SOCKET": str(node.daemon.socket), "TARE_LOG_DIR": str(node.logs)}
    command = [sys.executable, "-m", "tare.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def said(node: Node, *arguments: str) -> str:
    """What it prints, where it must not fail."""
    result = tare(node, *arguments)
    assert (result.returncode, result.stderr) == (0, ""), result
    return result.stdout


def listed(node: Node) -> dict[str, dict[str, Any]]:
    """Networks by name."""
    return {item["name"]: item for item in json.loads(said(node, "network", "ls", "-o", "json"))}


def inspected(node: Node, pod: str) -> dict[str, Any]:
    """The pod's way through the node."""
    (found,) = json.loads(said(node, "inspect", pod))
    network: dict[str, Any] = found["info"]["info"]["network"]
    return network


def test_run_on_a_network_by_name(node: Node) -> None:
    shown = said(node, "run", "--network", "blue", node.image, "ip", "-o", "addr", "show", "dev", "eth0")
    assert f" inet {SUBNET}." in shown
    result = tare(node, "run", "--network", "red", node.image, "true")
    assert result.returncode == 125 and "there are only blue, default" in result.stderr


def test_networks_are_listed_shown_and_taken_away(node: Node) -> None:
    pod = node.run_pod(node.pod_config("web", annotations={"network.tare.dev/network": "blue"}))
    usual, blue = listed(node)["default"], listed(node)["blue"]
    assert (usual["state"], usual["bridge"], usual["pods"]) == ("ready", USUAL, {})
    assert (blue["state"], blue["subnets"], blue["gateways"]) == ("ready", [f"{SUBNET}.0/24"], [f"{SUBNET}.1/24"])
    assert blue["pods"] == {pod: node.pod_status(pod).network.ip}
    rows = [line.split() for line in said(node, "network", "ls").splitlines()]
    assert rows[0] == ["NAME", "MODE", "STATE", "BRIDGE", "SUBNETS", "PODS", "FREE"]
    assert ["blue", "embedded", "ready", BLUE, f"{SUBNET}.0/24", "1", "252"] in rows
    (told,) = json.loads(said(node, "network", "inspect", "blue"))
    assert told["pods"] == {pod: {"name": "tests/web", "address": node.pod_status(pod).network.ip}}
    result = tare(node, "network", "rm", "blue")
    assert result.returncode == 1 and f"1 pods are on it: {pod[:13]}" in result.stderr
    assert said(node, "network", "prune") == f"removed default ({USUAL})\n"
    assert listed(node)["default"]["state"] == "made when needed"
    node.stop_pod(pod)
    node.remove_pod(pod)
    assert said(node, "network", "rm", "blue") == f"removed blue ({BLUE})\n"
    links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True, check=True, timeout=10).stdout
    assert BLUE not in links and USUAL not in links
    assert tare(node, "network", "inspect", "red").stderr == "tare: there is no network red (see  tare network ls)\n"
    assert node.pod_status(node.run_pod("again")).network.ip


def test_the_whole_path_of_a_pod(node: Node) -> None:
    mapping = pb.PortMapping(protocol=pb.TCP, container_port=80, host_port=18931)
    rates = {"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "20M"}
    pod = node.run_pod(node.pod_config("web", annotations=rates, port_mappings=[mapping]))
    found, address = inspected(node, "web"), node.pod_status(pod).network.ip
    assert (found["mode"], found["name"], found["bridge"], found["lease"]) == (
        "embedded",
        "default",
        USUAL,
        address,
    )
    assert found["namespace"] == f"{node.daemon.run}/pods/{pod}/net"
    assert found["namespaceNumber"] == os.stat(found["namespace"]).st_ino
    eth0 = found["interfaces"][1]
    assert eth0["addresses"][0].startswith(f"{address}/") and eth0["peer"]["name"] == f"tare{pod[:11]}"
    assert eth0["peer"]["bridge"] == USUAL
    assert {"destination": "0.0.0.0/0", "interface": "eth0"}.items() <= found["routes"][0].items()
    assert found["ports"] == [
        {"protocol": "tcp", "hostIP": "0.0.0.0", "hostPort": 18931, "podIP": address, "containerPort": 80}
    ]
    assert found["rules"]["table"] == f"inet tare-{USUAL}" and found["rules"]["count"] > 10
    assert (found["rates"], found["troubles"]) == ({"ingress": 10_000_000, "egress": 20_000_000}, [])
    on_node = node.run_pod(node.pod_config("own", network=pb.NODE))
    assert inspected(node, on_node) == {"ips": [], "mode": "node"}
    node.stop_pod(pod)
    assert inspected(node, pod)["mode"] == "none"


def test_pods_are_checked_on_demand(node: Node) -> None:
    whole, broken = node.run_pod("whole"), node.run_pod("broken")
    result = tare(node, "network", "check")
    assert result.returncode == 0 and result.stdout.count(" ok") == 2
    subprocess.run(["ip", "link", "set", f"tare{broken[:11]}", "down"], check=True, timeout=10)
    result = tare(node, "network", "check", "-o", "json")
    assert result.returncode == 1
    assert {item["pod"]: item["troubles"] for item in json.loads(result.stdout)} == {
        whole: [],
        broken: [f"link tare{broken[:11]} is down"],
    }
    assert tare(node, "network", "check", "whole").returncode == 0
    node.stop_pod(broken)
    assert "it has none of its own" in tare(node, "network", "check", "broken").stderr
