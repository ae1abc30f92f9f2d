"""Databases of other versions: brought to this one's schema in one transaction, used by the one before, or refused with what there is to do."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

from tare.errors import FailedPrecondition, InternalError
from tare.state.database import Database
from tare.state.schema import MIGRATIONS, Migration


@dataclass(frozen=True)
class Old:
    name: str


@dataclass(frozen=True)
class New:
    name: str
    colour: str = "none"


class Colour(Enum):
    BLUE = "blue"


@dataclass(frozen=True)
class Painted:
    name: Colour


def colours(database: Database) -> None:
    """A table of the second schema, filled from what the first one has; it may have been done before."""
    database.execute("CREATE TABLE IF NOT EXISTS colours (key TEXT PRIMARY KEY)")
    database.execute("INSERT OR IGNORE INTO colours SELECT key FROM things")


def broken(database: Database) -> None:
    colours(database)
    raise sqlite3.OperationalError("this far and no further")


FIRST: Sequence[Migration] = MIGRATIONS[:1]
SECOND = (*FIRST, Migration(schema=2, oldest=1, apply=colours))
THIRD = (*SECOND, Migration(schema=3, oldest=2, apply=lambda database: None))


def version(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])
    finally:
        connection.close()


def keys(path: Path, migrations: Sequence[Migration]) -> list[tuple[str]]:
    database = Database(path, migrations=migrations)
    try:
        return [(key,) for (key,) in database.execute("SELECT key FROM colours ORDER BY key")]
    finally:
        database.close()


def put(path: Path, key: str, value: Old | New, migrations: Sequence[Migration]) -> None:
    database = Database(path, migrations=migrations)
    try:
        database.table("things", type(value)).put(key, value)
    finally:
        database.close()


def test_up_down_and_up_again(tmp_path: Path) -> None:
    """What the older one has written meanwhile is migrated too, and what the newer one wrote is read by the older one."""
    path = tmp_path / "state.db"
    put(path, "a", Old("one"), FIRST)
    put(path, "b", New("two", "blue"), SECOND)
    assert version(path) == 2 and keys(path, SECOND) == [("a",)]
    older = Database(path, migrations=FIRST)
    assert older.table("things", Old).items() == [("a", Old("one")), ("b", Old("two"))]
    older.close()
    assert version(path) == 1
    put(path, "c", Old("three"), FIRST)
    assert keys(path, SECOND) == [("a",), ("b",), ("c",)]
    newer = Database(path, migrations=SECOND)
    assert newer.table("things", New).get("b") == New("two", "blue") and newer.table("things", New).get("c") == New(
        "three"
    )
    newer.close()


def test_one_that_may_not_be_used_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    put(path, "a", Old("one"), FIRST)
    put(path, "a", Old("one"), THIRD)
    before = path.read_bytes()
    with pytest.raises(FailedPrecondition) as caught:
        Database(path, migrations=FIRST)
    assert str(caught.value) == (
        f"open {path}: a newer Tare has written it (schema 3): it takes one that knows schema 2, this one knows 1"
        " (install the newer one again; to go back, remove all pods with that, and begin with another root directory)"
    )
    assert path.read_bytes() == before and version(path) == 3
    put(path, "b", Old("two"), SECOND)  # down by one works
    with pytest.raises(FailedPrecondition, match="knows 1"):  # and the oldest is still kept out
        Database(path, migrations=FIRST)
    assert keys(path, THIRD) == [("a",)] and version(path) == 3


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    put(path, "a", Old("one"), FIRST)
    with pytest.raises(InternalError, match="this far and no further"):
        Database(path, migrations=(*FIRST, Migration(schema=2, oldest=2, apply=broken)))
    older = Database(path, migrations=FIRST)
    tables = {name for (name,) in older.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    assert older.table("things", Old).items() == [("a", Old("one"))]
    older.close()
    assert not tables & {"colours", "compatibility"} and version(path) == 1


def test_a_document_that_is_not_understood_is_named(tmp_path: Path) -> None:
    put(tmp_path / "state.db", "a", Old("green"), FIRST)
    database = Database(tmp_path / "state.db")
    table = database.table("things", Painted)
    for read in (table.items, lambda: table.get("a")):
        with pytest.raises(InternalError, match=r"read a from the table things of .*newer Tare"):
            read()
    database.close()
