"""What each writable layer takes, known without counting it at each question.

Nothing tells of changes below a directory, so a layer is counted anew when somebody asks and the last count is old: no older than
`FRESH` seconds where counting is cheap, and where it is not, as old as makes counting one part in `SHARE` of the time. Who asks waits a
moment for counts that are due, since most take microseconds; what takes longer is answered as it was counted last, with that time, and the
count goes on for the next who asks. One thread counts at a time, one layer after the other, and none when nobody asks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

from tare.storage.overlay import Usage

log = logging.getLogger(__name__)
FRESH = 1.0  # seconds
SHARE = 50
SLICE = 0.01  # seconds
PATIENCE = 0.25  # seconds that who asks waits for counts that are due


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """`at` is when it was counted, in ns since the epoch."""

    bytes: int
    inodes: int
    at: int


@dataclass(slots=True)
class Known:
    """A size, and until when (monotonic) it will do."""

    size: Size
    until: float


class Sizes:
    """`count` counts a container's layer, blocking, and says how many seconds of CPU time that took."""

    def __init__(self, count: Callable[[str], tuple[Usage, float]], patience: float = PATIENCE) -> None:
        self._count = count
        self._patience = patience
        self._known: dict[str, Known] = {}
        self._due: dict[str, None] = {}
        self._work: asyncio.Task[None] | None = None

    async def get(self, container_ids: Iterable[str]) -> Mapping[str, Size]:
        """Sizes as of now or a while ago; without those that have never been counted and take longer than a moment."""
        asked = list(container_ids)
        now = time.monotonic()
        due = [item for item in asked if item not in self._known or self._known[item].until <= now]
        if due:
            self._due.update(dict.fromkeys(due))
            if self._work is None:
                self._work = asyncio.ensure_future(self._count_due())
            await asyncio.wait((self._work,), timeout=self._patience)
        return {item: self._known[item].size for item in asked if item in self._known}

    def keep(self, container_ids: Set[str]) -> None:
        """Forget all others."""
        for item in self._known.keys() - container_ids:
            del self._known[item]

    async def _count_due(self) -> None:
        try:
            while self._due:
                for item, known in (await asyncio.to_thread(self._count_some, list(self._due))).items():
                    self._due.pop(item)
                    if known is not None:
                        self._known[item] = known
        finally:
            self._work = None

    def _count_some(self, due: list[str]) -> dict[str, Known | None]:
        """As many as can be counted in a short while, one at least: those who wait for the small ones do not wait for the next big one."""
        found: dict[str, Known | None] = {}
        end = time.monotonic() + SLICE
        for item in due:
            found[item] = self._count_one(item)
            if time.monotonic() > end:
                break
        return found

    def _count_one(self, item: str) -> Known | None:
        try:
            usage, cost = self._count(item)
        except OSError as error:
            # It is being removed, or its disk has trouble: it keeps the size that it had, and is tried again when asked for.
            log.debug("the writable layer of container %s was not counted: %s", item, error)
            return None
        size = Size(bytes=usage.bytes, inodes=usage.inodes, at=time.time_ns())
        return Known(size, time.monotonic() + max(FRESH, cost * SHARE))
