"""Writing ends of containers' stdin FIFOs, held so that a read in a container waits for somebody who attaches, instead of being at its end."""

from __future__ import annotations

import os

from tare.launch import spares

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tare.launch.spares import Spares


class Inputs:
    """Those of one logger's containers, below the run directory `run`, each with a spare in the keeper."""

    def __init__(self, run: str, keeper: Spares) -> None:
        self.run = os.fsencode(run)
        self.keeper = keeper
        self.held: dict[bytes, int] = {}

    def path(self, identity: bytes) -> bytes:
        """The FIFO of a container."""
        return b"%s/containers/%s/stdin" % (self.run, identity)

    def open(self, identity: bytes) -> None:
        """Hold one. Opening a FIFO for writing alone wants a reader: we are one for a moment. Raises OSError."""
        path = self.path(identity)
        both = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(both)
        self.held[identity] = fd
        self.keeper.store(spares.FIFO + identity + b"/stdin", fd)

    def open_again(self, identity: bytes) -> None:
        """Hold it where an earlier logger did; where its FIFO is gone, it was ended for good."""
        if os.path.lexists(self.path(identity)):
            self.open(identity)

    def store(self) -> None:
        """Have another keeper hold spares of all."""
        for identity, fd in self.held.items():
            self.keeper.store(spares.FIFO + identity + b"/stdin", fd)

    def close(self, identity: bytes) -> None:
        """Hold it no more."""
        fd = self.held.pop(identity, -1)
        if fd >= 0:
            os.close(fd)
            self.keeper.drop(spares.FIFO + identity + b"/stdin")

    def end(self, identity: bytes) -> None:
        """No more input, ever: the container reads to the end when the last writer of now is gone, and no logger opens it again."""
        self.close(identity)
        if os.path.lexists(self.path(identity)):
            os.unlink(self.path(identity))
