"""Everything that one exec has started, and its end.

An exec has a control group of its own (`cgroups.leaf`), and all that it started is in that. Where it has none (version 1 alone, another
runtime's), a process belongs to it if it is the exec's own, descends from it, or is in its session; one that has left both (a new
session, and a parent that is gone) cannot be told from the container's others then and is left alone.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tare.errors import DeadlineExceeded

KILL_SECONDS = 10.0
SWEEP_PAUSE = 0.005


@dataclass(frozen=True, slots=True)
class Member:
    """A process as /proc/PID/stat has it."""

    pid: int
    parent: int
    session: int
    start_time: int
    zombie: bool = False


def parse_stat(text: str) -> Member:
    """/proc/PID/stat; the name in it may hold anything."""
    fields = text[text.rindex(")") + 2 :].split()
    pid = int(text[: text.index(" ")])
    return Member(pid, int(fields[1]), int(fields[3]), int(fields[19]), fields[0] in "ZX")


def tree(members: Iterable[Member], root: int) -> set[Member]:
    """Those of the members that belong to the exec whose process was `root`."""
    everyone = {member.pid: member for member in members}
    found = {member.pid for member in everyone.values() if root in (member.pid, member.session)}
    grown = True
    while grown:
        more = {member.pid for member in everyone.values() if member.parent in found} - found
        found |= more
        grown = bool(more)
    return {everyone[pid] for pid in found}


def look(pids: Iterable[int]) -> list[Member]:
    """The members of a list of PIDs that are there and are no zombies."""
    found = []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
                member = parse_stat(file.read())
        except (FileNotFoundError, ProcessLookupError):
            continue
        if not member.zombie:
            found.append(member)
    return found


def send(member: Member, number: int) -> None:
    """Signal a process, unless its PID has changed hands."""
    try:
        pidfd = os.pidfd_open(member.pid)
    except ProcessLookupError:
        return
    try:
        if any(now.start_time == member.start_time for now in look([member.pid])):
            signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return
    finally:
        os.close(pidfd)


async def stop(root: int, candidates: Callable[[], Iterable[int]]) -> set[Member]:
    """Stop all of an exec, until nothing new appears (what is stopped starts nothing more), or for half of the time that it has to end."""
    until = asyncio.get_running_loop().time() + KILL_SECONDS / 2
    stopped: set[Member] = set()
    while True:
        fresh = tree(look(candidates()), root) - stopped
        for member in fresh:
            send(member, signal.SIGSTOP)
        stopped |= fresh
        if not fresh or asyncio.get_running_loop().time() > until:
            return stopped
        await asyncio.sleep(0)


async def kill(root: int, candidates: Callable[[], Iterable[int]], doing: str) -> None:
    """End all of an exec; `candidates` lists the container's PIDs. Raises DeadlineExceeded, naming what lives on."""
    until = asyncio.get_running_loop().time() + KILL_SECONDS
    members = await stop(root, candidates)
    while True:
        for member in members:
            send(member, signal.SIGKILL)
        # Parents are gone now: what is left is known by name, or by its session.
        there = {member.pid: member for member in look(candidates())}
        left = {m for m in members if m.pid in there and there[m.pid].start_time == m.start_time}
        members = left | tree(there.values(), root)
        if not members:
            return
        if asyncio.get_running_loop().time() > until:
            alive = ", ".join(str(member.pid) for member in sorted(members, key=lambda member: member.pid))
            raise DeadlineExceeded(doing, step="kill", cause=f"processes {alive} do not end")
        await asyncio.sleep(SWEEP_PAUSE)
