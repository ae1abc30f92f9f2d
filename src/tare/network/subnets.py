"""Which bridge and which subnet an instance has. Pure: what the host has already is given.

The instance at /run/tare has bridge tare0 and 10.85.0.0/16. Another has a bridge named after a hash of its run directory, and the
first /20 of the candidates that nothing on the host overlaps, looked for from a place that the hash gives, so that two
instances which start at once do not both find the same one. What was found is remembered by the caller and stays.
What the configuration names goes before all of this.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tare.errors import FailedPrecondition, InvalidArgument
from tare.network.rtnetlink import MAX_NAME, Network

DEFAULT_RUN = Path("/run/tare")
DEFAULT_BRIDGE = "tare0"
DEFAULT_SUBNET = ipaddress.IPv4Network("10.85.0.0/16")
# Away from what others choose by default: 10.42, 10.43, 10.88, 10.89, 10.96, 10.244, 172.17 to 172.27, 192.168.0, .1, .122.
CANDIDATES = tuple(map(ipaddress.IPv4Network, ("10.200.0.0/13", "172.28.0.0/14", "192.168.192.0/18")))
CHOSEN_PREFIX = 20
PREFIXES = range(8, 31)  # a /30 has room for the bridge and one pod


@dataclass(frozen=True, slots=True)
class Occupied:
    """A range that something else on the host uses; `where` says what, such as "the route on eth0"."""

    network: Network
    where: str


def digest(run: Path) -> bytes:
    """A hash of the run directory."""
    return hashlib.sha256(str(run).encode()).digest()


def bridge_name(configured: str, run: Path) -> str:
    """The name of the instance's bridge. Raises InvalidArgument for one that the kernel would not take."""
    if not configured:
        return DEFAULT_BRIDGE if run == DEFAULT_RUN else f"tare-{digest(run).hex()[:10]}"
    if len(configured.encode()) > MAX_NAME or configured in (".", "..") or not configured.isprintable():
        raise InvalidArgument(f"[network] bridge = {configured!r}", cause=f"a link's name has 1 to {MAX_NAME} bytes")
    if any(character in "/: %\"'" for character in configured):
        raise InvalidArgument(f"[network] bridge = {configured!r}", cause="a link's name has no such characters")
    return configured


def parse_subnet(configured: str, doing: str = "") -> ipaddress.IPv4Network:
    """The subnet that the configuration names, or `doing` another. Raises InvalidArgument."""
    doing = doing or f"[network] subnet = {configured!r}"
    try:
        subnet = ipaddress.IPv4Network(configured)
    except ValueError as error:
        raise InvalidArgument(doing, cause=str(error), hint="for example 10.85.0.0/16") from error
    if subnet.prefixlen not in PREFIXES:
        raise InvalidArgument(doing, cause=f"a subnet for pods is from /{PREFIXES[0]} to /{PREFIXES[-1]}")
    first = subnet.network_address
    if first.is_multicast or first.is_loopback or first.is_unspecified or first.is_reserved:
        raise InvalidArgument(doing, cause="hosts cannot have addresses of this range")
    return subnet


def parse_subnet6(configured: str, subnet: ipaddress.IPv4Network, doing: str = "") -> ipaddress.IPv6Network:
    """The IPv6 subnet that the configuration names, or `doing` another; it has room for each address of the IPv4 one. Raises InvalidArgument."""
    doing = doing or f"[network] subnet6 = {configured!r}"
    try:
        subnet6 = ipaddress.IPv6Network(configured)
    except ValueError as error:
        raise InvalidArgument(doing, cause=str(error), hint="for example fd00:85::/64") from error
    first = subnet6.network_address
    if first.is_multicast or first.is_loopback or first.is_unspecified or first.is_link_local or first.ipv4_mapped:
        raise InvalidArgument(doing, cause="pods cannot have addresses of this range")
    if 128 - subnet6.prefixlen < 32 - subnet.prefixlen:
        cause = f"it is smaller than {subnet}: each pod has an address of both"
        raise InvalidArgument(doing, cause=cause, hint=f"a /{96 + subnet.prefixlen} or larger")
    return subnet6


def given(ranges: Sequence[str], configured: str, configured6: str) -> tuple[str, str]:
    """The IPv4 subnet and the IPv6 subnet ("": none) of the ranges that the cluster gives to the node.

    Raises InvalidArgument for ranges that are no use, FailedPrecondition where the configuration names others.
    """
    doing = f"use pod CIDR {','.join(ranges)}"
    first = {ipaddress.ip_network(item).version: item for item in reversed(ranges)}
    if 4 not in first:
        raise InvalidArgument(doing, cause="the embedded network needs an IPv4 range")
    subnet = parse_subnet(first[4], doing)
    subnet6 = parse_subnet6(first[6], subnet, doing) if 6 in first else None
    settings: list[tuple[str, str, Network | None, Network | None]] = [
        ("subnet", configured, parse_subnet(configured) if configured else None, subnet),
        ("subnet6", configured6, parse_subnet6(configured6, subnet) if configured6 else None, subnet6),
    ]
    for key, setting, named, wanted in settings:
        if named is not None and wanted is not None and named != wanted:
            cause = f"the settings have pods in {setting}"
            raise FailedPrecondition(doing, cause=cause, hint=f"take [network] {key} out of them")
    return str(subnet), str(subnet6) if subnet6 is not None else ""


