"""Which pod holds which address: leases, kept in state.db so that a crash neither leaks nor doubles one.

An address is taken in turn, after the last one given out, and one that was given back rests for a minute: a pod's peers
may still have its old connections, ARP entries and names. When nothing else is free, the longest rested one is taken.
`choose` is the rule, a pure function; `Leases` is the table.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Collection, Mapping

from tare.errors import FailedPrecondition, ResourceExhausted
from tare.state.database import Database

REST = 60 * 10**9  # nanoseconds

SCHEMA = """
CREATE TABLE IF NOT EXISTS leases (
    lease INTEGER PRIMARY KEY,   -- counts up: the highest is the last one given out
    network TEXT NOT NULL,       -- 10.85.0.0/16
    address TEXT NOT NULL,       -- 10.85.0.2
    pod_id TEXT NOT NULL,
    released_at INTEGER,         -- nanoseconds since the epoch, NULL while the pod holds it
    UNIQUE (network, address)
);
CREATE INDEX IF NOT EXISTS leases_by_pod ON leases (pod_id);
"""


def gateway(subnet: ipaddress.IPv4Network) -> ipaddress.IPv4Interface:
    """The bridge's own address: the subnet's first."""
    return ipaddress.IPv4Interface((int(subnet.network_address) + 1, subnet.prefixlen))


def companion(
    subnet6: ipaddress.IPv6Network, subnet: ipaddress.IPv4Network, address: ipaddress.IPv4Address
) -> ipaddress.IPv6Address:
    """The IPv6 address that goes with an address of the subnet: as far from the beginning of its own. One lease is for both."""
    return subnet6.network_address + (int(address) - int(subnet.network_address))


def capacity(subnet: ipaddress.IPv4Network) -> int:
    """How many pods fit: all but the network's address, the bridge's, and the broadcast address."""
    return max(0, subnet.num_addresses - 3)


def choose(
    subnet: ipaddress.IPv4Network, held: Collection[str], resting: Mapping[str, int], last: str | None
) -> str | None:
    """The next address for a pod, or None where all are held.

    `held` are the addresses in use, `resting` those given back lately and when, `last` the one given out last.
    """
    first, size = int(subnet.network_address) + 2, capacity(subnet)
    start = int(ipaddress.IPv4Address(last)) + 1 - first if last else 0
    for step in range(size):
        address = str(ipaddress.IPv4Address(first + (start + step) % size))
        if address not in held and address not in resting:
            return address
    rested = [address for address in resting if address not in held and ipaddress.IPv4Address(address) in subnet]
    return min(rested, key=lambda address: resting[address], default=None)


class Leases:
    """The table of leases. `now` is the clock, in nanoseconds since the epoch."""

    def __init__(self, database: Database, now: Callable[[], int] = time.time_ns) -> None:
        self._database = database
        self._now = now
        database.script(SCHEMA)

    def take(self, subnet: ipaddress.IPv4Network, pod_id: str) -> ipaddress.IPv4Address:
        """Lease an address of the subnet to the pod.

        Raises ResourceExhausted where all are held, FailedPrecondition where the pod has one already.
        """
        network = str(subnet)
        with self._database.transaction():
            held = self.held(network)
            if self.of(pod_id):
                raise FailedPrecondition(f"lease an address to pod {pod_id}", cause="it holds one already")
            self._forget_rested(network)
            address = choose(subnet, held, self._resting(network), self._last(network))
            if address is None:
                raise ResourceExhausted(
                    f"lease an address to pod {pod_id}",
                    cause=f"all {capacity(subnet)} addresses of {subnet} are held by pods",
                    hint="remove pods, or give [network] subnet a larger range",
                )
            self._database.execute(
                "INSERT OR REPLACE INTO leases (network, address, pod_id) VALUES (?, ?, ?)", (network, address, pod_id)
            )
        return ipaddress.IPv4Address(address)

    def regain(self, network: str, address: str, pod_id: str) -> bool:
        """Give a pod an address that it had, if no other has it; whether it holds it now."""
        self._database.execute(
            "INSERT INTO leases (network, address, pod_id) VALUES (?, ?, ?) ON CONFLICT (network, address)"
            " DO UPDATE SET pod_id = excluded.pod_id, released_at = NULL WHERE released_at IS NOT NULL",
            (network, address, pod_id),
        )
        return self.held(network).get(address) == pod_id

    def release(self, pod_id: str) -> None:
        """Give back whatever the pod holds, in any network."""
        self._database.execute(
            "UPDATE leases SET released_at = ? WHERE pod_id = ? AND released_at IS NULL", (self._now(), pod_id)
        )

    def held(self, network: str) -> dict[str, str]:
        """Which address of the network is held by which pod."""
        rows = self._database.execute(
            "SELECT address, pod_id FROM leases WHERE network = ? AND released_at IS NULL", (network,)
        )
        return dict(rows)

    def of(self, pod_id: str) -> dict[str, str]:
        """Which address the pod holds, by its network: at most one."""
        rows = self._database.execute(
            "SELECT network, address FROM leases WHERE pod_id = ? AND released_at IS NULL", (pod_id,)
        )
        return dict(rows)

    def pods(self) -> set[str]:
        """The pods that hold an address in any network."""
        return {
            row[0] for row in self._database.execute("SELECT DISTINCT pod_id FROM leases WHERE released_at IS NULL")
        }

    def _resting(self, network: str) -> dict[str, int]:
        rows = self._database.execute(
            "SELECT address, released_at FROM leases WHERE network = ? AND released_at IS NOT NULL", (network,)
        )
        return dict(rows)

    def _last(self, network: str) -> str | None:
        rows = self._database.execute(
            "SELECT address FROM leases WHERE network = ? ORDER BY lease DESC LIMIT 1", (network,)
        )
        return rows[0][0] if rows else None

    def _forget_rested(self, network: str) -> None:
        """Delete rows whose rest is over, but not the last one given out: it says where to go on."""
        self._database.execute(
            "DELETE FROM leases WHERE network = ? AND released_at <= ?"
            " AND lease < (SELECT max(lease) FROM leases WHERE network = ?)",
            (network, self._now() - REST, network),
        )
