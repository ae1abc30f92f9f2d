"""What the steps of one child share."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket


class Machine:
    """Numbered slots of descriptors, the rootfs's descriptor, what was carried on from, and the way to the launcher."""

    def __init__(self, status: socket.socket) -> None:
        self.status = status
        self.slots: dict[int, int] = {}
        self.root = -1
        self.proc = -1  # the device number of the container's /proc, once it is mounted
        self.warnings: list[bytes] = []
        self.program: object = None
