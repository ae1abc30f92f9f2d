"""Copies of some of the keeper's descriptors in the service manager (systemd's file descriptor store), which outlives all of ours.

Only what is lost with its last descriptor and what nobody can open again: masters of terminals, inputs that are held open, and the
loggers' private pipes. Whoever starts the daemon next hands them to it, and it to the keeper that it starts.
"""

from __future__ import annotations

from tare.launch import notify

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PREFIXES = (b"tty/", b"logger/")
INPUT = b"/stdin"


class Mirror:
    """What the manager that listens at `address` (b"": there is none) is to have of `store`."""

    def __init__(self, store: Mapping[bytes, Sequence[int]]) -> None:
        self.store = store
        self.address = b""
        self.behind: dict[bytes, None] = {}  # keys of which it has not been told, in order

    def follow(self, address: bytes, *, everything: bool) -> None:
        """From now on; the manager has nothing yet where it is to be told everything."""
        self.address = address
        self.behind.clear()
        if address and everything:
            self.behind |= dict.fromkeys(key for key in self.store if kept(key))

    def changed(self, key: bytes) -> None:
        """Something else is kept under a key, or nothing."""
        if self.address and kept(key):
            self.behind[key] = None

    def catch_up(self) -> bool:
        """Tell what has not been told; False where the manager does not take it now."""
        while self.behind:
            key = next(iter(self.behind))
            fds = self.store.get(key, ())
            said = notify.send(self.address, b"FDSTOREREMOVE=1\nFDNAME=%b" % key)
            if said and fds:
                said = notify.send(self.address, b"FDSTORE=1\nFDPOLL=0\nFDNAME=%b" % key, fds)
            if not said:
                return False
            del self.behind[key]
        return True


def kept(key: bytes) -> bool:
    """Whether the manager is to have this: it is of use there, and the key can be a name."""
    useful = key.startswith(PREFIXES) or key.endswith(INPUT)
    return useful and len(key) < 256 and all(32 <= byte < 127 and byte != 58 for byte in key)
