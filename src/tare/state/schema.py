"""Versions of the databases: how a file comes to the schema of this code, and which code may use it.

A file has the number of the schema that it is of (`user_version`), and says which is the oldest schema whose code may still use it. An older Tare,
after a downgrade, opens what it may use, and leaves its own number there: so the newer one, next time, goes through its migrations
once more. All that are missing are one transaction, and each does no harm where it has been done before.

A document is read with the fields that the reader knows; what an older Tare does not know is lost when that writes it. So a field that is added
has a default, and one version passes between no longer writing a field and no longer reading it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tare.errors import FailedPrecondition

if TYPE_CHECKING:
    from tare.state.database import Database

FIRST = 1
SAYS = "SELECT 1 FROM sqlite_master WHERE name = 'compatibility'"


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """How a file comes to `schema` from the one before, and the oldest schema whose code may use it afterwards. It may find its work done."""

    schema: int
    oldest: int
    apply: Callable[[Database], None]


def nothing(database: Database) -> None:
    """Tables are made by whom they belong to."""


MIGRATIONS = (Migration(schema=FIRST, oldest=FIRST, apply=nothing),)


def migrate(database: Database, migrations: Sequence[Migration]) -> None:
    """Bring a file to the schema of the last of the migrations, or leave it as it was. What is of that schema is not written to.

    Raises FailedPrecondition where a newer Tare's schema keeps this one from using it, sqlite3.Error.
    """
    known = migrations[-1].schema
    ((version,),) = database.execute("PRAGMA user_version")
    oldest = oldest_allowed(database)
    if oldest > known:
        cause = f"a newer Tare has written it (schema {version}): it takes one that knows schema {oldest}, this one knows {known}"
        hint = (
            "install the newer one again; to go back, remove all pods with that, and begin with another root directory"
        )
        raise FailedPrecondition(f"open {database.path}", cause=cause, hint=hint)
    if version == known:
        return
    with database.transaction():
        for migration in migrations:
            if migration.schema > version:
                migration.apply(database)
                oldest = max(oldest, migration.oldest)
        if oldest > FIRST:
            database.execute("CREATE TABLE IF NOT EXISTS compatibility (oldest INTEGER NOT NULL)")
            database.execute("DELETE FROM compatibility")
            database.execute("INSERT INTO compatibility VALUES (?)", (oldest,))
        database.execute(f"PRAGMA user_version={known}")


def oldest_allowed(database: Database) -> int:
    """The oldest schema whose code may use the file. It is not said where the first one may."""
    if not database.execute(SAYS):
        return FIRST
    ((oldest,),) = database.execute("SELECT max(oldest) FROM compatibility")
    return int(oldest)
