"""What the steps of one child share."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    import mmap

    from tare.launch import userns

# In byte 4 of the page that a child shares with who waits for it: the filter is being loaded; what follows is execve and nothing else.
LOADING, EXECUTING = 1, 2


class Machine:
    """Numbered slots of descriptors, the rootfs's descriptor, what was carried on from, and the ways to launcher and helper."""

    def __init__(self, status: _socket.socket) -> None:
        self.status = status
        self.slots: dict[int, int] = {}
        self.root = -1
        self.proc = -1  # the device number of the container's /proc, once it is mounted
        self.user = -1  # the slot of the container's user namespace, if it has one, and its maps
        self.uids: userns.Map = ()
        self.gids: userns.Map = ()
        self.stage = -1  # where its mounts are laid ready (`staging`)
        self.outside: _socket.socket | None = None  # the helper in the node's namespaces
        self.outside_pid = 0  # this process's PID there, once the helper has said it
        self.heir = False  # the helper waits for the PID of the process that this one makes
        self.page: mmap.mmap | None = None  # shared with launcher and helper
        self.warnings: list[bytes] = []
        self.program: object = None
