"""Two SQLite files: `state.db` under the root directory survives a reboot, `boot.db` under the run directory does not.

Both are key–value tables of JSON documents, decoded into the frozen dataclass that the caller names; the few things that
need an index of their own (address leases) add a table by `Database.script`. Calls are synchronous: a put takes some 0.04 ms,
because nothing on a pod's path waits for the disk (WAL, synchronous=NORMAL). Checkpoints, which do wait, run in a thread
of their caller's choosing (`checkpoint`). `boot.db` is stamped with the kernel's boot ID and is emptied when it differs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from tare.errors import InternalError

T = TypeVar("T")
SCHEMA_VERSION = 1
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Database:
    """One SQLite file. Used from one thread; transactions nest (the outermost commits)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "wal_autocheckpoint=0", "busy_timeout=5000"):
                self._connection.execute(f"PRAGMA {pragma}").close()
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version > SCHEMA_VERSION:
                raise InternalError(
                    f"open {path}",
                    cause=f"it was written by a newer Tare (schema {version}, this one knows {SCHEMA_VERSION})",
                )
            self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        except sqlite3.Error as error:
            raise InternalError(f"open {path}", cause=error, hint="is the disk full or the file damaged?") from error
        self._depth = 0

    def script(self, sql: str) -> None:
        """Create a caller's own tables (statements must be idempotent)."""
        self._connection.executescript(sql)

    def table(self, name: str, kind: type[T]) -> Table[T]:
        """The documents of one kind, made if absent."""
        return Table(self, name, kind)

    def execute(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        return self._connection.execute(sql, parameters).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the statements within, or none."""
        if self._depth == 0:
            self._connection.execute("BEGIN IMMEDIATE")
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth -= 1
            if self._depth == 0:
                self._connection.execute("ROLLBACK")
            raise
        self._depth -= 1
        if self._depth == 0:
            self._connection.execute("COMMIT")

    def close(self) -> None:
        """Close the file; what was put is already safe."""
        self._connection.close()


class Table(Generic[T]):
    """Documents by key, kept as JSON."""

    def __init__(self, database: Database, name: str, kind: type[T]) -> None:
        assert name.isidentifier()
        self._database = database
        self._name = name
        self._decoder = msgspec.json.Decoder(kind)
        self._encode = msgspec.json.Encoder().encode
        database.script(f"CREATE TABLE IF NOT EXISTS {name} (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")

    def put(self, key: str, value: T) -> None:
        """Write, over what was there."""
        self._database.execute(f"INSERT OR REPLACE INTO {self._name} VALUES (?, ?)", (key, self._encode(value)))

    def get(self, key: str) -> T | None:
        """The document, or None."""
        rows = self._database.execute(f"SELECT value FROM {self._name} WHERE key = ?", (key,))
        return self._decoder.decode(rows[0][0]) if rows else None

    def delete(self, key: str) -> None:
        """Remove it if it is there."""
        self._database.execute(f"DELETE FROM {self._name} WHERE key = ?", (key,))

    def items(self) -> list[tuple[str, T]]:
        """Everything, by key."""
        rows = self._database.execute(f"SELECT key, value FROM {self._name} ORDER BY key")
        return [(key, self._decoder.decode(value)) for key, value in rows]


def checkpoint(path: Path) -> None:
    """Bring a database's log into its file; slow where the disk is, so to be called from a thread."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    finally:
        connection.close()


def boot_id() -> str:
    """The kernel's ID of this boot."""
    return BOOT_ID.read_text().strip()


def open_boot(path: Path) -> Database:
    """`boot.db`, emptied if it speaks of an earlier boot."""
    stamp = boot_id()
    database = Database(path)
    database.script("CREATE TABLE IF NOT EXISTS boot (id TEXT NOT NULL)")
    rows = database.execute("SELECT id FROM boot")
    if rows and rows[0][0] == stamp:
        return database
    if rows:
        database.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        database = Database(path)
        database.script("CREATE TABLE IF NOT EXISTS boot (id TEXT NOT NULL)")
    database.execute("INSERT INTO boot VALUES (?)", (stamp,))
    return database
