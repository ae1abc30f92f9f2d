"""What the embedded network must refuse, each with its stage and its cure: RunPodSandbox leaves nothing, and goes on working once it is cured."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from tare.cli.client import CallFailed
from tare.cri.v1 import api_pb2 as pb
from tests.support.cni import until
from tests.support.place import PlacedNode, placed_node

pytestmark = pytest.mark.root
BRIDGE = "tarebad0"
SETTINGS = f'[network]\nbridge = "{BRIDGE}"\nsubnet = "10.123.0.0/29"\n'


@pytest.fixture(scope="module")
def shared() -> Iterator[PlacedNode]:
    with placed_node("netbad", SETTINGS) as node:
        yield node


@pytest.fixture
def node(shared: PlacedNode) -> Iterator[PlacedNode]:
    """The node, on which each test must leave nothing."""
    yield shared
    if shared.daemon.settings != SETTINGS:
        shared.restart(SETTINGS)
    shared.remove_all()
    assert shared.settled() == [], shared.daemon.told()


def refused(node: PlacedNode, status: str, *words: str, config: pb.PodSandboxConfig | str = "fails") -> None:
    """A pod is refused with these words, and nothing is left of it."""
    before = node.strays()
    with pytest.raises(CallFailed) as caught:
        node.run_pod(config)
    assert caught.value.status == status, caught.value
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
    until(lambda: node.strays() == before)


def network_ready(node: PlacedNode) -> tuple[bool, str]:
    """NetworkReady, and why not."""
    client = node.daemon.client
    conditions = client.call(client.runtime.Status, pb.StatusRequest()).status.conditions
    found = next(item for item in conditions if item.type == "NetworkReady")
    return found.status, found.message


def test_an_exhausted_range(node: PlacedNode) -> None:
    pods = [node.run_pod(f"pod{number}") for number in range(5)]
    refused(
        node, "RESOURCE_EXHAUSTED", "lease an address to pod", "all 5 addresses of 10.123.0.0/29", "[network] subnet"
    )
    node.stop_pod(pods[2])
    assert node.pod_status(node.run_pod("again")).network.ip == "10.123.0.4"


@pytest.mark.parametrize(
    ("make", "cure", "words"),
    [
        (
            "ip addr add 10.123.0.6/32 dev lo",
            "ip addr del 10.123.0.6/32 dev lo",
            ("use 10.123.0.0/29 for pods", "in use: address 10.123.0.6/32 on lo", "name another: [network] subnet"),
        ),
        (
            "ip route add 10.123.0.0/30 dev lo",
            "ip route del 10.123.0.0/30 dev lo",
            ("use 10.123.0.0/29 for pods", "in use: route 10.123.0.0/30 on lo", "name another: [network] subnet"),
        ),
        (
            f"ip addr add 10.55.0.1/24 dev {BRIDGE}",
            f"ip addr del 10.55.0.1/24 dev {BRIDGE}",
            (f"use {BRIDGE} as the bridge", "something else gave it the address 10.55.0.1/24", "ip address delete"),
        ),
        (
            f"ip link set {BRIDGE} alias someone",
            f"ip link delete {BRIDGE}",
            (f"use {BRIDGE} as the bridge", "something else made it", "name another: [network] bridge, or remove it"),
        ),
        (
            f"ip link delete {BRIDGE}\nip link add {BRIDGE} type veth peer name other",
            f"ip link delete {BRIDGE}",
            (f"use {BRIDGE} as the bridge", "it is not a bridge but veth", "name another: [network] bridge"),
        ),
    ],
    ids=["an address of the node's", "a route of the node's", "an address on the bridge", "a bridge", "a link"],
)
def test_a_node_that_has_something_else_there(node: PlacedNode, make: str, cure: str, words: tuple[str, ...]) -> None:
    """The node is not ready and says so, and is once that is cured, with no restart."""
    node.daemon.stop()
    for command in make.splitlines():
        node.place.sh(command)
    try:
        node.daemon.start()
        ready, message = network_ready(node)
        assert not ready and [word for word in words if word not in message] == [], message
        refused(node, "FAILED_PRECONDITION", *words)
    finally:
        node.place.sh(cure)
    assert network_ready(node) == (True, "")
    node.run_pod("works")


def test_two_pods_that_want_one_port(node: PlacedNode) -> None:
    def config(name: str) -> pb.PodSandboxConfig:
        mapping = pb.PortMapping(protocol=pb.TCP, container_port=80, host_port=12480)
        return node.pod_config(name, port_mappings=[mapping])

    first = node.run_pod(config("first"))
    words = ("publish host port 12480/tcp for pod tests/second", f"pod tests/first ({first}) has it", "another port")
    refused(node, "FAILED_PRECONDITION", *words, config=config("second"))
    node.stop_pod(first)
    node.run_pod(config("second"))


def test_a_network_that_is_not_there(node: PlacedNode) -> None:
    config = node.pod_config("lost", annotations={"network.tare.dev/network": "blue"})
    refused(
        node,
        "INVALID_ARGUMENT",
        "on network blue: at step network: there are only default",
        "[network.networks.blue]",
        config=config,
    )


def hold_up(node: PlacedNode, config: str, meanwhile: Callable[[str], None]) -> CallFailed:
    """Do something to a pod whose namespaces are made and whose network is not; how its making fails."""
    held = node.daemon.run / "held"
    failed: list[CallFailed] = []

    def make() -> None:
        try:
            node.run_pod(config)
        except CallFailed as error:
            failed.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    try:
        until(held.exists)
        (pod,) = (path.name for path in (node.daemon.run / "pods").iterdir())
        meanwhile(pod)
    finally:
        held.unlink(missing_ok=True)
        thread.join()
    return failed[0]


def test_a_namespace_that_something_unmounts_while_the_pod_is_made(node: PlacedNode) -> None:
    node.restart(SETTINGS, {"TARE_FAILPOINTS": "RunPodSandbox.namespaces.after=hold"})
    try:
        error = hold_up(node, "gone", lambda pod: unpin(node, pod))
    finally:
        node.restart(SETTINGS)
    assert error.status == "FAILED_PRECONDITION"
    assert "is no namespace any more" in str(error) and "have the pod made again" in str(error)
    assert node.settled() == []


def test_a_namespace_that_something_unmounts_under_a_pod(node: PlacedNode) -> None:
    """Stop and removal, by this daemon or the next one, which says that the pod is not ready."""
    first, second = node.run_pod("first"), node.run_pod("second")
    for pod in (first, second):
        unpin(node, pod)
    node.stop_pod(first)
    node.remove_pod(first)
    node.daemon.kill()
    node.daemon.start()
    assert node.pod_status(second).state == pb.SANDBOX_NOTREADY
    node.stop_pod(second)
    node.remove_pod(second)
    assert node.settled() == []


def unpin(node: PlacedNode, pod: str) -> None:
    """Take the pin of a pod's network namespace away."""
    node.place.sh(f"umount -l {node.daemon.run}/pods/{pod}/net")


def test_networks_that_cannot_be_side_by_side(node: PlacedNode) -> None:
    """The daemon says which, and does not start."""
    with pytest.raises(RuntimeError, match="did not come up") as caught:
        node.restart(f'{SETTINGS}[network.networks.blue]\nsubnet = "10.123.0.0/24"\n')
    words = "[network.networks.blue] subnet = '10.123.0.0/24': it overlaps subnet 10.123.0.0/29 of [network]"
    assert words in str(caught.value)
