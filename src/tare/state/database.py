"""Two SQLite files: `state.db` under the root directory survives a reboot, `boot.db` under the run directory does not.

Both are key–value tables of JSON documents, decoded into the frozen dataclass that the caller names; the few things that
need an index of their own (address leases) add a table by `Database.script`. Calls are synchronous: a put takes some 0.04 ms,
because nothing on a pod's path waits for the disk (WAL, synchronous=NORMAL). Checkpoints, which do wait, run in a thread
of their caller's choosing (`checkpoint`). `boot.db` is stamped with the kernel's boot ID and is emptied when it differs. Files of other
versions of Tare are `schema`'s business.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from tare.errors import InternalError
from tare.state.file import File, nothing
from tare.state.schema import MIGRATIONS, Migration, migrate

T = TypeVar("T")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Database:
    """One SQLite file. Used from one thread; transactions nest (the outermost commits). `relief` and `refuge` are as `File` has them.

    Raises FailedPrecondition where a newer Tare keeps this one from using it, InternalError.
    """

    def __init__(
        self,
        path: Path,
        relief: Callable[[], bool] = nothing,
        refuge: Path | None = None,
        migrations: Sequence[Migration] = MIGRATIONS,
    ) -> None:
        self._depth = 0
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = File(path, relief, refuge)
            try:
                migrate(self, migrations)
            except BaseException:
                self._file.close()
                raise
        except sqlite3.Error as error:
            raise InternalError(f"open {path}", cause=error, hint="is the disk full or the file damaged?") from error

    @property
    def path(self) -> Path:
        """The file that is written now."""
        return self._file.path

    def look_after(self) -> None:
        """Now and then: the file's own place is used again where it can be, and room is kept in it."""
        self._file.go_home()
        self._file.keep_room()

    def script(self, sql: str) -> None:
        """Create a caller's own tables (statements must be idempotent)."""
        self._file.script(sql)

    def table(self, name: str, kind: type[T]) -> Table[T]:
        """The documents of one kind, made if absent."""
        return Table(self, name, kind)

    def execute(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """Run one statement and return its rows."""
        return self._file.execute(sql, parameters)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of the statements within, or none."""
        if self._depth == 0:
            self._file.begin()
        self._depth += 1
        try:
            yield
        except BaseException:
            self._depth -= 1
            if self._depth == 0:
                self._file.rollback()
            raise
        self._depth -= 1
        if self._depth == 0:
            try:
                self._file.commit()
            except BaseException:
                self._file.rollback()
                raise

    def close(self) -> None:
        """Close the file; what was put is already safe."""
        self._file.close()


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
        return self._decode(key, rows[0][0]) if rows else None

    def delete(self, key: str) -> None:
        """Remove it if it is there."""
        self._database.execute(f"DELETE FROM {self._name} WHERE key = ?", (key,))

    def items(self) -> list[tuple[str, T]]:
        """Everything, by key."""
        rows = self._database.execute(f"SELECT key, value FROM {self._name} ORDER BY key")
        return [(key, self._decode(key, value)) for key, value in rows]

    def _decode(self, key: str, value: bytes) -> T:
        """Raises InternalError for a document that this code does not understand."""
        try:
            return self._decoder.decode(value)
        except msgspec.DecodeError as error:
            doing = f"read {key} from the table {self._name} of {self._database.path}"
            raise InternalError(doing, cause=error, hint="has a newer Tare written it?") from error


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


def open_boot(path: Path, relief: Callable[[], bool] = nothing) -> Database:
    """`boot.db`, emptied if it speaks of an earlier boot."""
    stamp = boot_id()
    database = Database(path, relief)
    database.script("CREATE TABLE IF NOT EXISTS boot (id TEXT NOT NULL)")
    rows = database.execute("SELECT id FROM boot")
    if rows and rows[0][0] == stamp:
        return database
    if rows:
        database.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
        database = Database(path, relief)
        database.script("CREATE TABLE IF NOT EXISTS boot (id TEXT NOT NULL)")
    database.execute("INSERT INTO boot VALUES (?)", (stamp,))
    return database
