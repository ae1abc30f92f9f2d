"""Callers that leave before they are answered: the call goes on, is joined, collected also from the next daemon, or claimed by use.

A failpoint holds the call at one step, so that its caller leaves while it is certainly under way.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root
WAIT_SECONDS = 20.0


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    with busy_node("join") as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """The node, with no daemon yet: a test starts one that holds where it wants."""
    shared.daemon.kill()
    yield shared
    shared.daemon.kill()
    shared.daemon.start()
    shared.remove_all()
    assert shared.settled() == []


def start_holding(node: Node, point: str) -> None:
    node.daemon.start({"TARE_FAILPOINTS": f"{point}=hold"})


def await_hold(node: Node, held: bool) -> None:
    """Until the call has come to where it is held, or has gone on."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (node.daemon.run / "held").exists() is not held:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def leave(node: Node, call: grpc.Future) -> None:
    """The caller leaves a call that is held, which then goes on."""
    await_hold(node, True)
    call.cancel()
    # The daemon has handled the cancelling when it has answered what was sent after it.
    node.daemon.client.pods()
    (node.daemon.run / "held").unlink()


def run_pod_request(config: pb.PodSandboxConfig) -> pb.RunPodSandboxRequest:
    return pb.RunPodSandboxRequest(config=config)


def unclaimed_pod(node: Node, config: pb.PodSandboxConfig) -> str:
    """A pod that was made for a caller that had left."""
    start_holding(node, "RunPodSandbox.files.before")
    leave(node, node.daemon.client.runtime.RunPodSandbox.future(run_pod_request(config)))
    deadline = time.monotonic() + WAIT_SECONDS
    while not (pods := node.daemon.client.pods()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return str(pods[0].id)


def test_a_retry_collects_what_was_made(node: Node) -> None:
    config = node.pod_config("leaver")
    pod = unclaimed_pod(node, config)
    other = node.pod_config("leaver", hostname="another")
    node.refused("ALREADY_EXISTS", pod, node.run_pod, other)
    assert node.run_pod(config) == pod
    node.refused("ALREADY_EXISTS", pod, node.run_pod, config)


def test_a_retry_joins_what_is_under_way(node: Node) -> None:
    config = node.pod_config("joiner")
    start_holding(node, "RunPodSandbox.files.before")
    first = node.daemon.client.runtime.RunPodSandbox.future(run_pod_request(config))
    await_hold(node, True)
    node.refused("ALREADY_EXISTS", "another configuration", node.run_pod, node.pod_config("joiner", hostname="x"))
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(node.run_pod, config)
        first.cancel()
        node.daemon.client.pods()
        (node.daemon.run / "held").unlink()
        pod = second.result(timeout=WAIT_SECONDS)
    assert [item.id for item in node.daemon.client.pods()] == [pod]


def test_the_next_daemon_hands_over_what_was_made(node: Node) -> None:
    config = node.pod_config("offer")
    pod = unclaimed_pod(node, config)
    node.daemon.kill()
    node.daemon.start()
    assert node.run_pod(config) == pod
    node.refused("ALREADY_EXISTS", pod, node.run_pod, config)


def test_a_container_is_collected_too_and_using_a_pod_claims_it(node: Node) -> None:
    config = node.pod_config("user")
    pod = unclaimed_pod(node, config)
    container = node.create(pod, "main", "true")
    node.refused("ALREADY_EXISTS", pod, node.run_pod, config)
    node.daemon.kill()
    start_holding(node, "CreateContainer.snapshot.after")
    wanted = node.container_config("late", "true")
    request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=wanted, sandbox_config=config)
    leave(node, node.daemon.client.runtime.CreateContainer.future(request))
    deadline = time.monotonic() + WAIT_SECONDS
    while len(found := {item.id for item in node.daemon.client.containers()}) < 2:
        assert time.monotonic() < deadline
    assert {container, node.create(pod, wanted)} == found


def test_a_stop_waits_for_a_start_under_way(node: Node) -> None:
    node.daemon.start()
    pod = node.run_pod("race")
    container = node.create(pod, "main", "sleep", "1000")
    node.daemon.kill()
    start_holding(node, "StartContainer.process.before")
    with ThreadPoolExecutor(2) as pool:
        starting = pool.submit(node.start, container)
        await_hold(node, True)
        stopping = pool.submit(node.stop_pod, pod)
        assert node.pod_status(pod).state == pb.SANDBOX_READY
        (node.daemon.run / "held").unlink()
        assert starting.result(timeout=WAIT_SECONDS) == container
        stopping.result(timeout=WAIT_SECONDS)
    assert node.status(container).exit_code == 137
    assert node.pod_status(pod).state == pb.SANDBOX_NOTREADY


def test_other_pods_do_not_wait_for_one_that_is_held(node: Node) -> None:
    start_holding(node, "RunPodSandbox.network.before")
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(node.run_pod, "slow")
        await_hold(node, True)
        quick = node.run_pod("quick")
        assert node.wait(node.start(node.create(quick, "main", "true"))).exit_code == 0
        node.remove_pod(quick)
        (node.daemon.run / "held").unlink()
        assert slow.result(timeout=WAIT_SECONDS)
