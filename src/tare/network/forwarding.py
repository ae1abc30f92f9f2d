"""What a node must be set to so that it forwards pods' packets; what it was set to before is kept, so that it can be given back.

Settings of the kernel end with the boot, and so does what is kept of them. They are everybody's on the node: whether others have come to need one is
nothing that can be known, which is why nobody gives them back unasked, and not while other bridges are there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tare.network import sysctl
from tare.network.bridge import Host
from tare.state.database import Database, boot_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """A setting that was changed in the boot of this ID: what it was, and what it was set to."""

    before: str
    now: str
    boot: str


class Forwarding:
    """The settings of the node that this instance has changed. `database` is state.db."""

    def __init__(self, database: Database) -> None:
        self._changed = database.table("node_settings", Changed)

    def forward(self, host: Host, *, ipv6: bool) -> None:
        """Let the node forward. Raises FailedPrecondition.

        A node that forwards IPv6 takes itself for a router, and stops listening to routers where it listened only as a host (accept_ra 1): it
        would lose its own default route. So the links that it has one by are told to go on (2).
        """
        self._set("1", "net", "ipv4", "ip_forward")
        if not ipv6 or sysctl.read("net", "ipv6", "conf", "all", "forwarding") == "1":
            return
        names = {link.index: link.name for link in host.links}
        for route in host.routes:
            key = ("net", "ipv6", "conf", names.get(route.index, ""), "accept_ra")
            by_router = route.destination.version == 6 and not route.destination.prefixlen and route.index in names
            if by_router and sysctl.read(*key) == "1":
                self._set("2", *key)
        self._set("1", "net", "ipv6", "conf", "all", "forwarding")

    def give_back(self, host: Host, ours: Iterable[str]) -> tuple[list[str], str]:
        """Set back what was changed and nobody has changed since: what that was, and why it was not done ("": it was).

        `ours` are bridges that do not count, because they are this instance's own. Raises FailedPrecondition.
        """
        own = set(ours)
        others = sorted(link.name for link in host.links if link.kind == "bridge" and link.name not in own)
        if others:
            return [], f"other bridges may need it: {', '.join(others)}"
        done = []
        for name, changed in self._changed.items():
            key = name.split("\0")
            path = sysctl.path_of(*key)
            if changed.boot == boot_id() and path.exists() and path.read_text().strip() == changed.now:
                sysctl.ensure(changed.before, *key)
                done.append(f"{'/'.join(key)}={changed.before}")
            self._changed.delete(name)
        return done, ""

    def _set(self, wanted: str, *key: str) -> None:
        before = sysctl.read(*key)
        if before != wanted:
            name = "\0".join(key)  # an interface's name may hold dots and dashes, but not this
            self._changed.put(name, Changed(before=before, now=wanted, boot=boot_id()))
            sysctl.ensure(wanted, *key)
