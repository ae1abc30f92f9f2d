"""Five thousand containers that have ended, as a real daemon lists them."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root
COUNT = 5000
LIST_SECONDS = 0.1


@contextmanager
def crowded(node: Node, container: str) -> Iterator[list[str]]:
    """So many copies of an ended container on record: their IDs. They go again, daemon restarts included."""
    copies = [os.urandom(32).hex() for _ in range(COUNT)]
    node.daemon.stop()
    multiply(node.daemon.root / "state.db", container, copies)
    node.daemon.start()
    try:
        yield copies
    finally:
        node.daemon.stop()
        with closing(sqlite3.connect(node.daemon.root / "state.db")) as database, database:
            for table in ("containers", "plans"):
                database.executemany(f"DELETE FROM {table} WHERE key = ?", [(copy,) for copy in copies])
        node.daemon.start()


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


def test_five_thousand_are_listed_at_once_and_streamed_in_pieces() -> None:
    with busy_node("many") as node:
        pod = node.run_pod("many")
        first = node.start(node.create(pod, "main", "true"))
        node.wait(first)
        client = node.daemon.client
        with crowded(node, first) as copies:
            expected = [*copies[::-1], first]
            times, pods = [], []
            for _ in range(5):
                began = time.perf_counter()
                listed = client.call(client.runtime.ListContainers, pb.ListContainersRequest()).containers
                times.append(time.perf_counter() - began)
                began = time.perf_counter()
                client.pods()
                pods.append(time.perf_counter() - began)
            assert [item.id for item in listed] == expected
            assert min(times) < LIST_SECONDS and min(pods) < LIST_SECONDS, (times, pods)
            parts = [part.containers for part in client.runtime.StreamContainers(pb.StreamContainersRequest())]
            assert [item.id for part in parts for item in part] == expected
            assert len(parts) > 10 and max(map(len, parts)) <= 250
            half = pb.ContainerFilter(label_selector={"half": "1"}, pod_sandbox_id=pod)
            half.state.state = pb.CONTAINER_EXITED
            found = client.call(client.runtime.ListContainers, pb.ListContainersRequest(filter=half)).containers
            assert [item.id for item in found] == copies[1::2][::-1]
            half.id = copies[0]
            assert not client.call(client.runtime.ListContainers, pb.ListContainersRequest(filter=half)).containers
