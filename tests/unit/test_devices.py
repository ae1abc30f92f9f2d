"""Looking at the node's devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from tare.errors import InvalidArgument
from tare.runtime.devices import device_nodes, host_devices
from tare.runtime.records import Device


def test_a_device_by_its_path_and_by_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    for host in ("/dev/null", str(tmp_path / "link")):
        (node,) = device_nodes((Device(container_path="/dev/x", host_path=host, permissions="r"),))
        assert (node.path, node.kind, node.major, node.minor, node.access) == ("/dev/x", "c", 1, 3, "r")


def test_all_devices_of_the_node() -> None:
    paths = {node.path for node in host_devices()}
    assert {"/dev/null", "/dev/zero"} <= paths
    assert not any(path.startswith(("/dev/pts/", "/dev/shm/")) for path in paths)
    assert paths == {node.path for node in device_nodes((Device(container_path="/dev", host_path="/dev"),))}


@pytest.mark.parametrize(
    ("device", "word"),
    [
        (Device(container_path="/dev/x", host_path="/dev/no-such-device"), "No such file"),
        (Device(container_path="/dev/x", host_path="/etc/passwd"), "neither a device nor"),
        (Device(container_path="/dev/x", host_path="/proc/self/fdinfo"), "neither a device nor"),
        (Device(container_path="dev/x", host_path="/dev/null"), "must be absolute"),
        (Device(container_path="/dev/x", host_path="null"), "must be absolute"),
        (Device(container_path="/dev/x", host_path="/dev/null", permissions="rx"), "are not of r, w and m"),
    ],
)
def test_what_is_refused(device: Device, word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        device_nodes((device,))
