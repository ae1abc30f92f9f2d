"""Moving what containers say into their logs, each byte once, whatever instruction the logger is killed at.

One batch at a time goes through the private pipe, the journal's buffer and the log (the phases are drawn in `journal`).
Every phase can be done again with the same result, so that recovery is nothing but going on. Which containers there are,
and when their streams are read, is the logger's business.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from tare.launch import crilog, journal, linux, logfile, wire

EMPTY = -1  # nothing to read now
OVER = 0  # nobody writes (any more, or yet)
SMALL = 8192  # bytes of a batch that leaves no mark on memory
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


class Container:
    """One container's log: its slot, how to write it, and its record. `log` is the open file, -1 where it is not open."""

    __slots__ = ("flags", "id", "log", "log_path", "max_line", "record", "slot", "streams")

    def __init__(self, slot: int, identity: bytes, log_path: bytes, max_line: int, flags: int) -> None:
        self.slot = slot
        self.log = -1
        self.record = journal.Record()
        self.describe(identity, log_path, max_line, flags)

    def describe(self, identity: bytes, log_path: bytes, max_line: int, flags: int) -> None:
        """What the container's slot file says of it."""
        self.id = identity
        self.log_path = log_path
        self.max_line = max_line
        self.flags = flags
        self.streams = 1 if flags & wire.ADD_TERMINAL else 2

    @property
    def over(self) -> bool:
        """Whether all its streams have ended."""
        return self.record.ended == (1 << self.streams) - 1

    def close(self) -> None:
        """Close the log file."""
        if self.log >= 0:
            os.close(self.log)
            self.log = -1

    def use(self, log: int, offset: int = -1) -> None:
        """Go on in another file, at its end unless told where."""
        info = os.fstat(log)
        self.close()
        self.log = log
        record = self.record
        record.device, record.inode = info.st_dev, info.st_ino
        record.offset = offset if offset >= 0 else info.st_size

    def find(self) -> None:
        """Open the file that the record is about, or where that is gone the one at the path. Raises OSError."""
        record = self.record
        log = logfile.find_log(self.log_path, record.device, record.inode, record.offset)
        if log >= 0:
            self.use(log, record.offset)
        else:
            self.use(logfile.open_log(self.log_path))


