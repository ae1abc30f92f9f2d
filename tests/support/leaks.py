"""What a test run can leave on a machine, taken as a snapshot: mounts, namespaces, links, cgroups, processes, nftables tables, files.

A snapshot is a bag of `Thing`s; what a later one has more of is what was left behind. Parsing takes text, and only
`snapshot` and `settle` look at the machine. Nothing is cleaned up here: a leftover is a defect of whoever left it.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SESSION_VARIABLE = "TARE_TEST_SESSION"
WATCHED_DIRECTORIES = ("/run/netns", "/dev/shm")
WATCHED_PREFIXES = ("/run/tare", "/var/lib/tare", "/etc/tare")
# Where other software makes cgroups of its own while tests run: the service manager, login sessions, the machine's supervisor.
FOREIGN_CGROUPS = ("system.slice", "user.slice", "init.scope", "machine.slice", "process_api", "docker", "lxc")


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """One thing that exists: its kind (mount, netns, link, cgroup, process, nftables, file) and a name to find it by."""

    kind: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Process:
    """What /proc says of a process; `start` is its start time in clock ticks since boot, `name` what it calls itself."""

    pid: int
    parent: int
    start: int
    name: str
    command: str
    environment: bytes


Snapshot = Counter[Thing]


def parse_mounts(mountinfo: str) -> Iterator[Thing]:
    """Each mount of a /proc/PID/mountinfo as "MOUNT POINT (TYPE, SOURCE)"; proc(5)."""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point, (kind, source) = left.split()[4], right.split()[:2]
        yield Thing("mount", f"{point} ({kind}, {source})")


def parse_stat(stat: str) -> tuple[int, int, str]:
    """(parent's PID, start time, name) of a /proc/PID/stat, whose name may hold spaces and parentheses."""
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    fields = stat[stat.rindex(")") + 2 :].split()
    return int(fields[1]), int(fields[19]), name


def belongs_to(process: Process, session: str) -> bool:
    """Whether a process shows that it is this test session's: by the session's mark, or as a Tare process without another's mark."""
    mark = f"{SESSION_VARIABLE}=".encode()
    marks = [entry for entry in process.environment.split(b"\0") if entry.startswith(mark)]
    return mark + session.encode() in marks or (not marks and is_tare(process))


def is_tare(process: Process) -> bool:
    """Whether it is one of Tare's own processes, by what it calls itself or by its command line."""
    words = process.command.split(" ")[:4]
    return process.name.startswith("tare-") or any(Path(w).name == "tare" or w.startswith("tare.") for w in words)


def descendants(processes: Iterable[Process], root: int) -> set[int]:
    """The PIDs below `root`."""
    children: dict[int, list[int]] = {}
    for process in processes:
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    stack = [root]
    while stack:
        for child in children.get(stack.pop(), ()):
            found.add(child)
            stack.append(child)
    return found


def snapshot(session: str) -> Snapshot:
    """Everything of the kinds watched that exists now; `session` is this test session's mark."""
    things: Snapshot = Counter(parse_mounts(Path("/proc/self/mountinfo").read_text()))
    things.update(
        Thing("netns" if at == "/run/netns" else "file", path) for at in WATCHED_DIRECTORIES for path in listing(at)
    )
    things.update(Thing("file", str(path)) for prefix in WATCHED_PREFIXES for path in beginning_with(Path(prefix)))
    things.update(Thing("link", name) for name in os.listdir("/sys/class/net"))
    things.update(Thing("cgroup", path) for path in cgroups(Path("/sys/fs/cgroup")))
    things.update(Thing("nftables", table) for table in nftables())
    things.update(
        Thing("process", f"{p.pid} {p.name} (started {p.start}): {p.command}") for p in our_processes(session)
    )
    return things


def listing(directory: str) -> list[str]:
    """Paths in a directory, none if there is no such directory."""
    try:
        return [f"{directory}/{name}" for name in os.listdir(directory)]
    except FileNotFoundError:
        return []


def beginning_with(prefix: Path) -> list[Path]:
    """Paths beside `prefix` whose names begin like its own."""
    return list(prefix.parent.glob(f"{prefix.name}*"))


def cgroups(root: Path) -> Iterator[str]:
    """Every cgroup directory below `root`, but those of other software."""
    for directory, names, _ in os.walk(root):
        names[:] = [name for name in names if name not in FOREIGN_CGROUPS]
        yield from (f"{directory}/{name}" for name in names)


def nftables() -> list[str]:
    """Lines such as "table inet tare"; none where the tool is missing."""
    try:
        result = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, timeout=10, check=False)
    except FileNotFoundError:
        return []
    return result.stdout.splitlines()


def processes() -> list[Process]:
    """All processes; one that ends meanwhile is left out."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        entry = Path("/proc", name)
        try:
            parent, start, comm = parse_stat((entry / "stat").read_text(errors="replace"))
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            environment = (entry / "environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        found.append(Process(int(name), parent, start, comm, command, environment))
    return found


def our_processes(session: str) -> list[Process]:
    """The processes of this test session and all below them, without the one that asks."""
    everything = processes()
    ours = {os.getpid()} | {process.pid for process in everything if belongs_to(process, session)}
    below = {pid for root in ours for pid in descendants(everything, root)}
    return [process for process in everything if process.pid in (ours | below) - {os.getpid()}]


def left_behind(before: Snapshot, after: Snapshot) -> list[Thing]:
    """What `after` has more of, in order; a thing that is there several times more is named as often."""
    return sorted((after - before).elements())


def settle(before: Snapshot, session: str, seconds: float) -> list[Thing]:
    """What is left behind once what goes away by itself has gone, within so many seconds.

    The kernel takes down a network namespace, and the veth in it, some time after its last user is gone.
    """
    deadline = time.monotonic() + seconds
    while True:
        left = left_behind(before, snapshot(session))
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)
