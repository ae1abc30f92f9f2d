"""Processes of ours that nobody waits for any more: ended, and the records of their ends dropped.

An exec whose daemon was killed has no caller left; one whose launcher was killed before it could answer runs on unknown, and
so does the marker of a child that ended at its gate. Each process of ours has a marker under tasks/ until its end is on
record under exits/, so what those folders hold and nobody knows is a stray.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Collection
from pathlib import Path

from tare.errors import DeadlineExceeded, describe
from tare.handlers.builtin import Process
from tare.runtime.bounds import deadline
from tare.runtime.exits import process_of
from tare.runtime.ports import Handler
from tare.runtime.store import Store

log = logging.getLogger(__name__)
END_SECONDS = 10.0


def known(store: Store) -> set[Process]:
    """The processes that records speak of."""
    facts = {facts.process for facts in store.container_facts.values()}
    facts |= {facts.pause for facts in store.pod_facts.values() if facts.pause is not None}
    return {process_of(fact) for fact in facts}


def parse_name(name: str) -> Process | None:
    """PID.START, as markers and exit records are called; None for anything else."""
    pid, _, start = name.partition(".")
    return Process(int(pid), int(start)) if pid.isdecimal() and start.isdecimal() else None


def find(run: Path, ours: Collection[Process], made_before: int | None) -> list[Process]:
    """Processes with a marker or an exit record that are not among `ours`, and started before a time (clock ticks since boot) if one is given."""
    names = {name for folder in ("tasks", "exits") for name in os.listdir(run / folder)}
    found = {process for name in names if (process := parse_name(name)) is not None}
    return [p for p in found - set(ours) if made_before is None or p.start_time < made_before]


async def end(run: Path, handler: Handler, processes: Collection[Process]) -> None:
    """Kill them, and forget how they ended. With them goes what somebody was writing there when he was killed."""
    for process in processes:
        if handler.signal(process, signal.SIGKILL):
            log.info("process %d was started for a caller that is gone: killed", process.pid)
        try:
            async with deadline(END_SECONDS, f"see process {process.pid} end"):
                await handler.wait(process)
        except DeadlineExceeded as error:
            log.warning("%s", describe(error))
            continue
        handler.forget(process)
        (run / "tasks" / f"{process.pid}.{process.start_time}").unlink(missing_ok=True)
    for path in cut_off(run):
        path.unlink(missing_ok=True)


def cut_off(run: Path) -> list[Path]:
    """Records that got no name: NAME.PID.tmp of a writer that lives no more."""
    found = [path for folder in ("tasks", "exits") for path in (run / folder).glob("*.tmp")]
    return [path for path in found if not Path("/proc", path.name.split(".")[-2]).exists()]
