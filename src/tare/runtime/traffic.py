"""What has gone through the network interfaces of pods, read inside their namespaces (proc(5), /proc/net/dev).

One thread enters one namespace after another and ends. Loopback is left out: it is no network that a pod shares with anybody.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tare.network import place

COUNTERS = "/proc/thread-self/net/dev"
DEFAULT = "eth0"  # the name that CRI's runtimes and CNI give a pod's own interface
LOOPBACK = "lo"


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """Since the interface was made."""

    name: str
    rx_bytes: int
    rx_packets: int
    rx_errors: int
    rx_dropped: int
    tx_bytes: int
    tx_packets: int
    tx_errors: int
    tx_dropped: int


def parse(text: str) -> tuple[Interface, ...]:
    """The interfaces of /proc/net/dev, the pod's default one first. Two lines of titles, then "name: 8 numbers received, 8 sent"."""
    found = []
    for line in text.splitlines()[2:]:
        # The name may hold colons (an alias of old): the numbers are what follows the last one.
        name, _, rest = line.rpartition(":")
        numbers = [int(word) for word in rest.split()]
        if name.strip() == LOOPBACK:
            continue
        found.append(
            Interface(
                name=name.strip(),
                rx_bytes=numbers[0],
                rx_packets=numbers[1],
                rx_errors=numbers[2],
                rx_dropped=numbers[3],
                tx_bytes=numbers[8],
                tx_packets=numbers[9],
                tx_errors=numbers[10],
                tx_dropped=numbers[11],
            )
        )
    return tuple(sorted(found, key=lambda interface: interface.name != DEFAULT))


def look(namespaces: Sequence[Path]) -> Mapping[Path, tuple[Interface, ...]]:
    """The interfaces of each namespace (a file that pins it); without those that are not there any more. Blocks for some 50 µs each."""
    found: dict[Path, tuple[Interface, ...]] = {}

    def visit() -> None:
        for namespace in namespaces:
            try:
                place.switch(namespace)
                with open(COUNTERS) as counters:
                    text = counters.read()
            except OSError:
                # Its pod is being stopped.
                continue
            found[namespace] = parse(text)

    if namespaces:
        thread = threading.Thread(target=visit, name="netns")
        thread.start()
        thread.join()
    return found
