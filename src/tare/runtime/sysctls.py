"""Which kernel settings a pod may have of its own (pure): those that belong to a namespace of its own; any other would be the node's.

A pod with a network of its own may, unless it says otherwise, listen at any port and ping without a capability: ports below 1024 mean
nothing there, and neither can disturb the node.

Source: namespaces(7), ipc_namespaces(7), network_namespaces(7); kernel Documentation/admin-guide/sysctl.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from tare.errors import InvalidArgument

IPC = frozenset(
    (
        "kernel.auto_msgmni",
        "kernel.msg_next_id",
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.sem_next_id",
        "kernel.shm_next_id",
        "kernel.shm_rmid_forced",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
    )
)
PORTS, PING = ("net.ipv4.ip_unprivileged_port_start", "0"), ("net.ipv4.ping_group_range", "0 2147483647")
UTS = frozenset({"kernel.domainname"})


def namespace_of(name: str) -> str | None:
    """The kind of namespace that a setting belongs to; None for the node's own."""
    dotted = name.replace("/", ".")
    if dotted.startswith("net."):
        return "net"
    if dotted in IPC or dotted.startswith("fs.mqueue."):
        return "ipc"
    return "uts" if dotted in UTS else None


def check(names: Iterable[str], kinds: Collection[str]) -> None:
    """Raise InvalidArgument for the first setting that is not of a namespace in `kinds` (those that the pod has of its own)."""
    for name in names:
        kind = namespace_of(name)
        if kind is None:
            cause = "it is the node's, not a pod's: it belongs to no namespace"
            raise InvalidArgument(f"set sysctl {name}", cause=cause)
        if kind not in kinds:
            raise InvalidArgument(f"set sysctl {name}", cause=f"the pod shares the node's {kind} namespace")


def of_pod(wanted: Mapping[str, str], kinds: Collection[str]) -> dict[str, str]:
    """What is set in the namespaces of a pod that has these `kinds` of its own: what it wants, and what every pod gets that says nothing.

    A user namespace may not map the groups of PING, and root in it has the capability anyway.
    """
    named = {name.replace("/", ".") for name in wanted}
    defaults = [] if "net" not in kinds else [PORTS] if "user" in kinds else [PORTS, PING]
    return dict(setting for setting in defaults if setting[0] not in named) | dict(wanted)
