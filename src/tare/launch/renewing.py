"""Another version of the launcher in its place: when it may come, what it gets, and how it goes on (`succession` has the rest).

A child on its way to exec shares memory and a conversation with the launcher that made it. So the new version waits, for some seconds, for a
moment without one: at the start of a daemon, when this happens, there are none but those of calls that ended with the daemon before it.
"""

from __future__ import annotations

import os
import socket
import time

from tare.launch import image, linux, succession, wire
from tare.launch.children import Child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tare.launch.launcher import Launcher
    from tare.launch.succession import State, Successor

LOOK = 0.01  # seconds between two looks whether there is such a moment
QUIET_PATIENCE = 10.0  # seconds for it to come
EBUSY = 16


class Renewing:
    """At most one successor at a time."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.successor: Successor | None = None
        self.renewed = False  # the launcher is one itself

    def hello(self, connection: socket.socket, request: int, fields: list[wire.Field], fds: list[int]) -> None:
        """Say which version this is."""
        said = (wire.VERSION, 0, os.getpid(), self.launcher.identity, wire.OLDEST)
        self.launcher.send(connection, wire.OK, request, said)

    def end(self) -> None:
        """Of a renewal: the loggers are of this version too, and whoever ended meanwhile is reaped."""
        if self.renewed:
            self.launcher.loggers.renew()
            self.launcher.strays.look_soon()

    def begin(self, connection: socket.socket, request: int, fields: list[wire.Field], fds: list[int]) -> None:
        """Have another version tried; the answer comes when it is in place, or has been found to be no use."""
        if self.successor is not None:
            raise OSError(EBUSY, "another version is being tried")
        successor = succession.Successor(connection, request, fields, fds)
        try:
            successor.attempt(self.launcher.run, self.state(successor))
        except OSError as error:
            self.stay(successor, error.errno or 0, os.fsencode(str(error)))
            return
        self.successor = successor
        self.launcher.pids[successor.pid] = None
        self.launcher.loop.watch(successor.pidfd, lambda: self.tried(successor))
        self.launcher.loop.later(succession.PATIENCE, lambda: self.give_up(successor))

    def give_up(self, successor: Successor) -> None:
        """A trial that takes too long."""
        if self.successor is successor and successor.pidfd >= 0:
            successor.expired()

    def tried(self, successor: Successor) -> None:
        """The trial has ended."""
        self.launcher.loop.unwatch(successor.pidfd)
        info = os.waitid(os.P_PIDFD, successor.pidfd, os.WEXITED)
        del self.launcher.pids[successor.pid]
        os.close(successor.pidfd)
        successor.pidfd = -1
        if info is None or info.si_code != os.CLD_EXITED or info.si_status:
            self.stay(successor, 0, successor.words())
            return
        successor.until = time.monotonic() + QUIET_PATIENCE
        self.when_quiet(successor)

    def when_quiet(self, successor: Successor) -> None:
        """Be the other version as soon as no child is on its way."""
        busy = [child for child in self.launcher.pids.values() if child is not None and not child.settled()]
        if not busy and not self.launcher.helpers:
            try:
                successor.become(self.launcher.run, self.state(successor))
            except OSError as error:
                self.stay(successor, error.errno or 0, os.fsencode(str(error)))
        elif time.monotonic() < successor.until:
            self.launcher.loop.later(LOOK, lambda: self.when_quiet(successor))
        else:
            pids = b", ".join(b"%d" % child.pid for child in (*busy, *self.launcher.helpers.values()))
            self.stay(successor, EBUSY, b"processes that are being made do not come to an end: " + pids)

    def stay(self, successor: Successor, number: int, words: bytes) -> None:
        """This version goes on."""
        self.successor = None
        successor.close()
        if successor.connection.fileno() >= 0:
            self.launcher.refuse(successor.connection, successor.request, b"try the other version", number, words)

    def state(self, successor: Successor) -> State:
        """All that the next version is to go on with."""
        launcher = self.launcher
        asking = successor.connection if successor.connection.fileno() >= 0 else None
        children = [child for child in launcher.pids.values() if child is not None and child.settled()]
        listener = launcher.listener.fileno()
        return succession.state_of(
            "launcher",
            asking,
            successor.request,
            [listener, *launcher.connections, *(child.pidfd for child in children)],
            listener=listener,
            connections=list(launcher.connections),
            children=[entry(child) for child in children],
            loggers=list(launcher.loggers.pids),
        )


def entry(child: Child) -> tuple[int, bytes, int, int, int, bool, float]:
    """A child as the state has it."""
    return child.kind, child.name, child.pid, child.pidfd, child.start, child.marked, child.kill_at


def resume(run: str, identity: bytes, state: State) -> Launcher:
    """The launcher that another version has been so far, with its connections, children and loggers."""
    from tare.launch.launcher import Launcher

    linux.set_name(b"tare-launcher")
    launcher = Launcher(run, socket.socket(fileno=state["listener"]), identity)
    launcher.renewing.renewed = True
    launcher.loggers.check()
    launcher.loggers.pids.update(state["loggers"])
    for fd in state["connections"]:
        launcher.welcome(socket.socket(fileno=fd))
    for kind, name, pid, pidfd, start, marked, kill_at in state["children"]:
        go_on(launcher, Child.running(kind, name, pid, pidfd, start, marked=marked, kill_at=kill_at))
    image.prepare()
    return launcher


def go_on(launcher: Launcher, child: Child) -> None:
    """Watch a child that another version has made."""
    launcher.named[child.name] = launcher.pids[child.pid] = child
    launcher.loop.watch(child.pidfd, lambda: launcher.ended(child))
    if child.kill_at:
        launcher.loop.later(child.kill_at - time.monotonic(), child.kill)
