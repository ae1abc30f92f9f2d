"""What a kubelet and the node tell each other: the cgroup driver, handlers and features, the range of pods' addresses; deadlines of stops."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, busy_node, cgroups_named

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("nset") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, on which each test must leave nothing."""
    yield shared
    shared.remove_all()
    assert shared.settled() == []


def use_range(node: Node, ranges: str) -> None:
    """UpdateRuntimeConfig."""
    client = node.daemon.client
    network = pb.NetworkConfig(pod_cidr=ranges)
    request = pb.UpdateRuntimeConfigRequest(runtime_config=pb.RuntimeConfig(network_config=network))
    client.call(client.runtime.UpdateRuntimeConfig, request)


def test_the_cgroup_driver_is_told(node: Node) -> None:
    client = node.daemon.client
    answer = client.call(client.runtime.RuntimeConfig, pb.RuntimeConfigRequest())
    container = node.start(node.create(node.run_pod("driver"), "main", "sleep", "1000"))
    [path] = {path.rpartition("/")[2] for path in cgroups_named(container)}
    made_by = {pb.CGROUPFS: container, pb.SYSTEMD: f"tare-{container}.scope"}
    assert path == made_by[answer.linux.cgroup_driver]


def test_the_default_handler_is_listed_under_the_empty_name_too(node: Node) -> None:
    client = node.daemon.client
    answer = client.call(client.runtime.Status, pb.StatusRequest())
    handlers = {handler.name: handler.features for handler in answer.runtime_handlers}
    assert set(handlers) == {"", "builtin"} and handlers[""] == handlers["builtin"]
    assert answer.features.supplemental_groups_policy and answer.features.mount_options
    assert answer.features.user_namespaces_host_network == handlers[""].user_namespaces


def test_new_pods_have_addresses_of_the_range_that_the_cluster_gives() -> None:
    with busy_node("nrange") as node:
        use_range(node, "")  # as a kubelet asks before its node has a range
        node.refused("INVALID_ARGUMENT", "pod_cidr", use_range, node, "10.93.7.0/33")
        use_range(node, "10.93.7.0/24")
        given = ipaddress.ip_network("10.93.7.0/24")
        pod = node.run_pod("first")
        assert ipaddress.ip_address(node.pod_status(pod).network.ip) in given
        # Pods have addresses of it: another range would cut them off.
        node.refused("FAILED_PRECONDITION", "10.93.7.0/24", use_range, node, "10.93.8.0/24")
        use_range(node, "10.93.7.0/24")
        node.daemon.kill()
        node.daemon.start()
        assert ipaddress.ip_address(node.pod_status(node.run_pod("second")).network.ip) in given


@pytest.mark.parametrize("grace", [0, -1, -(1 << 62)])
def test_no_grace_is_a_kill_at_once(node: Node, grace: int) -> None:
    script = "trap 'echo got' TERM; echo ready; while true; do sleep 0.05; done"
    container = node.start(node.create(node.run_pod(f"grace{grace}"), "main", "sh", "-c", script))
    node.wait_for_log(container, "ready")
    began = time.monotonic()
    node.stop(container, grace)
    assert time.monotonic() - began < 20
    assert node.status(container).exit_code == 137
    assert node.log(container) == ["ready"]
