"""The keeper: parent of last resort, and keeper of descriptors that must outlive their users.

It is a child subreaper, so whatever loses its parent comes here and is reaped here; if the process was one of ours (there is
a marker for it under tasks/), its exit is recorded first. It holds descriptors under keys for others (the masters of
terminals, the read ends of log FIFOs, the loggers' private pipes), starts the launcher, and starts it again when it dies.
It reads no file that a pod can name, parses nothing but messages, and does not end while a container lives. Another version of its
code takes its place in the same process (`succession`); what must outlive it too is mirrored in the service manager (`mirror`).

    <run>/keeper.sock      this process            <run>/tasks/PID.START   made before a process may exec
    <run>/launcher.sock    bound here, so that     <run>/exits/PID.START   written here or by the launcher,
                           a restart loses no call                         by whoever reaps, then the marker goes
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import socket
import time

from tare.launch import image, launcher, linux, packets, succession, tasks, wire
from tare.launch.mirror import Mirror

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from tare.launch.succession import State, Successor

RESTART_PAUSE = 0.5  # seconds between two starts of a launcher that dies at once
RETRY = 1.0  # seconds before what failed for want of room is tried again
EBUSY, ENOSYS = 16, 38


class Keeper:
    """One keeper. `run` is the run directory, `identity` that of its code, `lock` the descriptor that makes it the only one."""

    def __init__(self, run: str, identity: bytes, lock: int, listener: socket.socket) -> None:
        self.run = run
        self.identity = identity
        self.lock = lock
        self.store: dict[bytes, list[int]] = {}
        self.mirror = Mirror(self.store)
        self.connections: dict[int, socket.socket] = {}
        self.greeted: set[socket.socket] = set()  # who is told of exits: a client that says HELLO, no logger
        self.listener = listener
        self.children = child_signals()
        self.launcher_pid = 0
        self.launcher_pidfd = -1
        self.last_start = -RESTART_PAUSE
        self.launcher_listener: socket.socket | None = None
        self.wake_at: float | None = None  # when something is due: a launcher's start, or what failed before
        self.successor: Successor | None = None  # while it is tried
        self.epoll = select.epoll()
        self.epoll.register(self.listener, select.EPOLLIN)
        self.epoll.register(self.children, select.EPOLLIN)

    def serve(self) -> None:
        """Until QUIT is granted. One event at a time: of several, one may speak of a descriptor that the one before it has closed."""
        while True:
            patience = None if self.wake_at is None else max(0.0, self.wake_at - time.monotonic())
            if patience == 0.0:
                self.chores()
            for fd, _ in self.epoll.poll(patience, 1):
                if fd == self.listener.fileno():
                    self.accept()
                elif fd == self.children:
                    os.read(self.children, 128)
                    self.reap()
                elif fd == self.launcher_pidfd:
                    self.launcher_ended()
                else:
                    self.message(self.connections[fd])

    def chores(self) -> None:
        """What was put off."""
        self.wake_at = None
        self.reap()
        if self.launcher_pidfd < 0:
            self.start_launcher()
        if self.successor is not None and not self.successor.expired():
            self.put_off(RETRY)
        if not self.mirror.catch_up():
            self.put_off(RETRY)

    def put_off(self, seconds: float) -> None:
        """Come back to what could not be done now."""
        when = time.monotonic() + seconds
        self.wake_at = when if self.wake_at is None else min(self.wake_at, when)

    # Requests

    def accept(self) -> None:
        try:
            connection = packets.accept(self.listener)
        except OSError as error:
            image.complain("tare-keeper", f"accept a connection: {error!r}")
            time.sleep(
                RESTART_PAUSE
            )  # no descriptor is free: the connection waits, and this would be asked again at once
            return
        if connection is not None:
            self.welcome(connection)

    def welcome(self, connection: socket.socket) -> None:
        self.connections[connection.fileno()] = connection
        self.epoll.register(connection, select.EPOLLIN)

    def hang_up(self, connection: socket.socket) -> None:
        self.epoll.unregister(connection)
        del self.connections[connection.fileno()]
        self.greeted.discard(connection)
        connection.close()

    def message(self, connection: socket.socket) -> None:
        try:
            kind, request, fields, fds = packets.receive(connection)
        except BlockingIOError:
            return
        except (packets.Closed, wire.WireError):
            self.hang_up(connection)
            return
        try:
            self.answer(connection, kind, request, fields, fds)
        except (packets.Closed, OSError):
            self.hang_up(connection)

    def answer(
        self, connection: socket.socket, kind: int, request: int, fields: Sequence[wire.Field], fds: list[int]
    ) -> None:
        """Do what is asked. The descriptors of a STORE stay here, any others are closed."""
        result: tuple[wire.Field, ...] = ()
        kept: list[int] = []
        if kind == wire.STORE and wire.shape(fields) == "b":
            self.drop(wire.bytes_of(fields[0]))
            self.store[wire.bytes_of(fields[0])] = fds
            self.mirror.changed(wire.bytes_of(fields[0]))
            fds = []
        elif kind == wire.FETCH and wire.shape(fields) == "b":
            kept = self.store.get(wire.bytes_of(fields[0]), [])
        elif kind == wire.DROP and wire.shape(fields) == "b":
            for name in [name for name in self.store if name.startswith(wire.bytes_of(fields[0]))]:
                self.drop(name)
        elif kind == wire.HELLO:
            self.greeted.add(connection)
            if wire.shape(fields) == "ibi":
                self.mirror.follow(wire.bytes_of(fields[1]), everything=not fields[2])
            result = (wire.VERSION, os.getpid(), self.launcher_pid, self.identity, wire.OLDEST)
        elif kind == wire.RENEW:
            self.renew(connection, request, fields, fds)
            return
        elif kind == wire.QUIT and not os.listdir(f"{self.run}/tasks"):
            packets.send(connection, wire.OK, request)
            self.quit()
        else:
            packets.close_all(fds)
            words = b"containers live" if kind == wire.QUIT else b"unknown message"
            packets.send(connection, wire.FAILED, request, (b"keeper", EBUSY if kind == wire.QUIT else ENOSYS, words))
            return
        packets.close_all(fds)
        if self.mirror.behind and not self.mirror.catch_up():
            self.put_off(RETRY)
        if request:
            packets.send(connection, wire.OK, request, result, kept)

    def drop(self, key: bytes) -> None:
        """Let go of what is kept under a key."""
        if key in self.store:
            packets.close_all(self.store.pop(key))
            self.mirror.changed(key)

    def quit(self) -> None:
        """End the launcher, which ends its loggers, and this process."""
        if self.launcher_pidfd >= 0:
            signal.pidfd_send_signal(self.launcher_pidfd, signal.SIGTERM)
            select.select([self.launcher_pidfd], [], [], 5)
        for name in ("keeper.sock", "launcher.sock", "launcher.pid"):
            if os.path.lexists(f"{self.run}/{name}"):
                os.unlink(f"{self.run}/{name}")
        os._exit(0)

    # Children

    def reap(self) -> None:
        """Every zombie that is ours: its exit recorded if it was a task, then reaped. Where that cannot be, it keeps its code meanwhile."""
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            try:
                key = tasks.record_exit(self.run, info)
            except OSError as error:
                image.complain("tare-keeper", f"record the exit of process {info.si_pid}: {error!r}")
                self.put_off(RETRY)
                return
            os.waitid(os.P_PID, info.si_pid, os.WEXITED)
            if key is not None:
                self.broadcast(key)
            if info.si_pid == self.launcher_pid:
                self.launcher_ended()
            if self.successor is not None and info.si_pid == self.successor.pid:
                self.tried(self.successor, info.si_code == os.CLD_EXITED and info.si_status == 0)

    def broadcast(self, key: tuple[int, int]) -> None:
        """Tell whoever listens that a task has ended. A connection that does not read is cut: it will read exits/ when it comes back."""
        for connection in list(self.greeted):
            try:
                packets.send(connection, wire.EXITED, 0, key)
            except (packets.Closed, OSError):
                self.hang_up(connection)

    # Another version

    def renew(self, connection: socket.socket, request: int, fields: Sequence[wire.Field], fds: list[int]) -> None:
        """Have another version tried; the answer comes when it is in place, or has been found to be no use."""
        try:
            if self.successor is not None:
                raise OSError(EBUSY, "another version is being tried")
            successor = succession.Successor(connection, request, fields, fds)
        except OSError as error:
            packets.send(connection, wire.FAILED, request, (b"keeper", error.errno or 0, os.fsencode(str(error))))
            return
        finally:
            packets.close_all(fds)
        try:
            successor.attempt(self.run, self.state(successor))
        except OSError as error:
            self.stay(successor, error.errno or 0, os.fsencode(str(error)))
        else:
            self.successor = successor
            self.put_off(RETRY)

    def tried(self, successor: Successor, good: bool) -> None:
        """The trial has ended: be the other version, if it works."""
        self.successor = None
        if not good:
            self.stay(successor, 0, successor.words())
            return
        try:
            successor.become(self.run, self.state(successor))
        except OSError as error:
            self.stay(successor, error.errno or 0, os.fsencode(str(error)))

    def stay(self, successor: Successor, number: int, words: bytes) -> None:
        """This version goes on."""
        successor.close()
        if successor.connection.fileno() < 0:
            return
        try:
            packets.send(
                successor.connection, wire.FAILED, successor.request, (b"try the other version", number, words)
            )
        except (packets.Closed, OSError):
            self.hang_up(successor.connection)

    def state(self, successor: Successor) -> State:
        """All that the next version is to go on with."""
        asking = successor.connection if successor.connection.fileno() >= 0 else None
        bound = self.launcher_listener.fileno() if self.launcher_listener is not None else -1
        single = [self.lock, self.listener.fileno(), bound, self.launcher_pidfd]
        kept = [fd for fds in self.store.values() for fd in fds]
        return succession.state_of(
            "keeper",
            asking,
            successor.request,
            [fd for fd in (*single, *kept, *self.connections) if fd >= 0],
            single=single,
            launcher=self.launcher_pid,
            store=self.store,
            mirror=(self.mirror.address, list(self.mirror.behind)),
            connections=[(fd, connection in self.greeted) for fd, connection in self.connections.items()],
        )

    # The launcher

    def take_launcher(self) -> None:
        """Watch the launcher that an earlier keeper started, if it lives; else start one."""
        found = linux.recorded(f"{self.run}/launcher.pid")
        if found is not None:
            self.watch_launcher(*found)
        else:
            self.start_launcher()

    def watch_launcher(self, pid: int, pidfd: int) -> None:
        self.launcher_pid, self.launcher_pidfd = pid, pidfd
        self.epoll.register(pidfd, select.EPOLLIN)

    def launcher_ended(self) -> None:
        """Another one is needed, at once unless the last was started a moment ago."""
        if self.launcher_pidfd < 0:
            return
        self.epoll.unregister(self.launcher_pidfd)
        os.close(self.launcher_pidfd)
        self.launcher_pid, self.launcher_pidfd = 0, -1
        self.start_launcher()

    def start_launcher(self) -> None:
        """Fork: the launcher runs on this image, with the listening socket and nothing else of the keeper's."""
        pause = self.last_start + RESTART_PAUSE - time.monotonic()
        if pause > 0:
            self.put_off(pause)
            return
        self.last_start = time.monotonic()
        keeper = os.getpid()
        try:
            if self.launcher_listener is None:
                self.launcher_listener = packets.listen(f"{self.run}/launcher.sock")
            pid, pidfd = linux.clone3()
        except OSError as error:
            image.complain("tare-keeper", f"start a launcher: {error!r}")
            self.put_off(RETRY)
            return
        if pid == 0:
            linux.keep_only(self.launcher_listener.fileno())
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            image.end_after(launcher.serve, self.run, self.identity, self.launcher_listener, keeper)
        self.watch_launcher(pid, pidfd)


