"""The node's devices that a container gets: looked at here, described in `spec`, made by the launcher.

Paths of the node are touched, if only by stat: call this in a thread, and only for devices that a client names or for /dev.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from tare.errors import InvalidArgument
from tare.runtime.records import Device
from tare.runtime.spec_types import DeviceNode

OWN = frozenset({"pts", "ptmx", "shm", "fd", "mqueue", "console", ".udev", ".lxc", ".lxd-mounts"})
"""What a container has its own of, or what is no device of the node's."""


def device_nodes(devices: Sequence[Device]) -> tuple[DeviceNode, ...]:
    """What the request's devices are on this node; a directory stands for all devices in it.

    Raises InvalidArgument for one that is absent or no device, or with permissions other than of "rwm".
    """
    found: dict[str, DeviceNode] = {}
    for device in devices:
        doing = f"give the container device {device.host_path!r}"
        if not device.container_path.startswith("/") or not device.host_path.startswith("/"):
            raise InvalidArgument(doing, cause="a device's paths must be absolute")
        access = device.permissions or "rwm"
        if not set(access) <= set("rwm"):
            raise InvalidArgument(doing, cause=f"permissions {access!r} are not of r, w and m")
        try:
            nodes = list(nodes_at(Path(device.host_path), device.container_path, access))
        except OSError as error:
            raise InvalidArgument(doing, cause=error) from error
        if not nodes:
            raise InvalidArgument(doing, cause="it is neither a device nor a directory with devices")
        found.update((node.path, node) for node in nodes)
    return tuple(found.values())


def host_devices(root: Path = Path("/dev")) -> tuple[DeviceNode, ...]:
    """Every device of the node, at the same path: what a privileged container gets."""
    return tuple(below(root, str(root), "rwm"))


def nodes_at(host: Path, container: str, access: str) -> Iterator[DeviceNode]:
    """The device at a path, links followed, or the devices in the directory there."""
    status = os.stat(host)
    if stat.S_ISDIR(status.st_mode):
        yield from below(host, container, access)
    elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        yield node(status, container, access)


def below(host: Path, container: str, access: str) -> Iterator[DeviceNode]:
    """Devices in a directory and in those below it; links are passed over."""
    with os.scandir(host) as entries:
        for entry in sorted(entries, key=lambda item: item.name):
            path = f"{container.rstrip('/')}/{entry.name}"
            if entry.name in OWN:
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from below(host / entry.name, path, access)
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                # Devices come and go.
                continue
            if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
                yield node(status, path, access)


def node(status: os.stat_result, path: str, access: str) -> DeviceNode:
    """What stat says, as a value."""
    return DeviceNode(
        path=path,
        kind="c" if stat.S_ISCHR(status.st_mode) else "b",
        major=os.major(status.st_rdev),
        minor=os.minor(status.st_rdev),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        access=access,
    )
