"""The launcher: a fork server, and the parent of every container, exec and logger that it makes.

It forks a child for each request, watches it by pidfd, lets it through its gate once its marker is written, and records its
exit before reaping it. It never reads a plan and touches no path that a pod names: the child does. Requests and their
answers are drawn in `wire`. It dies with nothing lost: its children go to the keeper, and a new launcher serves new calls.

    CREATE ─► clone3 ─► child: steps …  READY ─► OK ══ waits for START ═► GO ─► child: credentials … execve
                            └─ or first  BARRIER ─► BORN ══ waits for PROCEED ═► GO ─► steps …
    BEGIN ──► clone3 ─► child; BORN ══ waits for PROCEED, with the plan ═► GO ─► steps …  READY ─► GO ─► credentials … execve
    EXEC, NAMESPACES, CHECK, COMMAND: the same, without the wait
"""

from __future__ import annotations

import gc
import mmap
import os
import signal
import socket
import time

from tare.launch import between, checks, commands, exec, image, init, linux, namespaces, packets, tasks, wire
from tare.launch.children import Child, send_signal
from tare.launch.connections import Connections
from tare.launch.loggers import Loggers
from tare.launch.renewing import Renewing
from tare.launch.strays import Strays

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Fields = list[wire.Field]
    Body = Callable[[socket.socket, mmap.mmap], None]

COLLECT_EVERY = 256  # children between two collections of garbage, which is off otherwise
RETRY = 1.0  # seconds before what failed for want of room is tried again
TRACED_PAUSE = 0.01  # seconds between two attempts to reap a process that a debugger has not let go of
MOST_SAID = 64  # messages of a child that are read without looking after others
EINVAL, ESRCH = 22, 3


