"""Terminals: the master handed to whoever listens at --console-socket, or relayed to this command's own terminal (`run -t` in the foreground)."""

from __future__ import annotations

import os

from tare.errors import InvalidArgument
from tare.oci import handover

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CHUNK = 65536


def check(process: Any, console: str, *, detached: bool) -> None:
    """A terminal that somebody has to take, and a socket that there is a terminal for. Raises InvalidArgument."""
    doing = "make a terminal"
    if process.get("terminal") and detached and not console:
        raise InvalidArgument(
            doing, cause="process.terminal is set, and nobody takes its master: --console-socket is missing"
        )
    if console and not process.get("terminal"):
        raise InvalidArgument(doing, cause="--console-socket is given, and process.terminal is not set")
    if console and not detached:
        raise InvalidArgument(doing, cause="--console-socket is for create, --detach and exec --detach")


def send(path: str, master: int) -> None:
    """Hand the master to the listener at a unix socket. Raises FailedPrecondition."""
    try:
        handover.send(path, handover.TERMINAL, master)
    finally:
        os.close(master)


def take_size(master: int) -> None:
    """Give it the size of this command's terminal, if that is one: before there is a program that may ask."""
    import fcntl
    import termios

    if os.isatty(0):
        fcntl.ioctl(master, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8))


class Relay:
    """Bytes between this command's standard streams and a terminal's master, while the program runs.

    Where standard input is a terminal it is raw meanwhile, and its size is the container's.
    """

    def __init__(self, master: int) -> None:
        import fcntl
        import termios
        import tty

        self.master = master
        self.before: list[Any] | None = None
        self._resize: Callable[[], object] = lambda: fcntl.ioctl(
            master, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8)
        )
        self._restore: Callable[[], object] = lambda: termios.tcsetattr(0, termios.TCSANOW, self.before or [])
        if os.isatty(0):
            self.before = termios.tcgetattr(0)
            tty.setraw(0, termios.TCSADRAIN)  # what was typed ahead is kept
            self.resize()

    def resize(self) -> None:
        """The container's terminal has the size of this command's."""
        if self.before is not None:
            self._resize()

    def run(self, pidfd: int) -> None:
        """Until the process has ended and what it wrote is read."""
        import select

        poll = select.poll()
        poll.register(self.master, select.POLLIN)
        poll.register(0, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        ended = False
        while True:
            ready = dict(poll.poll(0 if ended else None))
            if self.master in ready and not self.output():
                return
            if ended and self.master not in ready:
                return
            if 0 in ready:
                data = os.read(0, CHUNK)
                if not data:
                    poll.unregister(0)
                write_all(self.master, data or b"\x04")
            if pidfd in ready and not ended:
                ended = True
                poll.unregister(pidfd)

    def output(self) -> bool:
        """Pass on what the container wrote; False at the end."""
        try:
            data = os.read(self.master, CHUNK)
        except OSError:
            return False  # EIO: nobody has the terminal open any more
        write_all(1, data)
        return bool(data)

    def close(self) -> None:
        """This command's terminal as it was."""
        if self.before is not None:
            self._restore()
        os.close(self.master)


def write_all(fd: int, data: bytes) -> None:
    """Write all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
