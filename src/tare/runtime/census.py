"""What a container's processes hold, as /proc says (proc(5)): descriptors, sockets, the limit on open files.

It costs some microseconds a descriptor, so it is for metrics alone, which are asked for every quarter of a minute or so, and bounded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

MOST_DESCRIPTORS = 20_000  # of one container; how many of more are sockets is not looked up
OPEN_FILES = "Max open files"


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """`sockets` None where there are too many descriptors to look at; `open_files` is the main process's soft limit."""

    processes: int
    descriptors: int
    sockets: int | None
    open_files: int | None


def take(pids: Sequence[int], main: int) -> Census:
    """Of processes that may end meanwhile; `main` is looked at only if it is one of them."""
    descriptors = sockets = 0
    for pid in pids:
        directory = f"/proc/{pid}/fd"
        try:
            # Since Linux 6.2 the directory's size is how many there are; before that it is 0, and they have to be read.
            count = os.stat(directory).st_size
            if descriptors + count <= MOST_DESCRIPTORS:
                names = os.listdir(directory)
                count = len(names)
        except OSError:
            continue
        descriptors += count
        if descriptors <= MOST_DESCRIPTORS:
            sockets += sum(is_socket(f"{directory}/{name}") for name in names)
    return Census(
        processes=len(pids),
        descriptors=descriptors,
        sockets=sockets if descriptors <= MOST_DESCRIPTORS else None,
        open_files=open_files(main) if main in pids else None,
    )


def is_socket(path: str) -> bool:
    """Whether a descriptor is one."""
    try:
        return os.readlink(path).startswith("socket:")
    except OSError:
        return False


def open_files(pid: int) -> int | None:
    """How many files a process may open; None where it has ended."""
    try:
        with open(f"/proc/{pid}/limits") as limits:
            return parse_limit(limits.read())
    except OSError:
        return None


def parse_limit(text: str) -> int | None:
    """The soft limit on open files, from the text of /proc/PID/limits. The kernel always has one (fs.nr_open)."""
    for line in text.splitlines():
        if line.startswith(OPEN_FILES):
            soft = line.removeprefix(OPEN_FILES).split()[0]
            return int(soft) if soft.isdigit() else None
    return None
