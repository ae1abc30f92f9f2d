"""A pod's network while its containers are restored one after the other: nothing is received.

A connection that is restored asks its peer at once whether it is there (the kernel's answer to the end of TCP_REPAIR is a window probe). Where that
is in another container of the pod, which is not restored yet, the kernel itself would answer that there is no such connection, and end it.
"""

from __future__ import annotations

from pathlib import Path

from tare.network import nft, place
from tare.network.netlink import Message

TABLE = "tare-restore"


def keep(namespace: Path) -> None:
    """From now on, in the network namespace that a file pins. Blocks. Raises NetlinkError, OSError."""
    place.inside(namespace, lambda: nft.apply(nft.transaction(*silence())))


def end(namespace: Path) -> None:
    """Not any more. Blocks. Raises as `keep`."""
    place.inside(namespace, lambda: nft.apply(nft.transaction(nft.delete_table(TABLE))))


def silence() -> list[Message]:
    """A table that drops whatever comes in."""
    return [
        nft.new_table(TABLE),
        nft.new_chain(TABLE, "input", "filter", nft.NF_INET_LOCAL_IN, nft.NF_IP_PRI_RAW),
        nft.new_rule(TABLE, "input", nft.verdict(nft.NF_DROP)),
    ]