def any_network(text: str) -> Network:
    """A range of either family. Raises InvalidArgument."""
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise InvalidArgument(f"use {text!r} as a range of addresses", cause=str(error)) from error


def overlap(subnet: Network, occupied: Iterable[Occupied]) -> Occupied | None:
    """The first range that the subnet shares an address with."""
    return next((o for o in occupied if o.network.version == subnet.version and o.network.overlaps(subnet)), None)


def intruder(subnet: Network, occupied: Iterable[Occupied]) -> Occupied | None:
    """The first range that lies within the subnet. A wider one does not count: a pod subnet may be carved out of a larger network."""
    return next((o for o in occupied if o.network.version == subnet.version and within(o.network, subnet)), None)


def refuse_shared(subnet: Network, reserved: Iterable[Occupied]) -> None:
    """Raise FailedPrecondition where the subnet shares an address with a range that is another network's of this instance."""
    if (other := overlap(subnet, reserved)) is not None:
        hint = "give each network a range of its own: [network] subnet, [network.networks.NAME] subnet"
        raise FailedPrecondition(f"use {subnet} for pods", cause=f"{other.network} is that of {other.where}", hint=hint)


def within(inner: Network, outer: Network) -> bool:
    """Whether every address of one is in the other; both of one family."""
    first, last = int(outer.network_address), int(outer.broadcast_address)
    return first <= int(inner.network_address) and int(inner.broadcast_address) <= last


def candidates(run: Path) -> Iterator[ipaddress.IPv4Network]:
    """Every candidate once, in the order in which this instance tries them."""
    everything = [subnet for area in CANDIDATES for subnet in area.subnets(new_prefix=CHOSEN_PREFIX)]
    start = int.from_bytes(digest(run)[-4:], "big") % len(everything)
    yield from everything[start:]
    yield from everything[:start]


def choose_subnet(
    configured: str, run: Path, remembered: ipaddress.IPv4Network | None, occupied: list[Occupied], in_use: bool
) -> ipaddress.IPv4Network:
    """The instance's subnet. `remembered` is that of the last start, `in_use` says whether pods hold addresses of it.

    Raises InvalidArgument for a malformed setting, FailedPrecondition where the subnet is not free or cannot change now.
    """
    if configured or run == DEFAULT_RUN:
        subnet = parse_subnet(configured) if configured else DEFAULT_SUBNET
        taken = intruder(subnet, occupied)
    elif remembered is not None and (in_use or overlap(remembered, occupied) is None):
        subnet, taken = remembered, overlap(remembered, occupied)
    else:
        free = next((subnet for subnet in candidates(run) if overlap(subnet, occupied) is None), None)
        if free is None:
            areas = ", ".join(map(str, CANDIDATES))
            raise FailedPrecondition(
                "choose a subnet for pods",
                cause=f"every /{CHOSEN_PREFIX} of {areas} overlaps a route or an address of this host",
                hint="name one: [network] subnet",
            )
        subnet, taken = free, None
    if taken is not None:
        raise FailedPrecondition(
            f"use {subnet} for pods",
            cause=f"{taken.network} is in use: {taken.where}",
            hint="name another: [network] subnet",
        )
    if in_use and remembered is not None and remembered != subnet:
        raise FailedPrecondition(
            f"use {subnet} for pods",
            cause=f"pods still hold addresses of {remembered}",
            hint=f"remove them first, or set [network] subnet to {remembered}",
        )
    return subnet


def choose_subnet6(
    configured: str,
    subnet: ipaddress.IPv4Network,
    remembered: ipaddress.IPv6Network | None,
    occupied: list[Occupied],
    in_use: bool,
) -> ipaddress.IPv6Network | None:
    """The instance's IPv6 subnet, if it is to have one. Raises as `choose_subnet`."""
    subnet6 = parse_subnet6(configured, subnet) if configured else None
    if in_use and remembered is not None and remembered != subnet6:
        raise FailedPrecondition(
            f"use {subnet6} for pods" if subnet6 is not None else "have pods without IPv6",
            cause=f"pods still hold addresses of {remembered}",
            hint=f"remove them first, or set [network] subnet6 to {remembered}",
        )
    taken = intruder(subnet6, occupied) if subnet6 is not None else None
    if taken is not None:
        raise FailedPrecondition(
            f"use {subnet6} for pods",
            cause=f"{taken.network} is in use: {taken.where}",
            hint="name another: [network] subnet6",
        )
    return subnet6
