"""What of an instance is on the node, as the kernel and the directories have it; nothing is changed and nobody is asked.

mounts        at or below the run and the root directory, by their kind           /proc/self/mountinfo
groups        control groups that bear this instance's mark, with who is in them  the trees below /sys/fs/cgroup
links         veths whose alias names this instance and a pod                     rtnetlink
rules         how many rules the instance's table has, and what is in its maps    nf_tables
names         what is in its directories
live          which of the processes on record live
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tare.cgroups.layout import Layout
from tare.cgroups.names import MARK
from tare.config import Config
from tare.launch import linux
from tare.network import bridge, firewall, nft, rtnetlink
from tare.network.attach import node as node_netlink
from tare.network.netlink import Netlink, NetlinkError
from tare.runtime.strays import parse_name

Entry = tuple[str, bytes, bytes]  # map, key, data
RUN_DIRECTORIES = ("pods", "containers", "bundles", "hooked", "tasks", "exits", "loggers")
ROOT_DIRECTORIES = ("containers", "layers", "blobs/sha256", "blobs/sha512")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A control group with this instance's mark: `trees` are the directories, `pids` who is in it or below it."""

    trees: tuple[str, ...]
    pids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A bridge's nftables table; `entries` is what its maps have. `rules` 0: there is no such table."""

    rules: int = 0
    entries: frozenset[Entry] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """All of it. `names` are directories' contents by "run/pods" and the like, with the seconds since each was changed last."""

    mounts: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    there: frozenset[str] = frozenset()
    links: Mapping[str, str] = field(default_factory=dict)
    bridges: frozenset[str] = frozenset()
    tables: Mapping[str, Table] = field(default_factory=dict)
    names: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    live: Mapping[str, float] = field(default_factory=dict)
    serving: Mapping[str, bool] = field(default_factory=dict)
    loggers: frozenset[str] = frozenset()


def look(
    config: Config, layout: Layout, groups: Iterable[str], bridges: Iterable[str], processes: Iterable[str]
) -> Node:
    """Look at all of it; control groups, bridges and processes (by their markers) are those on record. Blocks. Raises OSError, TareError."""
    run, root = config.run, config.root
    links, found = our_links(run.resolve())
    names = {f"run/{name}": listing(run / name) for name in RUN_DIRECTORIES}
    names |= {f"root/{name}": listing(root / name) for name in ROOT_DIRECTORIES}
    names |= {f"run/pods/{pod}": listing(run / "pods" / pod) for pod in names["run/pods"]}
    names |= {f"run/containers/{box}": listing(run / "containers" / box) for box in names["run/containers"]}
    names |= {f"run/loggers/{group}": listing(run / "loggers" / group) for group in names["run/loggers"]}
    return Node(
        mounts=mounts_below((str(run.resolve()), str(root.resolve())), Path("/proc/self/mountinfo").read_text()),
        groups=marked_groups(layout, str(run)),
        there=frozenset(path for path in groups if any(os.path.isdir(place) for place in places(layout, path))),
        links=links,
        bridges=found,
        tables={name: table(f"tare-{name}") for name in bridges},
        names=names,
        live=living({*names["run/tasks"], *processes}),
        serving={name: listens(run / f"{name}.sock") for name in ("keeper", "launcher")},
        loggers=frozenset(group for group in names["run/loggers"] if lives(run / "loggers" / group / "pid")),
    )


def listing(directory: Path) -> dict[str, float]:
    """Names in a directory, and how many seconds ago each was changed; nothing where there is no such directory."""
    found, now = {}, time.time()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                found[entry.name] = now - entry.stat(follow_symlinks=False).st_mtime
    return found


def mounts_below(tops: Iterable[str], mountinfo: str) -> dict[str, str]:
    """Mount points below these directories, by the kind of file system (that of the topmost where several lie over each other)."""
    found = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape").encode("latin-1").decode(errors="surrogateescape")
        if any(point.startswith(f"{top}/") for top in tops):
            found[point] = right.split()[0]
    return found


def places(layout: Layout, path: str) -> Iterator[str]:
    """Where a group may be."""
    name = path.strip("/")
    for tree in layout.hierarchies:
        yield f"{tree.directory}/{name}"
        yield f"{tree.directory}/tare-detached/{name.rpartition('/')[2]}"


def marked_groups(layout: Layout, run: str) -> dict[str, Group]:
    """Control groups that this instance has made, by their paths."""
    trees: dict[str, list[str]] = {}
    mark = run.encode()
    for tree in layout.hierarchies:
        for directory, children, _ in os.walk(tree.directory):
            ours = [name for name in children if bears(f"{directory}/{name}", mark)]
            for name in ours:
                path = f"{directory}/{name}"
                trees.setdefault(path.removeprefix(tree.directory), []).append(path)
    return {path: Group(trees=tuple(found), pids=tuple(members(found))) for path, found in trees.items()}


def bears(path: str, mark: bytes) -> bool:
    """Whether a group has this mark."""
    try:
        return os.getxattr(path, MARK) == mark
    except OSError:
        return False  # none, or it has gone, or its kernel has no such attributes


def members(directories: Iterable[str]) -> list[int]:
    """Who is in these groups or below them."""
    pids: dict[int, None] = {}
    for top in directories:
        for directory, _, _ in os.walk(top):
            with contextlib.suppress(OSError), open(f"{directory}/cgroup.procs") as listed:
                pids |= dict.fromkeys(int(line) for line in listed)
    return [pid for pid in pids if pid]


def our_links(run: Path) -> tuple[dict[str, str], frozenset[str]]:
    """Links of this instance's pods, by their names with the pod's ID; and its bridges."""
    with node_netlink() as netlink:
        pods = {link.name: pod for pod, link in bridge.pod_links(netlink, run)}
        links = [rtnetlink.read_link(body) for body in netlink.ask(rtnetlink.list_links("bridge"))]
    return pods, frozenset(link.name for link in links if link.alias == bridge.mark(run))


def table(name: str) -> Table:
    """What the kernel has of a table. Where it has no nf_tables there is none."""
    try:
        sock = nft.connect()
    except OSError as error:
        if error.errno in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT):
            return Table()
        raise
    with sock:
        netlink = Netlink(sock)
        count = len(netlink.ask(nft.list_rules(name)))
        entries: set[Entry] = set()
        for version in firewall.FAMILIES:
            for exact in (True, False):
                which = firewall.map_name(version, exact=exact)
                entries |= {(which, *entry) for entry in elements(netlink, name, which)}
    return Table(rules=count, entries=frozenset(entries))


def elements(netlink: Netlink, table: str, name: str) -> Iterator[tuple[bytes, bytes]]:
    """What is in a map; nothing where there is no such map."""
    try:
        bodies = netlink.ask(nft.list_elements(table, name))
    except NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise
        return
    for body in bodies:
        yield from nft.read_elements(body)


def living(markers: Iterable[str]) -> dict[str, float]:
    """Those of these processes, by their markers, that live, and for how many seconds they have."""
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    found = {}
    for name in markers:
        process = parse_name(name)
        if process is not None and linux.same_process(process.pid, process.start_time):
            found[name] = uptime - process.start_time / TICKS
    return found


def lives(record: Path) -> bool:
    """Whether the process whose PID and start time a file has lives."""
    found = linux.recorded(str(record))
    if found is None:
        return False
    os.close(found[1])
    return True


def listens(path: Path) -> bool:
    """Whether somebody listens at a socket; a connection is made and closed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except BlockingIOError:
            return True  # its queue is full
        except OSError:
            return False
    return True
