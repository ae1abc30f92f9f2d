"""The logger's journal: what a successor needs to go on where a SIGKILL fell, at whatever instruction.

It is a file under the run directory, shared memory for the one logger of its group, which holds a lock on it. Nothing is
synced: it is to outlive a process, not the machine. Little endian, version 1:

        0 ┌────────────────────────────────────────────────────────────┐
          │ version u32 (0: not yet made), inode of the pipe u64       │
       16 │ phase u8: storing this one byte is what commits            │
       24 │ batch    slot u16, stream u8, kind u8, size u32, time i64  │ valid from MOVING (size and time from MOVED)
       40 │ target   device u64, inode u64, offset u64                 │ valid in HELD
       64 │ redo     slot u64, record                                  │ valid in REDO
     4096 │ buffer: the batch's bytes                                  │ valid in HELD, and in MOVED but for what the pipe has
    69632 │ records, one for each slot, 64 bytes                       │
          └────────────────────────────────────────────────────────────┘

A batch goes through all phases; a change of a record alone takes REDO only:

    IDLE ─begin─► MOVING ─moved─► MOVED ──aim──► HELD ─commit─► REDO ─► IDLE
          splice container's FIFO   read pipe into    write into   copy redo
          into the private pipe     the buffer        the log at   into the
                                                      the target   slot
          known again by            the pipe says     same bytes,  copied
          a successor: FIONREAD     what is missing   same place   again

Which container a slot is, stands in a file of its own beside the journal (`slots`); a record is in use only while that exists.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import signal
import struct

VERSION = 1
IDLE, MOVING, MOVED, HELD, REDO = range(5)
DATA, CLOSE, END = range(3)  # kinds of batch: bytes; none, but an open line is closed; the same, and the stream is over

BUFFER_SIZE = 65536
SLOTS = 512  # containers of one logger
MAX_LOST = 0xFFFFFFFF
LOST_OPEN = 2  # how far above a stream's bit in `is_open` its other one is

_VERSION = struct.Struct("<I")
_PIPE = struct.Struct("<Q")
_SUBJECT = struct.Struct("<HBB")
_AMOUNT = struct.Struct("<Iq")
_TARGET = struct.Struct("<QQQ")
_SLOT = struct.Struct("<Q")
_RECORD = struct.Struct("<BBBxIIIQQQ")
_FLOCK = struct.Struct("@hhqqi4x")

_AT_VERSION, _AT_PIPE, _AT_PHASE, _AT_SUBJECT, _AT_AMOUNT, _AT_TARGET, _AT_REDO = 0, 4, 16, 24, 28, 40, 64
_BUFFER = 4096
_RECORDS = _BUFFER + BUFFER_SIZE
_RECORD_SIZE = 64
_SIZE = _RECORDS + SLOTS * _RECORD_SIZE


class Record:
    """How far the log of one container is. `is_open` and `ended` have a bit for each stream; `lost` counts lines, `error` says why.

    Another bit of `is_open`, LOST_OPEN higher, says that the last of the lost lines goes on.
    """

    __slots__ = ("device", "ended", "error", "inode", "is_open", "lost", "offset", "used")

    def __init__(self) -> None:
        self.used = False
        self.is_open = 0
        self.ended = 0
        self.error = 0
        self.lost = [0, 0]
        self.device = 0
        self.inode = 0
        self.offset = 0

    def pack(self) -> bytes:
        """64 bytes at most."""
        return _RECORD.pack(
            self.used, self.is_open, self.ended, self.error, *self.lost, self.device, self.inode, self.offset
        )

    @classmethod
    def unpack(cls, memory: mmap.mmap | bytes, offset: int = 0) -> Record:
        """The record that `pack` made."""
        record = cls()
        (used, record.is_open, record.ended, record.error, *record.lost, record.device, record.inode, record.offset) = (
            _RECORD.unpack_from(memory, offset)
        )
        record.used = bool(used)
        return record


class Journal:
    """The journal at `path`, made if absent, locked against any other logger."""

    def __init__(self, path: bytes) -> None:
        self.path = path
        self.file = lock(path)
        check_version(self.file, path)
        os.ftruncate(self.file, _SIZE)
        # Room beforehand: a full file system would otherwise show as SIGBUS.
        os.posix_fallocate(self.file, 0, _RECORDS)
        self.memory = mmap.mmap(self.file, _SIZE)
        self.buffer = memoryview(self.memory)[_BUFFER:_RECORDS]
        _VERSION.pack_into(self.memory, _AT_VERSION, VERSION)

    # One batch

    def begin(self, slot: int, stream: int, kind: int) -> None:
        """Something is about to be moved into the pipe for this stream."""
        _SUBJECT.pack_into(self.memory, _AT_SUBJECT, slot, stream, kind)
        self.memory[_AT_PHASE] = MOVING

    def moved(self, size: int, time_ns: int) -> None:
        """So many bytes are in the pipe, and this is their time."""
        _AMOUNT.pack_into(self.memory, _AT_AMOUNT, size, time_ns)
        self.memory[_AT_PHASE] = MOVED

    def aim(self, device: int, inode: int, offset: int) -> None:
        """All bytes are in the buffer, and this is where their records go."""
        _TARGET.pack_into(self.memory, _AT_TARGET, device, inode, offset)
        self.memory[_AT_PHASE] = HELD

    def aim_again(self) -> None:
        """The target is no longer there: back to MOVED, with all bytes in the buffer."""
        self.memory[_AT_PHASE] = MOVED

    def commit(self, slot: int, record: Record) -> None:
        """Replace a slot's record, and the batch is done."""
        entry = _SLOT.pack(slot) + record.pack()
        self.memory[_AT_REDO : _AT_REDO + len(entry)] = entry
        self.memory[_AT_PHASE] = REDO
        self.redo()

    def redo(self) -> None:
        """Copy the new record to its slot, however often."""
        slot = _SLOT.unpack_from(self.memory, _AT_REDO)[0]
        source = _AT_REDO + _SLOT.size
        target = _RECORDS + slot * _RECORD_SIZE
        self.memory[target : target + _RECORD.size] = self.memory[source : source + _RECORD.size]
        self.memory[_AT_PHASE] = IDLE

    def idle(self) -> None:
        """Nothing was moved after all."""
        self.memory[_AT_PHASE] = IDLE

    # What a successor reads

    @property
    def phase(self) -> int:
        """IDLE, MOVING, MOVED, HELD or REDO."""
        return self.memory[_AT_PHASE]

    def subject(self) -> tuple[int, int, int]:
        """(slot, stream, kind) of the batch."""
        slot, stream, kind = _SUBJECT.unpack_from(self.memory, _AT_SUBJECT)
        return slot, stream, kind

    def amount(self) -> tuple[int, int]:
        """(bytes, time in ns) of the batch."""
        size, time_ns = _AMOUNT.unpack_from(self.memory, _AT_AMOUNT)
        return size, time_ns

    def target(self) -> tuple[int, int, int]:
        """(device, inode, offset) that the batch's records go to."""
        device, inode, offset = _TARGET.unpack_from(self.memory, _AT_TARGET)
        return device, inode, offset

    def data(self, size: int) -> bytes:
        """A copy of the first bytes of the buffer."""
        return self.memory[_BUFFER : _BUFFER + size]

    def reserve(self, slot: int) -> None:
        """Make room for a slot's record. Raises OSError where the run directory's file system is full."""
        os.posix_fallocate(self.file, _RECORDS + slot * _RECORD_SIZE, _RECORD_SIZE)

    def record(self, slot: int) -> Record:
        """A slot's record; room for it must have been reserved."""
        return Record.unpack(self.memory, _RECORDS + slot * _RECORD_SIZE)

    @property
    def pipe(self) -> int:
        """The inode of the pipe that batches go through; 0: none yet."""
        inode: int = _PIPE.unpack_from(self.memory, _AT_PIPE)[0]
        return inode

    @pipe.setter
    def pipe(self, inode: int) -> None:
        _PIPE.pack_into(self.memory, _AT_PIPE, inode)

    def remove(self) -> None:
        """Take the file away: there is nothing to go on with."""
        os.unlink(self.path)


