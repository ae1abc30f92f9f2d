"""A pod's traffic is held to its annotations, measured with a real connection each way."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tare.config import NetworkConfig
from tare.errors import FailedPrecondition
from tare.network import inspection, shaping
from tare.network.attach import EmbeddedNetwork
from tare.network.netlink import NetlinkError
from tare.network.wishes import Wishes
from tare.state.database import Database
from tests.support.netns import TIMEOUT, Namespace, ip, on_its_own_node, sh

pytestmark = pytest.mark.root
A, B, C = ("a" * 64, "b" * 64, "c" * 64)
WARM_UP, MEASURED = 0.3, 1.0  # seconds
ATTEMPTS = (
    5  # a machine that has no time for the test loses what a bucket may let through, and gets what was queued at once
)


def pushed(sender: socket.socket, receiver: socket.socket) -> float:
    """Bits a second that arrive, once the first burst is over."""
    done = threading.Event()

    def push() -> None:
        with contextlib.suppress(OSError):
            while not done.is_set():
                sender.send(bytes(65536))

    thread = threading.Thread(target=push)
    thread.start()
    try:
        end = time.monotonic() + WARM_UP
        while time.monotonic() < end:
            receiver.recv(1 << 20)
        start, count = time.monotonic(), 0
        while time.monotonic() < start + MEASURED:
            count += len(receiver.recv(1 << 20))
        return count * 8 / (time.monotonic() - start)
    finally:
        done.set()
        receiver.close()
        sender.close()
        thread.join()


def measured(pod: Namespace, address: str, rate: int, *, from_pod: bool) -> list[float]:
    """What was measured, the last of it within a tenth of the rate, if that came to be."""
    found: list[float] = []
    while len(found) < ATTEMPTS and (not found or found[-1] != pytest.approx(rate, rel=0.1)):
        inside, outside = connected(pod, address)
        found.append(pushed(inside, outside) if from_pod else pushed(outside, inside))
    return found


def connected(pod: Namespace, address: str) -> tuple[socket.socket, socket.socket]:
    """The pod's end of a connection, and the node's."""
    with pod.run(lambda: socket.create_server((address, 80))) as server:
        ours = socket.create_connection((address, 80), timeout=TIMEOUT)
        theirs = server.accept()[0]
    theirs.settimeout(TIMEOUT)
    return theirs, ours


@pytest.fixture
def network(tmp_path: Path) -> EmbeddedNetwork:
    """A network that is not set up yet."""
    config = NetworkConfig(bridge="br-test", subnet="10.99.0.0/24")
    return EmbeddedNetwork(Database(tmp_path / "state.db"), config, tmp_path / "run")


def attach(network: EmbeddedNetwork, pod_id: str, pod: Namespace, wishes: Wishes) -> str:
    """The pod's address."""
    return asyncio.run(network.attach(pod_id, pod.fd, pod.netlink, wishes)).ips[0]


def rates(network: EmbeddedNetwork, pod_id: str) -> tuple[int | None, int | None]:
    """Those that the kernel holds the pod to: what comes to it, and what it sends."""
    found = asyncio.run(inspection.path(network, pod_id, ""))["rates"]
    return found["ingress"], found["egress"]


@on_its_own_node
def test_both_directions_are_held_within_a_tenth_of_their_rates_whatever_the_pod_does(network: EmbeddedNetwork) -> None:
    """All that CAP_NET_ADMIN can change in the pod's namespace is changed there."""
    asyncio.run(network.setup())
    with Namespace() as pod:
        address = attach(network, A, pod, Wishes(ingress=40_000_000, egress=24_000_000))
        assert rates(network, A) == (40_000_000, 24_000_000)
        for queue in ("root noqueue", "root pfifo limit 1000", "clsact"):
            pod.sh(f"tc qdisc replace dev eth0 {queue}")
        for rate, from_pod in ((40_000_000, False), (24_000_000, True)):
            found = measured(pod, address, rate, from_pod=from_pod)
            assert found[-1] == pytest.approx(rate, rel=0.1), found
        asyncio.run(network.detach(A))
    asyncio.run(network.teardown())


@on_its_own_node
def test_what_holds_a_pod_goes_with_it_and_other_pods_have_nothing_of_it(network: EmbeddedNetwork) -> None:
    asyncio.run(network.setup())
    with Namespace() as fast, Namespace() as free, Namespace() as lost:
        attach(network, A, fast, Wishes(egress=100_000_000_000))
        attach(network, B, free, Wishes())
        attach(network, C, lost, Wishes(egress=1_000_000))
        assert rates(network, A) == (None, 100_000_000_000), "more than 32 bits have room for"
        assert rates(network, B) == (None, None)
        assert [link["ifname"] for link in ip("link show type ifb")] == ["tarb" + "a" * 11, "tarb" + "c" * 11]
        asyncio.run(network.detach(A))
        asyncio.run(network.recover({B}))
        asyncio.run(network.settle())
        assert [link["ifname"] for link in ip("link show") if link["ifname"] != "lo"] == ["br-test", "tare" + "b" * 11]
    asyncio.run(network.teardown())


@on_its_own_node
def test_a_device_of_someone_else_by_that_name_is_left_alone_and_nothing_is_left(network: EmbeddedNetwork) -> None:
    asyncio.run(network.setup())
    sh("ip link add tarbaaaaaaaaaaa type ifb")
    with Namespace() as pod:
        with pytest.raises(FailedPrecondition, match=f"limit the traffic of pod {A}: a link tarbaaaaaaaaaaa exists"):
            attach(network, A, pod, Wishes(egress=1_000_000))
        asyncio.run(network.settle())
        assert [link["ifname"] for link in ip("link show")] == ["lo", "br-test", "tarbaaaaaaaaaaa"]
        assert network.leases.pods() == set()
    asyncio.run(network.teardown())


@on_its_own_node
def test_a_kernel_that_cannot_hold_a_pod_to_its_rate_says_what_it_needs(
    network: EmbeddedNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(network.setup())
    made = shaping.add_ifb
    monkeypatch.setattr(
        shaping, "add_ifb", lambda name: replace(made(name), body=made(name).body.replace(b"ifb", b"ifx"))
    )
    with Namespace() as pod:
        with pytest.raises(NetlinkError, match=r"for what the pod sends: .*the kernel needs ifb, sch_tbf, sch_ingress"):
            attach(network, A, pod, Wishes(egress=1_000_000))
        asyncio.run(network.settle())
        assert [link["ifname"] for link in ip("link show")] == ["lo", "br-test"]
    asyncio.run(network.teardown())