def child_signals() -> int:
    """A signalfd for SIGCHLD, which is blocked here and nowhere else."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    mask = ctypes.c_uint64(1 << (signal.SIGCHLD - 1))
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    return linux.check(linux.libc.signalfd(ctypes.c_int(-1), ctypes.byref(mask), ctypes.c_int(flags)), "signalfd")


def resume(run: str, identity: bytes, state: State) -> Keeper:
    """The keeper that another version has been so far."""
    lock, listener, bound, pidfd = state["single"]
    keeper = begin(run, identity, lock, socket.socket(fileno=listener))
    keeper.store.update(state["store"])
    keeper.mirror.address, behind = state["mirror"]
    keeper.mirror.behind |= dict.fromkeys(behind)
    keeper.launcher_listener = socket.socket(fileno=bound) if bound >= 0 else None
    if pidfd >= 0:
        keeper.watch_launcher(state["launcher"], pidfd)
    for fd, greeted in state["connections"]:
        connection = socket.socket(fileno=fd)
        keeper.welcome(connection)
        if greeted:
            keeper.greeted.add(connection)
    keeper.put_off(0.0)  # whoever has ended meanwhile
    return keeper


def begin(run: str, identity: bytes, lock: int, listener: socket.socket) -> Keeper:
    """A keeper, and this process as it should be for one."""
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    linux.set_name(b"tare-keeper")
    keeper = Keeper(run, identity, lock, listener)
    image.prepare()
    return keeper


def main(run: str, identity: bytes, kept: State | None) -> None:
    """Serve, once; a second keeper for the same directory ends at once. `kept` has what the service manager has kept of an earlier one.

    The process that was started ends with 0 as soon as the keeper proper is on its way: the keeper is nobody's child.
    """
    if os.fork():
        os._exit(0)
    lock = os.open(f"{run}/keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os._exit(0)
    keeper = begin(run, identity, lock, packets.listen(f"{run}/keeper.sock"))
    if kept is not None:
        keeper.store.update(kept["store"])
    keeper.take_launcher()
    image.end_after(keeper.serve)
