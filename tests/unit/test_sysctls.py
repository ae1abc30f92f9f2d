"""What a pod's namespaces get without being asked."""

from __future__ import annotations

import pytest

from tare.runtime.sysctls import of_pod

PORTS, PING = "net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range"


@pytest.mark.parametrize(
    ("wanted", "kinds", "got"),
    [
        ({}, {"net", "uts", "ipc"}, {PORTS: "0", PING: "0 2147483647"}),
        ({}, {"net", "user"}, {PORTS: "0"}),
        ({}, {"ipc"}, {}),
        ({"kernel.shmmax": "1"}, {"net"}, {PORTS: "0", PING: "0 2147483647", "kernel.shmmax": "1"}),
        ({PORTS: "1024"}, {"net"}, {PORTS: "1024", PING: "0 2147483647"}),
        ({PING.replace(".", "/"): "1 0"}, {"net"}, {PORTS: "0", PING.replace(".", "/"): "1 0"}),
    ],
)
def test_low_ports_and_ping(wanted: dict[str, str], kinds: set[str], got: dict[str, str]) -> None:
    assert of_pod(wanted, kinds) == got
