"""What both databases say, read as a stranger would: from their files, without writing to them, beside a daemon or without one.

Facts of another boot say nothing of this one and are left out.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tare.errors import InternalError
from tare.images.records import Expected, ImageRecord, LayerRecord
from tare.network.attach import Remembered
from tare.runtime.records import ContainerRecord, PodRecord
from tare.runtime.store import ContainerFacts, Offer, Plan, PodFacts
from tare.state.database import boot_id
from tare.state.operations import Intent

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lease:
    """An address that a pod holds."""

    network: str
    address: str
    pod_id: str


@dataclass(frozen=True, slots=True)
class HeldPort:
    """A row of the ports that lead to pods, as `network.hostports` keeps it."""

    host: str
    protocol: str
    port: int
    target: str
    target_port: int
    pod_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """All that is on record. `networks` are bridges by name, `intents` operations under way by their keys."""

    pods: Mapping[str, PodRecord] = field(default_factory=dict)
    containers: Mapping[str, ContainerRecord] = field(default_factory=dict)
    plans: Mapping[str, Plan] = field(default_factory=dict)
    images: Mapping[str, ImageRecord] = field(default_factory=dict)
    layers: Mapping[str, LayerRecord] = field(default_factory=dict)
    expected: Mapping[str, Expected] = field(default_factory=dict)
    networks: Mapping[str, Remembered] = field(default_factory=dict)
    leases: tuple[Lease, ...] = ()
    ports: tuple[HeldPort, ...] = ()
    by_plugins: frozenset[str] = frozenset()
    pod_facts: Mapping[str, PodFacts] = field(default_factory=dict)
    container_facts: Mapping[str, ContainerFacts] = field(default_factory=dict)
    offers: Mapping[str, Offer] = field(default_factory=dict)
    intents: Mapping[str, Intent] = field(default_factory=dict)


def read(root: Path, run: Path) -> Records:
    """The records of an instance; empty ones where it has never run. Raises InternalError for a database that cannot be read."""
    found: dict[str, Any] = {}
    with database(root / "state.db") as state:
        if state is not None:
            found |= lasting(state)
    with database(run / "boot.db") as boot:
        if boot is not None and rows(boot, "SELECT id FROM boot") == [(boot_id(),)]:
            found |= of_boot(boot)
    return Records(**found)


def lasting(state: sqlite3.Connection) -> dict[str, Any]:
    """The fields that state.db has."""
    held = rows(state, "SELECT network, address, pod_id FROM leases WHERE released_at IS NULL")
    ports = rows(state, "SELECT host, protocol, port, target, target_port, pod_id FROM ports")
    return {
        "pods": table(state, "pods", PodRecord),
        "containers": table(state, "containers", ContainerRecord),
        "plans": table(state, "plans", Plan),
        "images": table(state, "images", ImageRecord),
        "layers": table(state, "layers", LayerRecord),
        "expected": table(state, "expected", Expected),
        "networks": table(state, "networks", Remembered),
        "leases": tuple(Lease(*row) for row in held),
        "ports": tuple(HeldPort(*row) for row in ports),
        "by_plugins": frozenset(key for (key,) in rows(state, "SELECT key FROM cni_attachments")),
    }


def of_boot(boot: sqlite3.Connection) -> dict[str, Any]:
    """The fields that boot.db has."""
    return {
        "pod_facts": table(boot, "pod_facts", PodFacts),
        "container_facts": table(boot, "container_facts", ContainerFacts),
        "offers": table(boot, "offers", Offer),
        "intents": table(boot, "intents", Intent),
    }


@contextmanager
def database(path: Path) -> Iterator[sqlite3.Connection | None]:
    """A connection that can only read; None where there is no such file."""
    if not path.exists():
        yield None
        return
    try:
        with closing(connect(path)) as connection:
            connection.execute("BEGIN")  # all that is read is of one moment
            yield connection
    except (sqlite3.Error, msgspec.MsgspecError) as error:
        raise InternalError(f"read {path}", cause=error, hint="is the file damaged, or of a newer Tare?") from error


def connect(path: Path) -> sqlite3.Connection:
    """As the daemon's neighbour; where the file system is read-only and no log is left, the file is all there is."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None, timeout=5.0)
    try:
        connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone()
    except sqlite3.OperationalError:
        connection.close()
        return sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True, isolation_level=None)
    return connection


def rows(connection: sqlite3.Connection, sql: str) -> list[tuple[Any, ...]]:
    """The answer; none where an older daemon had no such table."""
    try:
        return connection.execute(sql).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise


def table(connection: sqlite3.Connection, name: str, kind: type[T]) -> dict[str, T]:
    """Documents by key."""
    decoder = msgspec.json.Decoder(kind)
    return {key: decoder.decode(value) for key, value in rows(connection, f"SELECT key, value FROM {name}")}
