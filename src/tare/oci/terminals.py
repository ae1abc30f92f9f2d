"""Terminals: the master handed to whoever listens at --console-socket, or relayed to this command's own terminal (`run -t` in the foreground)."""

from __future__ import annotations

import os

from tare.errors import InvalidArgument
from tare.oci import handover, logs

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

CHUNK = 65536
END_OF_INPUT = b"\x04"


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
        self.pending = b""  # for the container, once its terminal has room
        self.heard = True  # whether anybody still reads this command's output
        self.before: list[Any] | None = None
        self.gone = (OSError, termios.error)  # what calls on a terminal that hung up raise
        self._resize: Callable[[], object] = lambda: fcntl.ioctl(
            master, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, b"\0" * 8)
        )
        self._restore: Callable[[], object] = lambda: termios.tcsetattr(0, termios.TCSANOW, self.before or [])
        os.set_blocking(master, False)
        if os.isatty(0):
            self.before = termios.tcgetattr(0)
            tty.setraw(0, termios.TCSADRAIN)  # what was typed ahead is kept
            self.resize()

    def resize(self) -> None:
        """The container's terminal has the size of this command's."""
        if self.before is not None:
            try:
                self._resize()
            except self.gone:
                return

    def run(self, pidfd: int) -> None:
        """Until the process has ended and what it wrote is read.

        The container may write without reading, so that nothing here waits for it to read: input is taken only when none is pending.
        """
        import select

        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        source, ended = True, False
        while True:
            poll.register(self.master, select.POLLIN | (select.POLLOUT if self.pending and not ended else 0))
            if source and not self.pending and not ended:
                poll.register(0, select.POLLIN)
            ready = dict(poll.poll(0 if ended else None))
            readable = ready.get(self.master, 0) & ~select.POLLOUT
            if readable and not self.output():
                return
            if ended and not readable:
                return
            if 0 in ready:
                source = self.input()
                poll.unregister(0)
            if ready.get(self.master, 0) & select.POLLOUT:
                self.deliver()
            if pidfd in ready and not ended:
                ended = True
                poll.unregister(pidfd)

    def input(self) -> bool:
        """Take what this command is given, for the container; False at the end, which for a terminal is a character."""
        try:
            data = os.read(0, CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            data = b""  # EIO: this command's terminal hung up
        self.pending = data or END_OF_INPUT
        return bool(data)

    def deliver(self) -> None:
        """Pass on as much of the input as the container's terminal takes."""
        try:
            self.pending = self.pending[os.write(self.master, self.pending) :]
        except BlockingIOError:
            return
        except OSError:
            self.pending = b""  # EIO: nobody has the terminal open

    def output(self) -> bool:
        """Pass on what the container wrote; False at the end."""
        try:
            data = os.read(self.master, CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False  # EIO: nobody has the terminal open any more
        if self.heard:
            self.heard = say(data)
        return bool(data)

    def close(self) -> None:
        """This command's terminal as it was, if it is there."""
        if self.before is not None:
            try:
                self._restore()
            except self.gone as error:
                logs.debug(f"restore the terminal: {error}")
        os.close(self.master)


def say(data: bytes) -> bool:
    """Write all of it to standard output; False where nobody reads that any more (EPIPE, or EIO of a terminal that hung up)."""
    import select

    view = memoryview(data)
    while view:
        try:
            view = view[os.write(1, view) :]
        except BlockingIOError:
            select.select([], [1], [])
        except OSError:
            return False
    return True
