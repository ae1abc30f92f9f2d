"""The loop of a process that waits for descriptors and for times, one event after the other."""

from __future__ import annotations

import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Loop:
    """What to do when a descriptor can be read from, and what to do later."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.actions: dict[int, Callable[[], object]] = {}
        self.chores: list[tuple[float, Callable[[], object]]] = []  # (when, what)
        self.ending = False

    def watch(self, fd: int, action: Callable[[], object]) -> None:
        """Do this whenever the descriptor can be read from."""
        self.epoll.register(fd, select.EPOLLIN)
        self.actions[fd] = action

    def unwatch(self, fd: int) -> None:
        """No more; to be called before the descriptor is closed."""
        self.epoll.unregister(fd)
        del self.actions[fd]

    def later(self, seconds: float, chore: Callable[[], object]) -> None:
        """Do this once, not before so many seconds have gone by."""
        self.chores.append((time.monotonic() + seconds, chore))

    def run(self) -> None:
        """Until `ending`. One event at a time: of several, one may speak of a descriptor that the one before it has closed."""
        while not self.ending:
            for fd, _ in self.epoll.poll(self.patience(), 1):
                self.actions[fd]()
            if self.chores:
                self.do_chores()

    def patience(self) -> float | None:
        """Seconds until the next chore."""
        if not self.chores:
            return None
        return max(0.0, min(when for when, _ in self.chores) - time.monotonic())

    def do_chores(self) -> None:
        """What is due."""
        now = time.monotonic()
        due = [chore for when, chore in self.chores if when <= now]
        self.chores = [(when, chore) for when, chore in self.chores if when > now]
        for chore in due:
            chore()
