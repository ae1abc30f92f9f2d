"""What a pod asks of its network, through the gRPC socket of a real daemon: host ports, rates, and the settings that every pod gets."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root
SERVE = "while true; do echo {} | nc -l -p 8000; done"


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("ports") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


def free_port() -> int:
    """A TCP port that nobody has."""
    with closing(socket.create_server(("0.0.0.0", 0))) as probe:
        return int(probe.getsockname()[1])


def said(address: str, port: int) -> str:
    """What a server says to whoever connects; it may just be starting, or between two clients."""
    deadline = time.monotonic() + 10
    while True:
        try:
            with socket.create_connection((address, port), timeout=5) as client:
                if words := client.recv(100):
                    return words.decode().strip()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)


def published(node: Node, name: str, port: int, host_ip: str = "") -> str:
    """A pod whose container says its name at the port."""
    mapping = pb.PortMapping(protocol=pb.TCP, container_port=8000, host_port=port, host_ip=host_ip)
    pod = node.run_pod(node.pod_config(name, port_mappings=[mapping]))
    node.start(node.create(pod, "main", "sh", "-c", SERVE.format(name)))
    return pod


def gateway(node: Node) -> str:
    """The address of the node on the pods' side."""
    pod = node.run_pod("probe")
    address = node.pod_status(pod).network.ip
    node.stop_pod(pod)
    node.remove_pod(pod)
    show = subprocess.run(["ip", "-o", "route", "get", address], capture_output=True, text=True, check=True, timeout=10)
    return show.stdout.partition(" src ")[2].split()[0]


def test_a_port_is_had_by_one_pod_lives_through_a_crash_and_goes_with_it(node: Node) -> None:
    port, address = free_port(), gateway(node)
    first = published(node, "first", port)
    assert {said(address, port), said("127.0.0.1", port)} == {"first"}
    node.refused("FAILED_PRECONDITION", f"pod tests/first ({first}) has it", published, node, "second", port)
    node.daemon.kill()
    assert said("127.0.0.1", port) == "first"
    node.daemon.start()
    assert said(address, port) == "first"
    node.refused("FAILED_PRECONDITION", f"pod tests/first ({first}) has it", published, node, "second", port, address)
    node.stop_pod(first)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((address, port), timeout=5)
    published(node, "second", port)
    assert said(address, port) == "second"


def test_a_port_of_a_process_of_the_nodes_is_refused_and_one_on_the_nodes_network_is_its_own(node: Node) -> None:
    with closing(socket.create_server(("0.0.0.0", 0))) as server:
        port = int(server.getsockname()[1])
        node.refused("FAILED_PRECONDITION", "a process of the node has it", published, node, "thief", port)
        mapping = pb.PortMapping(protocol=pb.TCP, container_port=port, host_port=port)
        node.run_pod(node.pod_config("own", network=pb.NODE, port_mappings=[mapping]))


def test_what_makes_no_sense_is_refused_before_anything_is_made(node: Node) -> None:
    node.refused("INVALID_ARGUMENT", "routes nothing between ::1 and a pod", published, node, "six", free_port(), "::1")
    slow = {"kubernetes.io/ingress-bandwidth": "10 bits"}
    node.refused("INVALID_ARGUMENT", "ingress-bandwidth", node.run_pod, node.pod_config("slow", annotations=slow))


def test_rates_are_in_force_on_the_nodes_side_of_the_pod(node: Node) -> None:
    rates = {"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "20M"}
    pod = node.run_pod(node.pod_config("slow", annotations=rates))
    for link, rate in ((f"tare{pod[:11]}", "10Mbit"), (f"tarb{pod[:11]}", "20Mbit")):
        command = ["tc", "qdisc", "show", "dev", link]
        show = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        assert "tbf" in show.stdout and f"rate {rate}" in show.stdout


def test_every_pod_may_use_low_ports_and_ping_unless_it_says_otherwise(node: Node) -> None:
    keys = "cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start ping_group_range"
    sysctls = {"net.ipv4.ip_unprivileged_port_start": "1000", "net/ipv4/ping_group_range": "5 7"}
    told = node.pod_config("told")
    told.linux.sysctls.update(sysctls)
    outs = []
    for config in (node.pod_config("plain"), told):
        container = node.start(node.create(node.run_pod(config), "main", "sleep", "1000"))
        outs.append(node.exec(container, "sh", "-c", keys).stdout.decode().split())
    assert outs == [["0", "0", "2147483647"], ["1000", "5", "7"]]


def test_a_full_name_is_the_hosts_and_the_short_one_leads_to_it(node: Node) -> None:
    pod = node.run_pod(node.pod_config("full", hostname="web-0.shop.example"))
    container = node.start(node.create(pod, "main", "sleep", "1000"))
    out = node.exec(container, "sh", "-c", "hostname; cat /etc/hosts").stdout.decode()
    assert out.startswith("web-0.shop.example\n")
    assert f"{node.pod_status(pod).network.ip}\tweb-0.shop.example web-0\n" in out
