"""The logger: reads what the containers of a group of pods say, and writes it into their log files.

One thread, epoll. It may block on a slow disk, which stalls its group and nobody else. It may be killed at any instant:
what it was doing is in its journal (`journal`, `pump`), whom it serves in its slots (`slots`), and a successor finds FIFOs
and logs by path. The daemon asks it over a socket (ADD, REOPEN, DRAIN, REMOVE in `wire`); a connection that breaks harms nothing.

    <run>/loggers/<group>/sock, journal, slots/        <run>/containers/<container ID>/stdin, stdout, stderr (FIFOs)
    in the keeper: fifo/<container ID>/<name>, tty/<container ID>, logger/<group> (the private pipe)

A stream without a writer is not over: a container may not have begun, or be begun a second time after a failure. Only after
DRAIN, which says that nothing writes any more, is the end of file believed.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time

from tare.launch import crilog, inputs, journal, linux, logfile, packets, pump, slots, spares, taps, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

IDLE_LIFE = 30.0  # seconds without a container and a connection, after which it ends
RETRY = 5.0  # seconds between two attempts at what failed: to reach the keeper, to write of lost lines
REST = 1.0  # seconds without an event, after which memory goes back
EVENTS = 32  # at most from one call of epoll, which reserves room for them
LEVEL = select.EPOLLIN
QUIET = select.EPOLLIN | select.EPOLLET  # nobody writes: told once of that, and again when somebody does


class Stream:
    """One FIFO or terminal that is read. `quiet` while nobody writes to it, `held` while it must wait for a client (`taps`)."""

    __slots__ = ("container", "fd", "held", "index", "quiet")

    def __init__(self, container: pump.Container, index: int, fd: int) -> None:
        self.container = container
        self.index = index
        self.fd = fd
        self.quiet = self.held = False


class Refused(Exception):
    """A request that cannot be done; `fields` are those of FAILED: step, errno, and words with the path."""

    def __init__(self, step: bytes, error: OSError) -> None:
        super().__init__(step, error)
        words = os.fsencode(error.strerror or str(error))
        subject = os.fsencode(error.filename or b"")
        self.fields = (step, error.errno or 0, words + b": " + subject if subject else words)


class Step:
    """`with Step(name):` an OSError in it refuses the request at this step."""

    def __init__(self, name: bytes) -> None:
        self.name = name

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise Refused(self.name, error) from None


class Logger:
    """A logger over a listening socket and a private pipe, both made by its launcher."""

    def __init__(self, group: bytes, run: bytes, listener: socket.socket, pipe: tuple[int, int]) -> None:
        self.run = os.fsdecode(run)
        directory = f"{self.run}/loggers/{os.fsdecode(group)}"
        self.slots = f"{directory}/slots"
        self.group = group
        self.pipe = pipe
        self.journal = journal.Journal(os.fsencode(f"{directory}/journal"))
        self.pump = pump.Pump(self.journal, pipe)
        self.containers: dict[bytes, pump.Container] = {}
        self.streams: dict[int, Stream] = {}
        self.draining: dict[bytes, list[tuple[socket.socket, int]]] = {}
        self.again: list[Stream] = []
        self.connections: dict[int, socket.socket] = {}
        self.listener = listener
        self.spares = spares.Spares(f"{self.run}/keeper.sock")
        self.inputs = inputs.Inputs(self.run, self.spares)
        self.epoll = select.epoll()
        self.epoll.register(listener, select.EPOLLIN)
        self.taps = taps.Taps(self.epoll, self.tapped)
        self.idle_since: float | None = None
        self.retry_at: float | None = None

    # The loop

    def serve(self) -> None:
        """Until there is nothing to do for a while; then the journal goes."""
        self.recover()
        self.chores()
        while self.idle_since is None or time.monotonic() < self.idle_since + IDLE_LIFE:
            again, self.again = self.again, []
            events = self.epoll.poll(0 if again else self.patience(), EVENTS)
            for fd, what in events:
                self.event(fd, what)
            if not events and not again:
                self.pump.rest()
            for stream in again:
                if self.streams.get(stream.fd) is stream:
                    self.read(stream)
            self.chores()
        self.journal.remove()

    def event(self, fd: int, what: int) -> None:
        """One descriptor is ready; it may be closed by now, or be another's, which finds nothing."""
        if fd in self.streams:
            self.read(self.streams[fd])
        elif fd in self.taps.by_fd:
            self.taps.event(fd, what)
        elif fd in self.connections:
            self.message(self.connections[fd])
        elif fd == self.listener.fileno():
            self.accept()
        elif fd == self.spares.fileno():
            self.spares.hear()

    def patience(self) -> float:
        """Seconds that epoll may wait; -1 for as long as it takes."""
        due = self.retry_at
        if self.idle_since is not None:
            due = self.idle_since + IDLE_LIFE
        wait = -1 if due is None else max(0.0, due - time.monotonic())
        if self.taps and (patience := self.taps.patience()) is not None:
            wait = patience if wait < 0 else min(wait, patience)
        return REST if self.pump.worked and not 0 <= wait < REST else wait

    def chores(self) -> None:
        """What waits for its time. Nothing does while all is well, so that an idle logger costs nothing."""
        if self.taps:
            self.taps.expire()
        if self.containers or self.connections or self.taps:
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = time.monotonic()
        if self.retry_at is not None and time.monotonic() >= self.retry_at:
            self.retry_at = None
            self.reach_keeper()
            self.note_losses()
        if self.retry_at is None and self.containers and (self.pump.failing or self.spares.fileno() < 0):
            self.retry_at = time.monotonic() + RETRY

    def reach_keeper(self) -> None:
        """Connect again if the keeper was lost, and have it keep what it should."""
        if not self.spares.connect():
            return
        self.epoll.register(self.spares.fileno(), select.EPOLLIN)
        self.spares.store(spares.PRIVATE_PIPE + self.group, *self.pipe)
        for stream in self.streams.values():
            self.spares.store(spare_key(stream.container, stream.index), stream.fd)
        self.inputs.store()
        for container in self.containers.values():
            self.recall_terminal(container)

    def note_losses(self) -> None:
        """Where lines were lost: say so in the log, if it can be written again."""
        self.pump.failing = False
        for container in self.containers.values():
            for index in range(container.streams):
                if container.record.lost[index]:
                    self.pump.mark(container, index, journal.DATA)

    # Streams

    def read(self, stream: Stream) -> None:
        """One batch; each stream gets its turn."""
        container = stream.container
        if stream.held:
            return
        moved = self.pump.move(container, stream.index, stream.fd)
        if moved == pump.OVER:
            self.silent(stream)
        elif moved > 0:
            if stream.quiet:
                stream.quiet = False
                self.epoll.modify(stream.fd, LEVEL)
            if self.taps:
                self.taps.feed(container.id, stream.index, self.journal.data(moved))
                self.hold(container)
            if container.id in self.draining:
                # A FIFO opened after its last writer has gone never hangs up: its end must be looked for.
                self.again.append(stream)

    def silent(self, stream: Stream) -> None:
        """Nobody writes to a stream: after DRAIN that is its end."""
        container = stream.container
        if container.id in self.draining:
            self.pump.mark(container, stream.index, journal.END)
            self.close(stream)
            self.spares.drop(spare_key(container, stream.index))
            self.settle(container)
            return
        if container.record.is_open >> stream.index & 1:
            self.pump.mark(container, stream.index, journal.CLOSE)
        if not stream.quiet:
            stream.quiet = True
            self.epoll.modify(stream.fd, QUIET)

    def hold(self, container: pump.Container) -> None:
        """Read no more of a container while a client of it has not taken what was read. One that has ended has little left to say."""
        if not self.taps.blocked(container.id) or container.id in self.draining:
            return
        for stream in self.streams_of(container):
            if not stream.held:
                stream.held = True
                self.epoll.unregister(stream.fd)

    def tapped(self, identity: bytes) -> None:
        """Go on reading a container, if no client is in the way any more."""
        container = self.containers.get(identity)
        if container is None or self.taps.blocked(identity):
            return
        self.release(container)

    def release(self, container: pump.Container) -> None:
        for stream in self.streams_of(container):
            if stream.held:
                stream.held = stream.quiet = False
                self.epoll.register(stream.fd, LEVEL)

    def watch(self, container: pump.Container, index: int, fd: int) -> None:
        """Begin to read a stream, with a spare of it in the keeper."""
        os.set_blocking(fd, False)
        self.spares.store(spare_key(container, index), fd)
        self.streams[fd] = Stream(container, index, fd)
        self.epoll.register(fd, LEVEL)

    def close(self, stream: Stream) -> None:
        if not stream.held:
            self.epoll.unregister(stream.fd)
        del self.streams[stream.fd]
        os.close(stream.fd)

    def streams_of(self, container: pump.Container) -> list[Stream]:
        return [stream for stream in self.streams.values() if stream.container is container]

    # Connections

    def accept(self) -> None:
        connection = packets.accept(self.listener)
        if connection is not None:
            self.connections[connection.fileno()] = connection
            self.epoll.register(connection, select.EPOLLIN)

    def hang_up(self, connection: socket.socket) -> None:
        if self.connections.pop(connection.fileno(), None) is not None:
            self.epoll.unregister(connection)
            connection.close()

    def message(self, connection: socket.socket) -> None:
        """One request. A client that speaks another language, or does not read, is cut off."""
        try:
            kind, request, fields, fds = packets.receive(connection)
        except BlockingIOError:
            return
        except (packets.Closed, wire.WireError):
            self.hang_up(connection)
            return
        if self.spares.fileno() < 0:
            self.reach_keeper()
        try:
            if self.answer(connection, kind, request, fields, fds):
                self.reply(connection, wire.OK, request)
        except Refused as refusal:
            self.reply(connection, wire.FAILED, request, refusal.fields)
        except wire.WireError as error:
            self.reply(connection, wire.FAILED, request, (b"request", errno.EINVAL, os.fsencode(str(error))))
        finally:
            packets.close_all(fds)

    def reply(self, connection: socket.socket, kind: int, request: int, fields: Sequence[wire.Field] = ()) -> None:
        if self.connections.get(connection.fileno()) is not connection:
            return
        try:
            packets.send(connection, kind, request, fields)
        except (packets.Closed, BlockingIOError):
            self.hang_up(connection)

    def answer(
        self, connection: socket.socket, kind: int, request: int, fields: list[wire.Field], fds: list[int]
    ) -> bool:
        """Do what is asked; False where the answer comes later."""
        if kind == wire.ADD:
            self.add(fields, fds)
            return True
        identity = slots.identity(fields)
        container = self.containers.get(identity)
        if kind == wire.REOPEN:
            if container is None:
                raise Refused(b"find container", OSError(errno.ENOENT, "no log of this container here", identity))
            with Step(b"open log"):
                self.pump.reopen(container)
        elif kind == wire.ATTACH:
            if container is None or not fds:
                raise Refused(b"find container", OSError(errno.ENOENT, "no log of this container here", identity))
            with Step(b"join a client"):
                self.attach(container, fds[0])
        elif kind == wire.CLOSE_INPUT:
            with Step(b"end stdin"):
                self.inputs.end(identity)
        elif kind == wire.DRAIN:
            if container is not None and not container.over:
                self.drain(container, connection, request)
                return False
        elif kind == wire.REMOVE:
            if container is not None:
                self.remove(container)
        else:
            raise wire.WireError(f"a logger knows no message {kind}")
        return True

    # Requests

    def add(self, fields: list[wire.Field], fds: list[int]) -> None:
        """Serve a container; its streams are watched and its log is open when this returns."""
        entry = slots.entry(fields)
        known = self.containers.get(entry[0])
        if known is None:
            self.add_new(entry, fields, fds)
        elif known.log_path != entry[1]:
            raise Refused(b"log path", OSError(errno.EEXIST, "the log has another path already", known.log_path))
        elif fds:
            self.replace_terminal(known, entry, fields, fds)

    def add_new(self, entry: slots.Entry, fields: list[wire.Field], fds: list[int]) -> None:
        used = {container.slot for container in self.containers.values()}
        slot = next((number for number in range(journal.SLOTS) if number not in used), -1)
        if slot < 0:
            raise Refused(b"slot", OSError(errno.ENOSPC, f"this logger serves {journal.SLOTS} containers already"))
        container = pump.Container(slot, *entry)
        opened: list[int] = []
        try:
            with Step(b"open streams"):
                self.open_streams(container, fds, opened)
            with Step(b"open log"):
                if container.log_path:
                    container.use(logfile.open_log(container.log_path))
            with Step(b"write slot"):
                self.journal.reserve(slot)
                slots.write(self.slots, slot, fields)
        except Refused:
            packets.close_all(opened)
            container.close()
            self.inputs.close(container.id)
            raise
        for index, fd in enumerate(opened):
            self.watch(container, index, fd)
        self.containers[container.id] = container
        container.record.used = True
        self.journal.commit(slot, container.record)

    def open_streams(self, container: pump.Container, fds: list[int], opened: list[int]) -> None:
        """Add the reading ends to `opened`. A FIFO opened for reading without waiting needs no writer."""
        if container.flags & wire.ADD_STDIN:
            self.inputs.open(container.id)
        if container.flags & wire.ADD_TERMINAL:
            if not fds:
                raise OSError(errno.EBADF, "no terminal came with the request")
            opened.append(os.dup(fds[0]))
            return
        for index in range(container.streams):
            opened.append(self.open_fifo(container, index))

    def open_fifo(self, container: pump.Container, index: int) -> int:
        return os.open(self.fifo(container, crilog.STREAMS[index]), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def fifo(self, container: pump.Container, name: bytes) -> bytes:
        return b"%s/containers/%s/%s" % (os.fsencode(self.run), container.id, name)

    def replace_terminal(
        self, container: pump.Container, entry: slots.Entry, fields: list[wire.Field], fds: list[int]
    ) -> None:
        """A container that is added again with a terminal has just got it, or is begun anew, or missed the answer."""
        with Step(b"write slot"):
            slots.write(self.slots, container.slot, fields)
        for stream in self.streams_of(container):
            self.close(stream)
        container.describe(*entry)
        self.watch(container, 0, os.dup(fds[0]))

    def attach(self, container: pump.Container, fd: int) -> None:
        """A client gets a copy from now on."""
        self.taps.add(container.id, fd)
        if container.over:
            self.taps.finish(container.id)

    def drain(self, container: pump.Container, connection: socket.socket, request: int) -> None:
        """Answered when all streams have ended, which may be now."""
        self.draining.setdefault(container.id, []).append((connection, request))
        self.release(container)
        watched = self.streams_of(container)
        unwatched = set(range(container.streams)) - {stream.index for stream in watched}
        for index in unwatched:
            if not container.record.ended >> index & 1:
                self.pump.mark(container, index, journal.END)  # nobody has kept it
        for stream in watched:
            self.read(stream)
        self.settle(container)

    def settle(self, container: pump.Container) -> None:
        """Answer those who wait for a container's end, if it has come."""
        if container.over:
            self.taps.finish(container.id)
            for connection, request in self.draining.pop(container.id, ()):
                self.reply(connection, wire.OK, request)

    def remove(self, container: pump.Container) -> None:
        """Forget a container. Its log stays; what nobody has drained is gone."""
        for stream in self.streams_of(container):
            self.close(stream)
        self.taps.finish(container.id)
        self.journal.commit(container.slot, journal.Record())
        self.let_go(container)
        slots.remove(self.slots, container.slot)
        container.close()
        del self.containers[container.id]
        for connection, request in self.draining.pop(container.id, ()):
            self.reply(connection, wire.OK, request)

    def let_go(self, container: pump.Container) -> None:
        """Drop every spare of a container."""
        self.inputs.close(container.id)
        self.spares.drop(b"fifo/%s/" % container.id)
        self.spares.drop(b"tty/%s" % container.id)

    # Beginning where another has ended

    def recover(self) -> None:
        """Serve again whom an earlier logger served, and finish what it had begun."""
        if self.journal.phase == journal.REDO:
            self.journal.redo()
        self.reach_keeper()
        by_slot: dict[int, pump.Container] = {}
        for slot, entry in slots.read(self.slots).items():
            container = pump.Container(slot, *entry)
            self.journal.reserve(slot)
            container.record = self.journal.record(slot)
            if container.record.used:
                by_slot[slot] = self.containers[container.id] = container
            else:
                self.let_go(container)
                slots.remove(self.slots, slot)
        self.pump.recover(by_slot)
        for container in by_slot.values():
            self.resume(container)

    def resume(self, container: pump.Container) -> None:
        """Watch the streams again that have not ended. One whose FIFO is gone has."""
        if container.flags & wire.ADD_STDIN:
            self.inputs.open_again(container.id)
        if container.flags & wire.ADD_TERMINAL:
            self.recall_terminal(container)
            return
        for index in range(container.streams):
            if container.record.ended >> index & 1:
                continue
            if os.path.lexists(self.fifo(container, crilog.STREAMS[index])):
                self.watch(container, index, self.open_fifo(container, index))
            else:
                self.pump.mark(container, index, journal.END)

    def recall_terminal(self, container: pump.Container) -> None:
        """A terminal has no path: its master is where the keeper has it, or lost."""
        if container.flags & wire.ADD_TERMINAL and not container.over and not self.streams_of(container):
            fd = self.spares.fetch(spare_key(container, 0))
            if fd is not None and fd >= 0:
                self.watch(container, 0, fd)


def spare_key(container: pump.Container, index: int) -> bytes:
    """What the keeper has a stream's spare under."""
    if container.flags & wire.ADD_TERMINAL:
        return b"tty/%s" % container.id
    return b"fifo/%s/%s" % (container.id, crilog.STREAMS[index])


def serve(group: bytes, run: bytes, listener: int, pipe: tuple[int, int]) -> None:
    """A logger's life, in a child just forked by the launcher, which holds nothing but these descriptors.

    `group` names the directory under `run`/loggers, `listener` is the socket that listens there, `pipe` the group's
    private pipe (reading end, writing end), the same one for each logger of the group. Returns after half a minute
    without a container or a connection: the caller ends the process with 0.
    """
    linux.set_name(b"tare-logger")
    connection = socket.socket(fileno=listener)
    connection.setblocking(False)
    Logger(group, run, connection, pipe).serve()
