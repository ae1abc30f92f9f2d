"""The keeper: parent of last resort, and keeper of descriptors that must outlive their users.

It is a child subreaper, so whatever loses its parent comes here and is reaped here; if the process was one of ours (there is
a marker for it under tasks/), its exit is recorded first. It holds descriptors under keys for others (the masters of
terminals, the read ends of log FIFOs, the loggers' private pipes), starts the launcher, and starts it again when it dies.
It reads no file that a pod can name, parses nothing but messages, and does not end while a container lives.

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
import sys
import time

from tare.launch import image, launcher, linux, packets, tasks, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

RESTART_PAUSE = 0.5  # seconds between two starts of a launcher that dies at once
RETRY = 1.0  # seconds before what failed for want of room is tried again
EBUSY, ENOSYS = 16, 38


class Keeper:
    """One keeper. `run` is the run directory."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.store: dict[bytes, list[int]] = {}
        self.connections: dict[int, socket.socket] = {}
        self.greeted: set[socket.socket] = set()  # who is told of exits: a client that says HELLO, no logger
        self.listener = packets.listen(f"{run}/keeper.sock")
        self.children = child_signals()
        self.launcher_pid = 0
        self.launcher_pidfd = -1
        self.last_start = -RESTART_PAUSE
        self.launcher_listener: socket.socket | None = None
        self.wake_at: float | None = None  # when something is due: a launcher's start, or what failed before
        self.epoll = select.epoll()
        self.epoll.register(self.listener, select.EPOLLIN)
        self.epoll.register(self.children, select.EPOLLIN)

    def serve(self) -> None:
        """Until QUIT is granted. One event at a time: of several, one may speak of a descriptor that the one before it has closed."""
        self.take_launcher()
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
            fds = []
        elif kind == wire.FETCH and wire.shape(fields) == "b":
            kept = self.store.get(wire.bytes_of(fields[0]), [])
        elif kind == wire.DROP and wire.shape(fields) == "b":
            for name in [name for name in self.store if name.startswith(wire.bytes_of(fields[0]))]:
                self.drop(name)
        elif kind == wire.HELLO:
            self.greeted.add(connection)
            result = (wire.VERSION, os.getpid(), self.launcher_pid)
        elif kind == wire.QUIT and not os.listdir(f"{self.run}/tasks"):
            packets.send(connection, wire.OK, request)
            self.quit()
        else:
            packets.close_all(fds)
            words = b"containers live" if kind == wire.QUIT else b"unknown message"
            packets.send(connection, wire.FAILED, request, (b"keeper", EBUSY if kind == wire.QUIT else ENOSYS, words))
            return
        packets.close_all(fds)
        if request:
            packets.send(connection, wire.OK, request, result, kept)

    def drop(self, key: bytes) -> None:
        """Let go of what is kept under a key."""
        packets.close_all(self.store.pop(key, []))

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

    def broadcast(self, key: tuple[int, int]) -> None:
        """Tell whoever listens that a task has ended. A connection that does not read is cut: it will read exits/ when it comes back."""
        for connection in list(self.greeted):
            try:
                packets.send(connection, wire.EXITED, 0, key)
            except (packets.Closed, OSError):
                self.hang_up(connection)

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
            image.end_after(launcher.serve, self.run, self.launcher_listener, keeper)
        self.watch_launcher(pid, pidfd)


def child_signals() -> int:
    """A signalfd for SIGCHLD, which is blocked here and nowhere else."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    mask = ctypes.c_uint64(1 << (signal.SIGCHLD - 1))
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    return linux.check(linux.libc.signalfd(ctypes.c_int(-1), ctypes.byref(mask), ctypes.c_int(flags)), "signalfd")


def main() -> None:
    """`python -I -S -E -c … RUN`: serve, once; a second keeper for the same directory ends at once.

    The process that was started ends with 0 as soon as the keeper proper is on its way: the keeper is nobody's child.
    """
    run = sys.argv[1]
    linux.keep_only()
    if os.fork():
        os._exit(0)
    lock = os.open(f"{run}/keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os._exit(0)
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    linux.set_name(b"tare-keeper")
    image.prepare()
    image.end_after(Keeper(run).serve)