def lost_lines(path: str, slots: list[int]) -> int | None:
    """How many lines of these containers are lost and not yet told in their logs; None in a journal of another version.

    For others than the logger. Raises FileNotFoundError.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if int.from_bytes(os.pread(file, 4, _AT_VERSION), "little") != VERSION:
            return None
        found = (os.pread(file, _RECORD_SIZE, _RECORDS + slot * _RECORD_SIZE) for slot in slots)
        return sum(sum(Record.unpack(data).lost) for data in found if len(data) == _RECORD_SIZE)
    finally:
        os.close(file)


def check(path: bytes) -> None:
    """Raises OSError where there is a journal at `path` that this code does not understand."""
    if not os.path.lexists(path):
        return
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        check_version(file, path)
    finally:
        os.close(file)


def check_version(file: int, path: bytes) -> None:
    version = int.from_bytes(os.pread(file, 4, 0), "little")
    if version not in (0, VERSION):
        raise OSError(errno.EPROTO, f"journal of version {version}, not {VERSION}", path)


def lock(path: bytes) -> int:
    """The file at `path`, locked. Who holds the lock is a logger that lost its launcher and its socket: it is killed.

    That loses nothing (see above). Raises TimeoutError where it does not end, as when its disk blocks.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            supersede(file)
        else:
            if os.path.lexists(path) and os.stat(path).st_ino == os.fstat(file).st_ino:
                return file
        os.close(file)


def supersede(file: int, patience: float = 5.0) -> None:
    """Kill the process that holds the lock on a file, and wait for its end, for so many seconds."""
    holder = lock_holder(file)
    if not holder:
        return
    try:
        pidfd = os.pidfd_open(holder)
    except ProcessLookupError:
        return
    try:
        if lock_holder(file) != holder:  # the PID may be another's by now
            return
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        if not select.select([pidfd], [], [], patience)[0]:
            raise TimeoutError(errno.ETIMEDOUT, f"the logger that holds this journal (PID {holder}) does not end")
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


def lock_holder(file: int) -> int:
    """The PID that keeps us from locking a file, or 0."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))
    return 0 if kind == fcntl.F_UNLCK else pid
