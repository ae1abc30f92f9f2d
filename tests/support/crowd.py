"""Thousands of containers that have ended, as rows that the daemon itself has written for one of them."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.support.daemon import Daemon


@contextmanager
def crowded(daemon: Daemon, container: str, count: int) -> Iterator[list[str]]:
    """So many copies of an ended container on record: their IDs. They go again, daemon restarts included."""
    copies = [os.urandom(32).hex() for _ in range(count)]
    daemon.stop()
    multiply(daemon.root / "state.db", container, copies)
    daemon.start()
    try:
        yield copies
    finally:
        daemon.stop()
        with closing(sqlite3.connect(daemon.root / "state.db")) as database, database:
            for table in ("containers", "plans"):
                database.executemany(f"DELETE FROM {table} WHERE key = ?", [(copy,) for copy in copies])
        daemon.start()


def multiply(path: Path, container: str, copies: list[str]) -> None:
    """Rows as the daemon writes them, under other IDs and names."""
    with closing(sqlite3.connect(path)) as database, database:
        (row,) = database.execute("SELECT value FROM containers WHERE key = ?", (container,)).fetchone()
        (plan,) = database.execute("SELECT value FROM plans WHERE key = ?", (container,)).fetchone()
        record = json.loads(row)
        for number, copy in enumerate(copies):
            record |= {"id": copy, "created_at": record["created_at"] + 1}
            record["config"]["metadata"]["attempt"] = number + 1
            record["config"]["labels"] = {"half": str(number % 2), "io.kubernetes.container.name": "main"}
            database.execute("INSERT INTO containers VALUES (?, ?)", (copy, json.dumps(record).encode()))
            database.execute("INSERT INTO plans VALUES (?, ?)", (copy, plan))
