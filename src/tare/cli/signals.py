"""Signals noted while `tare run` works, to be passed on to its container."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GIVE_UP = 3


class Signals:
    """A context in which SIGINT, SIGTERM and SIGHUP are noted instead of ending this process; the third raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Signals:
        for number in PASSED_ON:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
        if len(self.received) >= GIVE_UP:
            raise KeyboardInterrupt

    @property
    def exit_code(self) -> int:
        """What a shell says of a process ended by the first of them; 0 where none came."""
        return 128 + self.received[0] if self.received else 0