class Pump:
    """The one path from streams to logs. `pipe` is the logger's private pipe: (reading end, writing end)."""

    def __init__(self, book: journal.Journal, pipe: tuple[int, int]) -> None:
        self.journal = book
        self.outlet, self.inlet = pipe
        self.failing = False  # lines were lost, and no log says so yet
        self.worked = False  # a batch was big enough to leave the heap large
        os.set_blocking(self.outlet, False)
        # Batches come and go: their memory stays until `rest` gives it back, or each would fault it in again.
        linux.libc.mallopt(M_TRIM_THRESHOLD, 4 << 20)
        linux.libc.mallopt(M_MMAP_THRESHOLD, 4 << 20)

    def move(self, container: Container, stream: int, source: int) -> int:
        """One batch from a FIFO or a terminal: the number of bytes, EMPTY or OVER."""
        if not container.log_path:
            return self.discard(source)
        self.journal.begin(container.slot, stream, journal.DATA)
        try:
            size = os.splice(source, self.inlet, journal.BUFFER_SIZE, flags=os.SPLICE_F_NONBLOCK)
        except OSError as error:
            self.journal.idle()
            return nothing(error)
        if size == 0:
            self.journal.idle()
            return OVER
        now = time.time_ns()
        self.worked |= size > SMALL
        self.journal.moved(size, now)
        self.take(size, size)
        self.deliver(container, stream, journal.DATA, size, now)
        return size

    def discard(self, source: int) -> int:
        """Read and forget."""
        try:
            return os.readv(source, [self.journal.buffer])
        except OSError as error:
            return nothing(error)

    def mark(self, container: Container, stream: int, kind: int) -> None:
        """A batch without bytes: lost lines are noted, an open line is closed (CLOSE), the stream is over (END)."""
        now = time.time_ns()
        self.journal.begin(container.slot, stream, kind)
        self.journal.moved(0, now)
        self.deliver(container, stream, kind, 0, now)

    def reopen(self, container: Container) -> None:
        """Go on in a new file at the log path. Raises OSError, with the old file kept."""
        if container.log_path:
            container.use(logfile.open_log(container.log_path))
            self.journal.commit(container.slot, container.record)

    def rest(self) -> None:
        """Nothing has happened for a while: what big batches have left free in the heap goes back to the system."""
        if self.worked:
            linux.libc.malloc_trim(0)
            self.worked = False

    # From MOVED to IDLE

    def take(self, size: int, waiting: int) -> None:
        """Read what is still in the pipe into its place in the buffer."""
        while waiting:
            waiting -= os.readv(self.outlet, [self.journal.buffer[size - waiting : size]])

    def deliver(self, container: Container, stream: int, kind: int, size: int, time_ns: int) -> None:
        """Write the batch in the buffer to the container's log, or count it as lost."""
        record = container.record
        if container.log_path:
            try:
                if container.log < 0:
                    container.find()
                # A log that somebody has cut off goes on at its end, not behind a hole.
                record.offset = min(record.offset, os.fstat(container.log).st_size)
            except OSError as error:
                self.lose(container, stream, kind, size, error)
                return
            self.journal.aim(record.device, record.inode, record.offset)
            self.write(container, stream, kind, size, time_ns)
        else:
            record.ended |= (kind == journal.END) << stream
            self.journal.commit(container.slot, record)

    def write(self, container: Container, stream: int, kind: int, size: int, time_ns: int) -> None:
        """Write at the target, and commit. The bytes depend on nothing but journal, record and container."""
        record = container.record
        bit = 1 << stream
        text, is_open = records(container, stream, kind, self.journal.data(size), time_ns)
        try:
            logfile.write_all(container.log, text, record.offset)
        except OSError as error:
            logfile.cut(container.log, record.offset)
            self.lose(container, stream, kind, size, error)
            return
        record.offset += len(text)
        record.is_open = (record.is_open | bit if is_open else record.is_open & ~bit) & ~(bit << journal.LOST_OPEN)
        record.lost[stream] = 0
        record.ended |= (kind == journal.END) << stream
        self.journal.commit(container.slot, record)

    def lose(self, container: Container, stream: int, kind: int, size: int, error: OSError) -> None:
        """Count what could not be written."""
        record, data = container.record, self.journal.data(size)
        unfinished = kind != journal.DATA and bool(record.is_open >> stream & 1)
        bit = 1 << stream + journal.LOST_OPEN
        counted = bool(data and record.is_open & bit)  # the line that begins the batch, with the batch before
        lines = crilog.count_lines(data) - counted + unfinished
        if data:
            record.is_open = record.is_open & ~bit if data.endswith(b"\n") else record.is_open | bit
        record.lost[stream] = min(record.lost[stream] + lines, journal.MAX_LOST)
        record.error = error.errno or errno.EIO
        self.failing = True
        record.ended |= (kind == journal.END) << stream
        self.journal.commit(container.slot, record)

    # What an earlier logger has begun

    def recover(self, slots: dict[int, Container]) -> None:
        """Go on from the journal's phase. `slots` are all containers with their records."""
        self.failing = any(any(container.record.lost) for container in slots.values())
        pipe = os.fstat(self.outlet).st_ino
        lost = self.journal.pipe not in (0, pipe)
        if self.journal.phase != journal.IDLE:
            container = slots[self.journal.subject()[0]]
            if self.journal.phase == journal.HELD:
                self.write_again(container)
            elif lost:
                self.miss(container)
                self.failing = True
            elif self.journal.phase == journal.MOVING:
                self.move_on(container)
            else:
                self.take_on(container)
        self.journal.pipe = pipe
        while self.waiting():  # of a journal that somebody has removed: nobody can tell whose it is
            os.read(self.outlet, journal.BUFFER_SIZE)

    def move_on(self, container: Container) -> None:
        """In MOVING: the splice has happened if there is something in the pipe."""
        _, stream, kind = self.journal.subject()
        waiting = self.waiting()
        if not waiting:
            self.journal.idle()
            return
        now = time.time_ns()
        self.journal.moved(waiting, now)
        self.take(waiting, waiting)
        self.deliver(container, stream, kind, waiting, now)

    def take_on(self, container: Container) -> None:
        """In MOVED: what the pipe no longer has is in the buffer."""
        _, stream, kind = self.journal.subject()
        size, time_ns = self.journal.amount()
        self.take(size, self.waiting())
        self.deliver(container, stream, kind, size, time_ns)

    def write_again(self, container: Container) -> None:
        """In HELD: the same bytes to the same place; where that file is gone, nobody has seen them yet."""
        _, stream, kind = self.journal.subject()
        size, time_ns = self.journal.amount()
        device, inode, offset = self.journal.target()
        try:
            log = logfile.find_log(container.log_path, device, inode, offset)
        except OSError as error:
            self.lose(container, stream, kind, size, error)
            return
        if log < 0:
            self.journal.aim_again()
            self.deliver(container, stream, kind, size, time_ns)
            return
        container.use(log, offset)
        self.write(container, stream, kind, size, time_ns)

    def miss(self, container: Container) -> None:
        """In MOVING or MOVED, with another pipe: nobody can tell what was in the old one."""
        _, stream, kind = self.journal.subject()
        record = container.record
        record.lost[stream] = min(record.lost[stream] + 1, journal.MAX_LOST)
        record.error = 0
        record.ended |= (kind == journal.END) << stream
        self.journal.commit(container.slot, record)

    def waiting(self) -> int:
        """Bytes in the private pipe."""
        count = bytearray(4)
        fcntl.ioctl(self.outlet, linux.FIONREAD, count, True)
        return int.from_bytes(count, "little")


def records(container: Container, stream: int, kind: int, data: bytes, time_ns: int) -> tuple[bytes, bool]:
    """The text for a batch, with a notice before it of what was lost, and whether the stream's line is open after it."""
    record = container.record
    name = crilog.STREAMS[stream]
    is_open = bool(record.is_open >> stream & 1)
    before = b""
    if record.lost[stream]:
        before = crilog.end_line(time_ns, name) if is_open else b""
        before += crilog.loss_notice(time_ns, name, record.lost[stream], record.error)
        is_open = False
    text, is_open = crilog.format_batch(data, time_ns, name, is_open, container.max_line)
    if kind != journal.DATA and is_open:
        return before + text + crilog.end_line(time_ns, name), False
    return before + text, is_open


def nothing(error: OSError) -> int:
    """What a failed read of a stream means: EMPTY, or OVER for a terminal that nobody has open. Else the error is raised."""
    if error.errno == errno.EAGAIN:
        return EMPTY
    if error.errno == errno.EIO:
        return OVER
    raise error
