"""A daemon whose pods' links, addresses and rules are in a network namespace that the test has: a node of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.support.daemon import Daemon
from tests.support.netns import Namespace
from tests.support.node import Node


class PlacedNode(Node):
    """A node without images, whose network is that of `place`."""

    def __init__(self, daemon: Daemon, place: Namespace) -> None:
        super().__init__(daemon, "")
        self.place = place

    def links(self) -> list[str]:
        """What the instance has there for pods."""
        found = self.place.sh("ip -o link").splitlines()
        return [line for line in found if f"{self.daemon.run.resolve()} " in line]

    def restart(self, settings: str, environment: Mapping[str, str] | None = None) -> None:
        """The next daemon, with other settings."""
        self.daemon.stop()
        self.daemon.settings = settings
        self.daemon.start(environment)


@contextmanager
def placed_node(prefix: str, settings: str = "") -> Iterator[PlacedNode]:
    """With nothing but a loopback in its place; `prefix` names its directory, shortly."""
    with tempfile.TemporaryDirectory(prefix=f"tare-{prefix}-", dir="/var/lib") as name, Namespace() as place:
        place.sh("ip link set lo up")
        enter = ("nsenter", f"--net=/proc/{os.getpid()}/fd/{place.fd}")
        with Daemon(Path(name) / "tare", settings=settings, prefix=enter) as daemon:
            yield PlacedNode(daemon, place)
