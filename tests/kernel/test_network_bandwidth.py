"""A pod's traffic is held to its annotations, measured with a real connection each way."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest

from tare.config import NetworkConfig
from tare.network.attach import EmbeddedNetwork
from tare.network.wishes import Wishes
from tare.state.database import Database
from tests.support.netns import TIMEOUT, Namespace, ip, on_its_own_node

pytestmark = pytest.mark.root
WARM_UP, MEASURED = 0.3, 1.0  # seconds


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


def connected(pod: Namespace, address: str) -> tuple[socket.socket, socket.socket]:
    """The pod's end of a connection, and the node's."""
    with pod.run(lambda: socket.create_server((address, 80))) as server:
        ours = socket.create_connection((address, 80), timeout=TIMEOUT)
        theirs = server.accept()[0]
    theirs.settimeout(TIMEOUT)
    return theirs, ours


@on_its_own_node
def test_both_directions_are_held_within_a_tenth_of_their_rates(tmp_path: Path) -> None:
    network = EmbeddedNetwork(
        Database(tmp_path / "state.db"), NetworkConfig(bridge="br-test", subnet="10.99.0.0/24"), tmp_path / "run"
    )
    asyncio.run(network.setup())
    with Namespace() as pod:
        wishes = Wishes(ingress=40_000_000, egress=24_000_000)
        (address,) = asyncio.run(network.attach("a" * 64, pod.fd, pod.netlink, wishes)).ips
        inside, outside = connected(pod, address)
        assert pushed(outside, inside) == pytest.approx(40_000_000, rel=0.1)
        inside, outside = connected(pod, address)
        assert pushed(inside, outside) == pytest.approx(24_000_000, rel=0.1)
        asyncio.run(network.detach("a" * 64))
    asyncio.run(network.teardown())


@on_its_own_node
def test_a_rate_that_takes_more_than_32_bits_and_no_rate_at_all(tmp_path: Path) -> None:
    network = EmbeddedNetwork(
        Database(tmp_path / "state.db"), NetworkConfig(bridge="br-test", subnet="10.99.0.0/24"), tmp_path / "run"
    )
    asyncio.run(network.setup())
    with Namespace() as fast, Namespace() as free:
        asyncio.run(network.attach("a" * 64, fast.fd, fast.netlink, Wishes(egress=100_000_000_000)))
        asyncio.run(network.attach("b" * 64, free.fd, free.netlink, Wishes()))
        assert ip("link show dev tareaaaaaaaaaaa")[0]["qdisc"] == ip("link show dev tarebbbbbbbbbbb")[0]["qdisc"]
        assert free.ip("link show dev eth0")[0]["qdisc"] != "tbf"
        assert "rate 100Gbit" in fast.sh("tc qdisc show dev eth0")
    asyncio.run(network.teardown())
