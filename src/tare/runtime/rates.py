"""How much CPU something uses now, from what it had used at two questions. Pure; nothing is sampled between questions."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

SECOND = 1_000_000_000
SETTLED = SECOND  # a rate over less than this is mostly noise, so questions that come faster look further back


@dataclass(frozen=True, slots=True)
class Mark:
    """`usage` in nanoseconds of CPU, at `clock` in nanoseconds."""

    usage: int
    clock: int


class Rates:
    """Nanoseconds of CPU a second, by a key."""

    def __init__(self) -> None:
        self._marks: dict[str, tuple[Mark | None, Mark]] = {}

    def of(self, key: str, usage: int, clock: int) -> int | None:
        """The rate since the last question, or since the one before where that was less than a second ago; None at the first."""
        earlier, last = self._marks.get(key, (None, None))
        now = Mark(usage, clock)
        if last is None or usage < last.usage:
            self._marks[key] = (None, now)
            return None
        fast = clock - last.clock < SETTLED
        base = earlier if fast and earlier is not None else last
        if not fast:
            self._marks[key] = (last, now)
        elapsed = clock - base.clock
        return (usage - base.usage) * SECOND // elapsed if elapsed > 0 else None

    def keep(self, keys: Set[str]) -> None:
        """Forget all others."""
        for key in self._marks.keys() - keys:
            del self._marks[key]
