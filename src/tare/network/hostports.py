"""Ports of the node that lead to pods (hostPort): which pod holds which, kept in state.db beside the leases.

    wanted (protocol, address of the node, port, container's port) ─► clash with a pod's? with a socket of the node's? ─► held ─► redirects

A port without an address is published on every address of the node, in both families as far as the pod has them; "0.0.0.0" is every IPv4
address, "::" every IPv6 address. Two pods cannot have one port on addresses that overlap. Nor can a pod have one at which a process of the
node listens: the redirect comes first in the kernel, and the process would be cut off without a word.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from errno import EADDRINUSE

from tare.errors import FailedPrecondition, InvalidArgument
from tare.network.firewall import Redirect
from tare.network.rtnetlink import Address
from tare.state.database import Database

SCHEMA = """
CREATE TABLE IF NOT EXISTS ports (
    protocol TEXT NOT NULL,      -- tcp, udp, sctp
    host TEXT NOT NULL,          -- an address of the node, or 0.0.0.0 or :: for every one of its family
    port INTEGER NOT NULL,
    target TEXT NOT NULL,        -- the pod's address
    target_port INTEGER NOT NULL,
    pod_id TEXT NOT NULL,
    pod_name TEXT NOT NULL,
    PRIMARY KEY (protocol, host, port)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS ports_by_pod ON ports (pod_id);
"""
LOOPBACK6 = ipaddress.IPv6Address("::1")
MOST_PORTS = 1000  # of one pod; each is looked at on the event loop
KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """What a pod asks for. `host_ip` "" is every address; protocols are those of `firewall.PROTOCOLS`."""

    protocol: str
    host_port: int
    container_port: int
    host_ip: str = ""

    @property
    def words(self) -> str:
        """How a message names it."""
        return f"host port {self.host_port}/{self.protocol}" + (f" on {self.host_ip}" if self.host_ip else "")


def host_addresses(host_ip: str) -> list[Address]:
    """The addresses of the node that a host IP stands for; an unspecified one is all of its family."""
    if not host_ip:
        return [ipaddress.IPv4Address(0), ipaddress.IPv6Address(0)]
    address = ipaddress.ip_address(host_ip)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return [mapped or address]


def overlap(one: Address, other: Address) -> bool:
    """Whether a packet may be addressed to both."""
    return one.version == other.version and (one == other or one.is_unspecified or other.is_unspecified)


def redirects(port: Port, addresses: Sequence[Address]) -> list[Redirect]:
    """What leads to a pod with these addresses. Raises InvalidArgument where it has none of the host IP's family."""
    found = [
        Redirect(
            protocol=port.protocol,
            host=None if host.is_unspecified else host,
            port=port.host_port,
            target=target,
            target_port=port.container_port,
        )
        for host in host_addresses(port.host_ip)
        for target in addresses
        if target.version == host.version
    ]
    if not found:
        hint = "give pods one: [network] subnet6"
        raise InvalidArgument(f"publish {port.words}", cause="pods have no address of this family", hint=hint)
    return found


def check(ports: Iterable[Port]) -> list[Port]:
    """The ports, each once. Raises InvalidArgument where two of them clash, one leads nowhere, or there are more than a pod may have."""
    kept: dict[Port, None] = {}
    rivals: dict[tuple[str, int], list[Port]] = {}
    for port in ports:
        if port in kept:
            continue
        if len(kept) == MOST_PORTS:
            raise InvalidArgument(f"publish {port.words}", cause=f"a pod may have {MOST_PORTS} host ports")
        if not port.container_port:
            raise InvalidArgument(f"publish {port.words}", cause="the container's port is missing")
        if port.host_ip and ipaddress.ip_address(port.host_ip) == LOOPBACK6:
            cause = "the kernel routes nothing between ::1 and a pod"
            raise InvalidArgument(f"publish {port.words}", cause=cause, hint="127.0.0.1 can be had")
        same = rivals.setdefault((port.protocol, port.host_port), [])
        if any(clash(port, other) for other in same):
            raise InvalidArgument(f"publish {port.words}", cause="the pod asks for it twice, for different ports")
        same.append(port)
        kept[port] = None
    return list(kept)


def clash(one: Port, other: Port) -> bool:
    """Whether one packet may be meant for both."""
    if (one.protocol, one.host_port) != (other.protocol, other.host_port):
        return False
    others = host_addresses(other.host_ip)
    return any(overlap(mine, theirs) for mine in host_addresses(one.host_ip) for theirs in others)


def check_node(wanted: Redirect) -> None:
    """Raise FailedPrecondition where a socket of the node has the port; there is no telling for a protocol that the kernel has no sockets for."""
    kind = KINDS.get(wanted.protocol)
    if kind is None:
        return
    v6 = wanted.target.version == 6
    with closing(socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, kind | socket.SOCK_CLOEXEC)) as probe:
        if kind is socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that ended do not count
        if v6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        try:
            probe.bind((str(wanted.host or ("::" if v6 else "0.0.0.0")), wanted.port))
        except OSError as error:
            # Another reason than this one, such as an address that the node does not have yet, is none to refuse.
            if error.errno == EADDRINUSE:
                doing = f"publish host port {wanted.port}/{wanted.protocol}"
                hint = f"see who: ss -lnp 'sport = :{wanted.port}'"
                raise FailedPrecondition(doing, cause="a process of the node has it", hint=hint) from error


