"""The reaping of the launcher's children that nobody has named to it.

Whatever the launcher has made can make further children of the launcher's (clone(2) with CLONE_PARENT), and an intermediate
process that is killed may not have said whom it made. They end like others; but PID 1 of a PID namespace does not end before every
process in there is reaped, so a container of which one is left unreaped could not be ended.

Looked for after a SIGCHLD, one look for many of them: this costs nothing while nothing ends.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence

PAUSE = 0.05  # seconds from a child's end to the look: those that are known are reaped by then
MOST = 1000  # that one look reaps


class Strays:
    """`later(seconds, function)` is the launcher's loop; whose PID is in one of `known` is reaped by others; `making()` says whether a child
    may have been made that is still to be named."""

    def __init__(
        self,
        later: Callable[[float, Callable[[], object]], None],
        known: Sequence[Container[int]],
        making: Callable[[], bool],
    ) -> None:
        self.later = later
        self.known = known
        self.making = making
        self.coming = False  # a look is

    def look_soon(self) -> None:
        """A child has ended."""
        if not self.coming:
            self.coming = True
            self.later(PAUSE, self.look)

    def look(self) -> None:
        """Reap those that have ended. The kernel shows only the first zombie: behind one that is known the look is put off."""
        self.coming = False
        for _ in range(MOST):
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            if self.making() or any(info.si_pid in pids for pids in self.known):
                break
            os.waitid(os.P_PID, info.si_pid, os.WEXITED)
        self.look_soon()