class Launcher(Connections):
    """One launcher. `run` is the run directory, `identity` that of its code; the listener is the keeper's gift."""

    def __init__(self, run: str, listener: socket.socket, identity: bytes = b"") -> None:
        super().__init__(listener)
        self.run = run
        self.identity = identity
        # By the name of the request, until that has failed, is abandoned, or its process is reaped.
        self.named: dict[bytes, Child] = {}
        # Children that are not reaped, but for helpers; None for one that is no request's.
        self.pids: dict[int, Child | None] = {}
        self.helpers: dict[int, Child] = {}  # by the intermediate process's PID, until that is reaped
        self.loggers = Loggers(run, self.loop.watch, self.loop.unwatch, self.loop.later)
        self.strays = Strays(self.loop.later, (self.pids, self.helpers, self.loggers.pids), self.is_making)
        self.reaped = 0
        self.renewing = Renewing(self)
        self.requests = {
            wire.HELLO: ("i", 0, self.renewing.hello),
            wire.RENEW: (None, 1, self.renewing.begin),
            wire.CREATE: ("bii", 1, self.create),
            wire.BEGIN: ("bi", 0, self.begin),
            wire.PROCEED: ("b", 0, self.proceed),
            wire.EXEC: ("b", 5, self.exec),
            wire.NAMESPACES: ("bi", 1, self.namespaces),
            wire.CHECK: ("b", 1, self.check),
            wire.COMMAND: ("bi", 4, self.command),
            wire.START: ("b", 0, self.start),
            wire.ABANDON: ("b", 0, self.abandon),
            wire.LOGGER: ("b", 0, self.logger),
        }
        self.signals = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.loop.watch(self.signals[0], self.signalled)

    def serve(self) -> None:
        """Until SIGTERM."""
        image.handle_signals(self.signals[1])
        self.loggers.adopt_all()
        self.renewing.end()
        self.loop.run()

    def signalled(self) -> None:
        """Children have ended, or this process is to."""
        numbers = os.read(self.signals[0], 1 << 16)
        if signal.SIGCHLD in numbers:
            self.strays.look_soon()
        if signal.SIGTERM in numbers:
            self.quit()

    def quit(self) -> None:
        """End the loggers, which the keeper has found to have nothing to do, and this process."""
        self.loggers.end()
        self.loop.ending = True

    def lost(self, connection: socket.socket) -> None:
        """The daemon of this connection is gone: what it created and never started ends."""
        for child in list(self.named.values()):
            if child.connection is connection:
                child.connection = None
                if not child.going:
                    self.kill(child)

    def reply(self, child: Child, kind: int, fields: Sequence[wire.Field], fds: Sequence[int] = ()) -> None:
        """Answer the request that this child is about, if anyone still listens."""
        child.answered = True
        if child.connection is not None:
            self.send(child.connection, kind, child.request, fields, fds)

    # Requests

    def create(self, connection: socket.socket, request: int, fields: Fields, fds: list[int]) -> None:
        name, flags, helper = wire.bytes_of(fields[0]), wire.int_of(fields[1]), wire.int_of(fields[2])
        plan, cgroup = fds[0], fds[1] if len(fds) > 1 else -1

        def body(status: socket.socket, outcome: mmap.mmap) -> None:
            if helper:
                between.main(status, outcome, plan, flags, cgroup if helper == 1 else -1)
            else:
                init.main(status, outcome, plan)

        child = self.child(wire.CREATE, name, connection, request)
        if helper == 2:
            self.fork(child, body, (plan,), 0, cgroup, helper=True)
        elif helper:
            self.fork(child, body, (plan, cgroup) if cgroup >= 0 else (plan,), helper=True)
        else:
            self.fork(child, body, (plan,), flags, cgroup)

    def begin(self, connection: socket.socket, request: int, fields: Fields, fds: list[int]) -> None:
        """A child whose plan comes later: it is there by then, and all that takes time about that is behind it."""
        child = self.child(wire.CREATE, wire.bytes_of(fields[0]), connection, request)
        child.begun = True
        self.fork(child, init.await_plan, (), wire.int_of(fields[1]), fds[0] if fds else -1)
        if self.mark(child):
            child.at_barrier = child.placed = True
            self.reply(child, wire.BORN, (child.pid, child.start), (child.pidfd,))

    def proceed(self, connection: socket.socket, request: int, fields: Fields, fds: list[int]) -> None:
        """A child that waits to be placed, or for its plan, goes on; this request is answered as the one that made it would have been."""
        child = self.named.get(wire.bytes_of(fields[0]))
        if child is None or not child.at_barrier or child.status is None:
            self.refuse(connection, request, b"gate", ESRCH, b"the process that was to go on is gone")
            return
        child.at_barrier = False
        child.request, child.answered, child.connection = request, False, connection
        self.say_go(child, fds[:1])

    def exec(self, connection: socket.socket, request: int, fields: Fields, fds: list[int]) -> None:
        plan, target, *streams = fds[:5]
        cgroup = fds[5] if len(fds) > 5 else -1

        def body(status: socket.socket, outcome: mmap.mmap) -> None:
            exec.main(status, outcome, plan, target, streams)

        child = self.child(wire.EXEC, wire.bytes_of(fields[0]), connection, request)
        self.fork(child, body, (plan, target, *streams), 0, cgroup, helper=True)

    def namespaces(self, connection: socket.socket, request: int, fields: Fields, fds: list[int]) -> None:
        plan = fds[0]
        child = self.child(wire.NAMESPACES, wire.bytes_of(fields[0]), connection, request)
        flags = wire.int_of(fields[1])
        if flags & linux.CLONE_NEWUSER:
            self.fork(child, lambda status, _: namespaces.with_owner(status, plan, flags), (plan,), helper=True)
        else:
            self.fork(child, lambda status, _: namespaces.main(status, plan), (plan,), flags)

    def check(self, connection: socket.socket, request: int, fields: Fields, fds: list[int]) -> None:
        plan = fds[0]
        child = self.child(wire.CHECK, wire.bytes_of(fields[0]), connection, request)
        self.fork(child, lambda status, _: checks.main(status, plan), (plan,))

    def command(self, connection: socket.socket, request: int, fields: Fields, fds: list[int]) -> None:
        plan, *streams = fds
        child = self.child(wire.COMMAND, wire.bytes_of(fields[0]), connection, request)
        self.fork(child, lambda status, outcome: commands.main(status, outcome, plan, streams), (plan, *streams))
        if limit := wire.int_of(fields[1]):
            child.kill_at = time.monotonic() + limit / 1000
            self.loop.later(limit / 1000, child.kill)

    def start(self, connection: socket.socket, request: int, fields: Fields, fds: list[int]) -> None:
        child = self.named.get(wire.bytes_of(fields[0]))
        if child is None or not child.at_gate():
            self.refuse(connection, request, b"gate", ESRCH, b"the process that was to start is gone")
            return
        child.request, child.answered, child.connection = request, False, connection
        self.open_gate(child)

    def abandon(self, connection: socket.socket, request: int, fields: Fields, fds: list[int]) -> None:
        """Nobody wants what a request made or is making; also where its answer crosses this message."""
        child = self.named.get(wire.bytes_of(fields[0]))
        if child is not None:
            self.kill(child)
        self.send(connection, wire.OK, request, ())

    def logger(self, connection: socket.socket, request: int, fields: Fields, fds: list[int]) -> None:
        self.loggers.ensure(wire.bytes_of(fields[0]))
        self.send(connection, wire.OK, request, ())

    # Children

    def child(self, kind: int, name: bytes, connection: socket.socket, request: int) -> Child:
        """A child to be, by a name that is free."""
        if name in self.named:
            raise FileExistsError(17, "a process lives or is under way by this name", os.fsdecode(name))
        return Child(kind, name, connection, request)

    def fork(
        self, child: Child, body: Body, keep: Sequence[int], flags: int = 0, cgroup: int = -1, *, helper: bool = False
    ) -> None:
        """A process that runs `body` with its end of the socket pair and no other descriptor than `keep`, and never returns."""
        assert child.status is not None
        try:
            pid, pidfd = linux.clone3(flags, cgroup)
        except OSError:
            child.status.close()
            child.theirs.close()
            raise
        if pid == 0:
            image.usual_signals()
            linux.keep_only(child.theirs.fileno(), *keep)
            image.usual_limits()
            image.end_after(body, child.theirs, child.outcome)
        child.theirs.close()
        self.named[child.name] = child
        self.loop.watch(child.status.fileno(), lambda: self.child_message(child))
        if helper:
            child.helper, child.helper_pid = pidfd, pid
            self.helpers[pid] = child
            self.loop.watch(pidfd, lambda: self.helper_ended(child))
        else:
            self.born(child, pid, pidfd)

    def born(self, child: Child, pid: int, pidfd: int) -> None:
        start = linux.start_time(pid)
        self.loop.watch(pidfd, lambda: self.ended(child))
        child.pid, child.pidfd, child.start = pid, pidfd, start
        self.pids[pid] = child

    def born_elsewhere(self, child: Child, pid: int, pidfd: int) -> None:
        """The same for whom an intermediate process has made. One that is reaped, or cannot be watched, fails its request."""
        try:
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # unreaped: it has its PID still
            self.born(child, pid, pidfd)
        except OSError as error:
            send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)
            if not child.answered:
                self.reply(child, wire.FAILED, (b"setup", error.errno or 0, b"the process cannot be watched"))
            self.kill(child)

    def is_making(self) -> bool:
        """Whether an intermediate process may have made a child and not named it yet."""
        return any(not child.pid and not child.unwanted for child in self.helpers.values())

    def helper_ended(self, child: Child) -> None:
        """The intermediate process is done. One that was killed may have made a process and not said so."""
        self.loop.unwatch(child.helper)
        if not child.pid:
            self.hear_out(child)
        if not child.pid:
            if child.status is not None:
                self.silent(child)
            self.drop_name(child)
        self.bury_helper(child)

    def bury_helper(self, child: Child) -> None:
        if os.waitid(os.P_PIDFD, child.helper, os.WEXITED | os.WNOHANG) is None:
            self.loop.later(TRACED_PAUSE, lambda: self.bury_helper(child))
            return
        del self.helpers[child.helper_pid]
        os.close(child.helper)
        child.helper = -1

    def hear_out(self, child: Child) -> None:
        """What has been said so far; no end of it is not waited for."""
        for _ in range(MOST_SAID):
            if child.status is None or not self.child_message(child):
                return

    def child_message(self, child: Child) -> bool:
        """Take one message of the child; False where there is none now."""
        assert child.status is not None
        try:
            sender, kind, _, fields, fds = packets.receive_from(child.status)
        except BlockingIOError:
            return False
        except packets.Closed:
            self.silent(child)
            return False
        except wire.WireError:
            self.distrust(child)
            return False
        if not child.may_say(sender, kind, fields, fds):
            self.distrust(child)
        elif kind == wire.CHILD:
            self.born_elsewhere(child, wire.int_of(fields[0]), fds.pop())
            if child.unwanted:
                child.kill()
            elif child.early is not None:
                early, child.early = child.early, None
                self.arrived(child, *early)
        elif child.unwanted:
            pass
        elif kind == wire.TERMINAL:
            child.terminal = fds.pop()
        elif kind in (wire.READY, wire.BARRIER) and (
            child.pid or (kind == wire.BARRIER and sender == child.helper_pid)
        ):
            self.arrived(child, kind, fields)
        elif kind in (wire.READY, wire.BARRIER):
            child.early = (kind, fields)
        elif kind == wire.FAILED:
            child.failure = (wire.bytes_of(fields[0]), wire.int_of(fields[1]), wire.bytes_of(fields[2]))
        elif kind == wire.OK:
            self.done(child, fields, fds)
        packets.close_all(fds)
        return True

    def distrust(self, child: Child) -> None:
        """It says what it has no business to say, so it is not itself: its end, and nothing it says is heard any more."""
        if child.unwanted:
            return
        if not child.answered:
            self.reply(child, wire.FAILED, (b"setup", EINVAL, b"the process was taken hold of before it could start"))
        self.kill(child)
        if child.pid:
            self.silent(child)

    def done(self, child: Child, fields: Fields, fds: list[int]) -> None:
        """A child that was only asked to do something has done it; a pod's PID 1 lives on and is named by its PID outside."""
        if child.kind == wire.NAMESPACES:
            stays = bool(fields[0])
            if stays and not self.mark(child):
                return
            fields = [child.pid, child.start] if stays else [0, 0]
        child.going = True
        if not child.marked:
            self.drop_name(child)
        self.reply(child, wire.OK, fields, fds)

    def arrived(self, child: Child, kind: int, fields: Fields) -> None:
        """It waits: to be placed, or at its gate."""
        if kind == wire.READY:
            self.ready(child, fields)
            return
        child.at_barrier = child.placed = True
        if child.pid:
            self.reply(child, wire.BORN, (child.pid, child.start), (child.pidfd,))
        else:  # who makes it waits, and has it where itself is
            self.reply(child, wire.BORN, (child.helper_pid, linux.start_time(child.helper_pid)), (child.helper,))

    def ready(self, child: Child, fields: Fields) -> None:
        """At its gate: its marker is written before anyone can let it through."""
        child.ready = True
        if not child.marked and not self.mark(child):
            return
        if child.begun or child.kind in (wire.EXEC, wire.COMMAND):
            child.warnings = fields
            self.open_gate(child)
            return
        fds = [child.pidfd] if child.terminal < 0 else [child.pidfd, child.terminal]
        self.reply(child, wire.OK, (child.pid, child.start, *fields), fds)
        child.close_terminal()

    def mark(self, child: Child) -> bool:
        """Write the marker; where that cannot be, the child ends."""
        try:
            content = commands.mark_of(child.name) if child.kind == wire.COMMAND else b""
            tasks.mark(self.run, child.pid, child.start, content)
        except OSError as error:
            child.failure = (b"write the marker", error.errno or 0, os.fsencode(str(error)))
            child.kill()
            self.silent(child)
            return False
        child.marked = True
        return True

    def open_gate(self, child: Child) -> None:
        child.going = True
        self.say_go(child)

    def say_go(self, child: Child, fds: Sequence[int] = ()) -> None:
        assert child.status is not None
        try:
            packets.send(child.status, wire.GO, 0, (), fds)
        except packets.Closed:
            self.silent(child)

    def silent(self, child: Child) -> None:
        """The child's socket has closed: it has exec'd, or failed, or was killed. Or it is closed here, which ends the child."""
        assert child.status is not None
        self.loop.unwatch(child.status.fileno())
        child.status.close()
        child.status = None
        outcome = child.read_outcome()
        child.outcome.close()
        if outcome is not None and not outcome[1] and not child.answered:
            fds = [child.pidfd] if child.kind in (wire.EXEC, wire.COMMAND) else []
            said = (child.pid, child.start, *child.warnings)
            self.reply(child, wire.OK, said, fds if child.terminal < 0 else [*fds, child.terminal])
        child.close_terminal()
        if child.answered:
            return
        if outcome is not None:
            child.failure = (*outcome, b"")  # the errno says it
        self.forget_marker(child)
        self.drop_name(child)
        self.reply(child, wire.FAILED, child.failure or (b"setup", 0, b"the process was killed before it could start"))

    def forget_marker(self, child: Child) -> None:
        if child.marked:
            child.marked = False
            tasks.unmark(self.run, child.pid, child.start)

    def drop_name(self, child: Child) -> None:
        if self.named.get(child.name) is child:
            del self.named[child.name]

    def kill(self, child: Child) -> None:
        """End a child whose end is nobody's business. Its name is free; it may take its time to die."""
        child.unwanted = True
        self.forget_marker(child)
        self.drop_name(child)
        child.kill()

    def ended(self, child: Child) -> None:
        """It has ended; what it said before that comes first."""
        self.loop.unwatch(child.pidfd)
        self.hear_out(child)
        if child.status is not None:
            self.silent(child)
        self.bury(child)

    def bury(self, child: Child) -> None:
        """Reap, with the exit on record first, and tell whoever listens. Where it cannot be written, the zombie keeps the code meanwhile."""
        info = os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if info is None:
            self.loop.later(TRACED_PAUSE, lambda: self.bury(child))
            return
        try:
            key = tasks.record_exit(self.run, info)
        except OSError as error:
            image.complain("tare-launcher", f"record the exit of process {child.pid}: {error!r}")
            self.loop.later(RETRY, lambda: self.bury(child))
            return
        os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED)
        self.pids.pop(child.pid, None)
        os.close(child.pidfd)
        child.pidfd = -1
        self.drop_name(child)
        if key is not None:
            for connection in list(self.connections.values()):
                self.send(connection, wire.EXITED, 0, key)
        self.reaped += 1
        if self.reaped % COLLECT_EVERY == 0:
            gc.collect()


def serve(run: str, identity: bytes, listener: socket.socket, keeper: int) -> None:
    """The launcher's life. One whose keeper dies before it is on record ends: the next keeper could not know of it."""
    linux.set_name(b"tare-launcher")
    if os.getppid() == keeper:
        linux.replace_file(f"{run}/launcher.pid", b"%d %d\n" % (os.getpid(), linux.start_time(os.getpid())))
    if os.getppid() == keeper:
        Launcher(run, listener, identity).serve()
