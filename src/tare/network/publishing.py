"""The packet filter's table and the ports in it, brought in agreement with what is on record.

What is published is what state.db says (`hostports`). A pod's ports are added to the table and taken out of it one by one; where the kernel
has it otherwise, because something flushed the rules or the daemon died in between, the table is replaced whole.
"""

from __future__ import annotations

import logging
import socket
import weakref
from collections.abc import Callable, Iterable, Sequence
from errno import ENOENT

from tare.errors import InternalError, TareError, describe
from tare.network import conntrack, firewall, nft, rtnetlink, sysctl
from tare.network.firewall import Redirect
from tare.network.hostports import Port, Ports
from tare.network.netlink import Message, Netlink, NetlinkError
from tare.network.rtnetlink import Address, Network
from tare.state.database import Database

log = logging.getLogger(__name__)
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


class Publisher:
    """The table of one instance. `bridge` is the name of its bridge; `later` has something done in a thread, one after the other."""

    def __init__(self, database: Database, bridge: str, later: Callable[[Callable[[], None]], object]) -> None:
        self._later = later
        self._database = database
        self._ports = Ports(database)
        self._bridge = bridge
        self._name = f"tare-{bridge}"
        self._subnets: tuple[Network, ...] = ()
        self._others: tuple[str, ...] = ()
        self._isolation: frozenset[str] = frozenset()
        self._conversation: Netlink | None = None
        self._stale = False  # the kernel may have another table than is on record, because it could not be replaced
        self._rules = 0

    @property
    def table(self) -> str:
        """What the table is called."""
        return self._name

    def set_up(
        self, subnets: tuple[Network, ...], others: tuple[str, ...] = (), isolation: frozenset[str] = frozenset()
    ) -> None:
        """Make the table whole, for pods in these subnets; the rest as `firewall.Table` has it."""
        self._subnets, self._others, self._isolation = subnets, others, isolation
        self._replace()

    def repair(self) -> None:
        """Make the table anew where something has flushed it or some of its chains. Raises InternalError."""
        there = 0 if self._stale else len(self._netlink.ask(nft.list_rules(self._name)))
        if there != self._rules or self._stale:
            log.warning("nftables table %s has %d of %d rules: it is made anew", self._name, there, self._rules)
            self._replace()

    def publish(
        self, ports: Iterable[Port], addresses: Sequence[Address], pod_id: str, pod_name: str
    ) -> list[Redirect]:
        """Let the ports lead to the pod: what leads there now.

        Raises FailedPrecondition naming who has one already, InvalidArgument, InternalError; undone by `withdraw`.
        """
        with self._database.transaction():
            taken = self._ports.take(ports, addresses, pod_id, pod_name)
            if taken:
                # What the node sends to a pod from 127.0.0.1 and what comes back would be martians otherwise; `firewall` has what guards this.
                sysctl.ensure("1", "net", "ipv4", "conf", self._bridge, "route_localnet")
                self._change(firewall.publish(self._name, taken))
        return taken

    def withdraw(self, pod_id: str) -> list[Redirect]:
        """Let nothing lead to the pod any more: what did. Idempotent. Raises InternalError where something may still lead there."""
        with self._database.transaction():  # what the kernel was not told stays on record
            gone = self._ports.release(pod_id)
            if gone or self._stale:
                self._change(firewall.withdraw(self._name, gone))
        return gone

    def forget_before(self, host: Netlink, taken: Iterable[Redirect]) -> None:
        """Have the flows forgotten that went to the node by these ports before they were published."""
        if any(item.protocol == "udp" for item in taken):
            local = {rtnetlink.read_address(body).interface.ip for body in host.ask(rtnetlink.list_addresses())}
            self._forget(taken, lambda flow: flow.destination in local or flow.destination.is_loopback)

    def forget_after(self, gone: Iterable[Redirect]) -> None:
        """Have the flows forgotten that went to a pod by these ports."""
        targets = {item.target for item in gone}
        self._forget(gone, lambda flow: flow.answers in targets)

    def pods(self) -> set[str]:
        """The pods that hold ports, on any network."""
        return self._ports.pods()

    def remove(self) -> None:
        """The table goes; what is on record stays."""
        nft.run(self._netlink, firewall.remove(self._name))
        self._subnets = ()

    def rules(self) -> int:
        """How many rules the kernel has in the table; 0 where there is no such table. Raises NetlinkError."""
        return len(self._netlink.ask(nft.list_rules(self._name)))

    def missing(self, redirects: Iterable[Redirect]) -> list[Redirect]:
        """Those of redirects that the kernel does not have in the table. Raises NetlinkError."""
        wanted = list(redirects)
        found: dict[str, set[tuple[bytes, bytes]]] = {}
        for name in firewall.entries_of(wanted):
            try:
                bodies = self._netlink.ask(nft.list_elements(self._name, name))
            except NetlinkError as error:
                if error.errno != ENOENT:
                    raise
                bodies = []
            found[name] = {entry for body in bodies for entry in nft.read_elements(body)}
        return [
            item
            for item in wanted
            if any(entry not in found[name] for name, some in firewall.entries_of([item]).items() for entry in some)
        ]

    def redirects(self, pod_id: str | None = None) -> list[Redirect]:
        """What leads to any pod, or to this one."""
        return self._ports.all(pod_id)

    @property
    def _netlink(self) -> Netlink:
        """The conversation about the node's packet filter, for as long as this lives."""
        if self._conversation is None:
            sock = nft.connect()
            weakref.finalize(self, sock.close)
            self._conversation = Netlink(sock)
        return self._conversation

    def _forget(self, redirects: Iterable[Redirect], chosen: Callable[[conntrack.Flow], bool]) -> None:
        """Have the UDP flows to these ports that are chosen forgotten, by and by: the kernel walks all of a large table for it, 10 ms and more."""
        ports = sorted({(FAMILIES[item.target.version], item.port) for item in redirects if item.protocol == "udp"})
        if ports:
            self._later(lambda: forget(ports, chosen))

    def _replace(self) -> None:
        redirects = tuple(item for item in self._ports.all() if any(item.target in subnet for subnet in self._subnets))
        table = firewall.Table(self._name, self._bridge, self._subnets, redirects, self._others, self._isolation)
        messages = firewall.replace(table)
        self._stale = True
        nft.run(self._netlink, messages)
        self._stale, self._rules = False, nft.count_rules(messages)

    def _change(self, messages: Sequence[Message]) -> None:
        """Do the transaction, or replace the table where it fails, or one before has left the table in doubt."""
        if self._stale:
            self._replace()
            return
        try:
            nft.run(self._netlink, messages)
        except InternalError as error:
            if not self._subnets:
                return  # there is no table before `set_up`
            log.warning("%s: the table is made anew", describe(error))
            self._replace()


def forget(ports: Iterable[tuple[int, int]], chosen: Callable[[conntrack.Flow], bool]) -> None:
    """As `conntrack.forget`, in a thread. A kernel that refuses it keeps the flows: only a client that never pauses notices."""
    try:
        with nft.connect() as sock:
            conntrack.forget(Netlink(sock), ports, chosen)
    except (TareError, OSError, ValueError) as error:
        log.warning("%s", describe(error))