def redirect(host: str, protocol: str, port: int, target: str, target_port: int) -> Redirect:
    """A row of the table."""
    on = ipaddress.ip_address(host)
    return Redirect(
        protocol=protocol,
        host=None if on.is_unspecified else on,
        port=port,
        target=ipaddress.ip_address(target),
        target_port=target_port,
    )


class Ports:
    """The table of ports that pods hold."""

    def __init__(self, database: Database) -> None:
        self._database = database
        database.script(SCHEMA)

    def take(self, ports: Iterable[Port], addresses: Sequence[Address], pod_id: str, pod_name: str) -> list[Redirect]:
        """Give the pod its ports, all or none.

        Raises FailedPrecondition naming the holder of one that is taken, InvalidArgument as `check` and `redirects`.
        """
        taken: list[Redirect] = []
        with self._database.transaction():
            for port in check(ports):
                for item in redirects(port, addresses):
                    self._check_pods(item, pod_name)
                    check_node(item)
                    taken.append(item)
            for item in taken:
                host = str(item.host or ("::" if item.target.version == 6 else "0.0.0.0"))
                row = (item.protocol, host, item.port, str(item.target), item.target_port, pod_id, pod_name)
                self._database.execute("INSERT INTO ports VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        return taken

    def release(self, pod_id: str) -> list[Redirect]:
        """Take the pod's ports from it; what led to it."""
        held = self.all(pod_id)
        if held:
            self._database.execute("DELETE FROM ports WHERE pod_id = ?", (pod_id,))
        return held

    def all(self, pod_id: str | None = None) -> list[Redirect]:
        """What leads to any pod, or to this one."""
        sql = "SELECT host, protocol, port, target, target_port FROM ports"
        rows = self._database.execute(f"{sql} WHERE pod_id = ?", (pod_id,)) if pod_id else self._database.execute(sql)
        return [redirect(*row) for row in rows]

    def pods(self) -> set[str]:
        """The pods that hold ports."""
        return {row[0] for row in self._database.execute("SELECT DISTINCT pod_id FROM ports")}

    def _check_pods(self, wanted: Redirect, pod_name: str) -> None:
        """Raise FailedPrecondition where another pod has the port on an address that overlaps."""
        sql = "SELECT host, pod_name, pod_id FROM ports WHERE protocol = ? AND port = ?"
        mine = wanted.host or type(wanted.target)(0)
        for host, name, pod_id in self._database.execute(sql, (wanted.protocol, wanted.port)):
            if overlap(ipaddress.ip_address(host), mine):
                raise FailedPrecondition(
                    f"publish host port {wanted.port}/{wanted.protocol} for pod {pod_name}",
                    cause=f"pod {name} ({pod_id}) has it, on {host}",
                    hint="give one of them another port or host IP",
                )
