"""One SQLite file that is written to for as long as anything can be: with a full disk, and with a file system that has become read-only.

    full         its log is brought into the file, so that it begins anew in the space that it has; then `relief` is asked to free some
    read-only    a copy in `refuge` (another file system) takes its place; it goes home when that can be written again

What ends things, or notes how they ended, has a right to that relief; what begins new ones has not (`BEGINS`): it would use up
what is kept for the others. A transaction that the file would not take is done again, statement by statement, on what takes it.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tare.errors import ResourceExhausted

log = logging.getLogger(__name__)
BEGINS: ContextVar[bool] = ContextVar("begins", default=False)
PRAGMAS = ("journal_mode=WAL", "synchronous=NORMAL", "wal_autocheckpoint=0", "busy_timeout=5000")
ROOM = 1 << 20  # bytes that file and log have free from the beginning
PRIMARY = 0xFF  # of an error code, without what SQLite adds to it
Statement = tuple[str, tuple[Any, ...]]


class DiskFull(ResourceExhausted):
    """A database could not be written for want of room, or of a file system that takes anything."""


def nothing() -> bool:
    """No relief."""
    return False


class File:
    """The file at `home`, or the copy that stands in for it. Used from one thread. Raises sqlite3.Error, and DiskFull in its place."""

    def __init__(self, home: Path, relief: Callable[[], bool] = nothing, refuge: Path | None = None) -> None:
        self.home = home
        self.path = home
        self._relief = relief
        self._refuge = refuge
        self._statements: list[Statement] | None = None
        self._connection = self._settle()

    @property
    def away(self) -> bool:
        """Whether a copy stands in for the file."""
        return self.path != self.home

    def _settle(self) -> sqlite3.Connection:
        if self._refuge is not None and read_only(self.home):
            return self._leave()
        if self._refuge is not None and self._refuge.exists():
            bring_home(self._refuge, self.home)
        try:
            return connect(self.home)
        except sqlite3.OperationalError as error:
            if not full(error) or not self._relief():
                raise
            return connect(self.home)

    def _leave(self) -> sqlite3.Connection:
        """Go on with a copy; one that an earlier daemon went on with is newer than the file."""
        assert self._refuge is not None
        if not self._refuge.exists() and self.home.exists():
            for end in ("-wal", ""):  # the file last: a copy that is there is whole
                source = Path(f"{self.home}{end}")
                if source.exists():
                    shutil.copyfile(source, f"{self._refuge}{end}")
        log.warning("%s is on a file system that is read-only: %s stands in for it", self.home, self._refuge)
        self.path = self._refuge
        return connect(self.path)

    def go_home(self) -> None:
        """Use the file itself again, if it can be written again. Blocks for as long as copying takes."""
        if not self.away or self._statements is not None or read_only(self.home):
            return
        self._connection.close()
        bring_home(self.path, self.home)
        self.path = self.home
        self._connection = connect(self.home)
        log.warning("%s can be written again", self.home)

    def keep_room(self) -> None:
        """As `reserve`. Blocks for as long as writing that much takes, where it has to be."""
        if self._statements is None:
            reserve(self._connection)

    # Statements

    def execute(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """One statement, and its rows."""
        if self._statements is not None:
            self._statements.append((sql, parameters))
        try:
            return self._connection.execute(sql, parameters).fetchall()
        except sqlite3.OperationalError as error:
            return self._again(error)[-1] if self._statements else self._once_more(error, sql, parameters)

    def _once_more(
        self, error: sqlite3.OperationalError, sql: str, parameters: tuple[Any, ...]
    ) -> list[tuple[Any, ...]]:
        for remedy in self._remedies(error):
            if remedy():
                try:
                    return self._connection.execute(sql, parameters).fetchall()
                except sqlite3.OperationalError as again:
                    error = again
        raise self._refusal(error)

    def script(self, sql: str) -> None:
        """Statements that may be repeated."""
        try:
            self._connection.executescript(sql)
        except sqlite3.OperationalError as error:
            if not any(remedy() for remedy in self._remedies(error)):
                raise self._refusal(error) from error
            self._connection.executescript(sql)

    def begin(self) -> None:
        """A transaction begins."""
        self._connection.execute("BEGIN IMMEDIATE")
        self._statements = []

    def commit(self) -> None:
        """It is done."""
        try:
            self._connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            self._again(error, "COMMIT")
        self._statements = None

    def rollback(self) -> None:
        """It is not. (SQLite does so itself where the disk is full.)"""
        self._statements = None
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def _again(self, error: sqlite3.OperationalError, *last: str) -> list[list[tuple[Any, ...]]]:
        """All of the transaction so far, from its beginning, once there is room, and `last`: what each statement came to."""
        statements: list[Statement] = [*(self._statements or ()), *((sql, ()) for sql in last)]
        for remedy in self._remedies(error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if not remedy():
                continue
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                return [self._connection.execute(*statement).fetchall() for statement in statements]
            except sqlite3.OperationalError as again:
                error = again
        raise self._refusal(error)

    def _remedies(self, error: sqlite3.OperationalError) -> list[Callable[[], bool]]:
        """What can be tried, in turn."""
        if self._refuge is not None and not self.away and unwritable(error) and read_only(self.home):
            return [self._move]
        if not full(error):
            return []
        return [self._rewind] if BEGINS.get() else [self._rewind, self._relief]

    def _move(self) -> bool:
        self._connection.close()
        self._connection = self._leave()
        return True

    def _rewind(self) -> bool:
        """Let the log begin anew where it lies; whether that could be done."""
        if self._connection.in_transaction:
            return False
        try:
            ((busy, *_),) = self._connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
        except sqlite3.OperationalError:
            return False
        return not busy

    def _refusal(self, error: sqlite3.OperationalError) -> Exception:
        if not full(error) and not unwritable(error):
            return error
        refusal = DiskFull(f"write {self.path}", cause=str(error))
        refusal.__cause__ = error
        return refusal

    def close(self) -> None:
        """What was put is already safe."""
        self._connection.close()


def connect(path: Path) -> sqlite3.Connection:
    """A connection with the settings that the file has in Tare, and some room of its own."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").close()
        reserve(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def reserve(connection: sqlite3.Connection, room: int = ROOM) -> None:
    """Have so many bytes free within the file and its log, for records to come: written once, and given back to SQLite.

    Both keep their length then, so that records can be written, and the log brought into the file, on a disk that has no room.
    A disk that has none already is met by whoever writes.
    """
    ((free,),), ((size,),) = (
        connection.execute(f"PRAGMA {name}").fetchall() for name in ("freelist_count", "page_size")
    )
    if free * size > room // 2 or connection.in_transaction:
        return
    try:
        connection.execute("CREATE TABLE IF NOT EXISTS room (kept BLOB)")
        connection.execute("INSERT INTO room VALUES (zeroblob(?))", (room,))
        connection.execute("DROP TABLE room")
        connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    except sqlite3.OperationalError as error:
        log.info("no room is kept for records: %s", error)


def bring_home(copy: Path, home: Path) -> None:
    """What the copy says is what the file says; then the copy goes."""
    source, target = sqlite3.connect(copy), sqlite3.connect(home)
    try:
        source.backup(target)
    finally:
        source.close()
        target.close()
    for end in ("", "-wal", "-shm"):  # the file first: its log alone is nothing
        Path(f"{copy}{end}").unlink(missing_ok=True)


def read_only(path: Path) -> bool:
    """Whether the file system that a path is on takes no writes.

    It is tried, by setting a time to what it is: one that the kernel has shut because of an error of its disk is not marked as read-only.
    """
    place = path if path.exists() else path.parent
    try:
        times = os.stat(place)
        os.utime(place, ns=(times.st_atime_ns, times.st_mtime_ns))
    except OSError as error:
        return error.errno == errno.EROFS
    return False


def full(error: sqlite3.OperationalError) -> bool:
    """Whether there is no room (a log or a shared-memory file that cannot grow is an I/O error to SQLite)."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code & PRIMARY in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


def unwritable(error: sqlite3.OperationalError) -> bool:
    """Whether the file system takes no writes."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code & PRIMARY in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
