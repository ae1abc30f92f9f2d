"""Steps for namespaces that are the container's own (a domain name, a loopback device that is up), and for a mount namespace that is not."""

from __future__ import annotations

import _socket
import fcntl
import os
import struct

from tare.launch import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tare.launch.machine import Machine

SIOCSIFFLAGS = 0x8914
IFF_UP, IFF_RUNNING = 0x1, 0x40
IFREQ = struct.Struct("16sh22x")


def domainname(machine: Machine, name: bytes) -> None:
    """The NIS domain name of this UTS namespace."""
    linux.setdomainname(name)


def loopback(machine: Machine) -> None:
    """The kernel gives it its addresses when it comes up."""
    asking = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
    fcntl.ioctl(asking.fileno(), SIOCSIFFLAGS, IFREQ.pack(b"lo", IFF_UP | IFF_RUNNING))
    asking.close()


def root_within(machine: Machine, path: bytes) -> None:
    """In a mount namespace that was joined, a directory of it as the root: nothing is mounted there."""
    machine.root = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def change_root(machine: Machine) -> None:
    """The root is exchanged for this process alone."""
    os.fchdir(machine.root)
    os.chroot(b".")
    os.chdir(b"/")


OPERATIONS: dict[str, Callable[..., None]] = {
    "domainname": domainname,
    "loopback": loopback,
    "root_within": root_within,
    "change_root": change_root,
}
