"""The launcher's loggers: started on demand, adopted from an earlier launcher, and replaced when they die."""

from __future__ import annotations

import os
import signal
import time

from tare.launch import image, journal, linux, logger, packets, wire
from tare.launch.children import send_signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PRIVATE_PIPE = b"logger/"  # key prefix in the keeper's store
KEEPER_PATIENCE = 5.0  # seconds
RESTART_PAUSE = 0.5  # seconds between two starts of a logger that dies at once
RETRY = 1.0  # seconds before one that could not be started is tried again


class Loggers:
    """Those of one run directory. `watch(fd, function)` and `later(seconds, function)` are the launcher's loop; `unwatch(fd)` ends a watch."""

    def __init__(
        self,
        run: str,
        watch: Callable[[int, Callable[[], object]], None],
        unwatch: Callable[[int], None],
        later: Callable[[float, Callable[[], object]], None],
    ) -> None:
        self.run = run
        self.watch = watch
        self.unwatch = unwatch
        self.later = later
        self.pidfds: dict[bytes, int] = {}  # by group
        self.pids: set[int] = set()  # of this launcher's own that are not reaped
        self.started: dict[bytes, float] = {}

    def ensure(self, group: bytes) -> None:
        """Have a logger for a group; its socket listens when this returns. Raises OSError, packets.Closed."""
        if group not in self.pidfds:
            self.start(group)

    def end(self) -> None:
        """SIGTERM for all."""
        for pidfd in self.pidfds.values():
            send_signal(pidfd, signal.SIGTERM)

    def start(self, group: bytes) -> None:
        """Fork a logger. Its private pipe has a spare in the keeper."""
        directory = f"{self.run}/loggers/{os.fsdecode(group)}"
        os.makedirs(directory, mode=0o700, exist_ok=True)
        pipe = self.private_pipe(group)
        try:
            listener = packets.listen(f"{directory}/sock")
            with listener:
                pid, pidfd = linux.clone3()
                if pid == 0:
                    image.usual_signals()
                    linux.keep_only(listener.fileno(), *pipe)
                    image.end_after(logger.serve, group, os.fsencode(self.run), listener.fileno(), pipe)
        finally:
            packets.close_all(pipe)
        self.pids.add(pid)
        self.started[group] = time.monotonic()
        self.adopt(group, pidfd)
        linux.replace_file(f"{directory}/pid", b"%d %d\n" % (pid, linux.start_time(pid)))

    def private_pipe(self, group: bytes) -> tuple[int, int]:
        """The group's pipe, from the keeper if an earlier logger had one (bytes may be in it), else a new one."""
        key = PRIVATE_PIPE + group
        with packets.connect(f"{self.run}/keeper.sock") as keeper:
            keeper.settimeout(KEEPER_PATIENCE)
            packets.send(keeper, wire.FETCH, 1, (key,))
            *_, fds = packets.receive(keeper)
            if len(fds) == 2:
                return fds[0], fds[1]
            packets.close_all(fds)
            pipe = os.pipe2(os.O_CLOEXEC)
            try:
                packets.send(keeper, wire.STORE, 1, (key,), pipe)
                packets.receive(keeper)
            except BaseException:
                packets.close_all(pipe)
                raise
            return pipe

    def adopt(self, group: bytes, pidfd: int) -> None:
        """Watch a logger."""
        self.pidfds[group] = pidfd
        self.watch(pidfd, lambda: self.ended(group, pidfd))

    def ended(self, group: bytes, pidfd: int) -> None:
        """A logger that ended by itself had nothing to do, any other is replaced."""
        self.unwatch(pidfd)
        del self.pidfds[group]
        try:
            info = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
            done = info is not None and info.si_code == os.CLD_EXITED and info.si_status == 0
            self.pids.discard(info.si_pid if info is not None else 0)
        except ChildProcessError:  # an earlier launcher's: the keeper reaps it
            done = not os.path.lexists(f"{self.run}/loggers/{os.fsdecode(group)}/journal")
        finally:
            os.close(pidfd)
        if not done:
            rest = self.started.pop(group, 0.0) + RESTART_PAUSE - time.monotonic()
            self.later(max(0.0, rest), lambda: self.restart(group))

    def restart(self, group: bytes, *, again: bool = False) -> None:
        """Start a logger that nobody has asked for just now. Where that fails (there is no keeper, for a moment) it is tried again."""
        try:
            self.ensure(group)
        except (OSError, packets.Closed, wire.WireError) as error:
            if not again:
                image.complain("tare-launcher", f"restart the logger of group {os.fsdecode(group)}: {error!r}")
            self.later(RETRY, lambda: self.restart(group, again=True))

    def renew(self) -> None:
        """Have loggers of this code in the place of those there are, which serve on until then: what they are killed at is gone on with."""
        for pidfd in self.pidfds.values():
            send_signal(pidfd, signal.SIGKILL)

    def check(self) -> None:
        """Raises OSError where a logger of this code could not go on from a journal that there is."""
        for name in os.listdir(f"{self.run}/loggers"):
            journal.check(os.fsencode(f"{self.run}/loggers/{name}/journal"))

    def adopt_all(self) -> None:
        """Watch the loggers of an earlier launcher, and start those that died with it."""
        for name in os.listdir(f"{self.run}/loggers"):
            group = os.fsencode(name)
            found = linux.recorded(f"{self.run}/loggers/{name}/pid")
            if found is not None:
                self.adopt(group, found[1])
            elif os.path.lexists(f"{self.run}/loggers/{name}/journal"):
                self.restart(group)
