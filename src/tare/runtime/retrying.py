"""What could not be taken back or finished is tried again while the daemon serves: after some seconds, then at pauses that double.

A logger that did not answer, a disk that was full, a process that would not end: when that is over, what it has left standing goes without
anybody asking for it. Until then `tare doctor` tells of it, and the next daemon takes it up in any case. Nothing is tried while somebody is at
work on the same pod or container. Changes of limits are left to the next start, since a later one may hold by now.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tare.errors import describe
from tare.runtime import recovery, updating
from tare.state.operations import Intent

if TYPE_CHECKING:
    from tare.runtime.service import Runtime

log = logging.getLogger(__name__)
FIRST_PAUSE, LAST_PAUSE = 5.0, 600.0
LEFT_ALONE = {updating.UPDATE_CONTAINER.name, updating.UPDATE_POD.name}
TRIED = {operation.name for operation, _ in (*recovery.UNDONE, *recovery.FINISHED)} - LEFT_ALONE


@dataclass(slots=True)
class Next:
    """When an operation is tried again, on the event loop's clock, and how long the pause before that is."""

    at: float
    pause: float = FIRST_PAUSE


class Retries:
    """Those of one runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._next: dict[str, Next] = {}

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(FIRST_PAUSE)
            await self.round()

    async def round(self) -> None:
        """Try all whose time has come."""
        now = asyncio.get_running_loop().time()
        failed = {
            key: intent for key, intent in self._runtime.parts.operations.failed().items() if intent.operation in TRIED
        }
        self._next = {key: self._next.get(key) or Next(now + FIRST_PAUSE) for key in failed}
        for key, due in self._next.items():
            if due.at <= now:
                await self._again(key, failed[key], due)

    async def _again(self, key: str, intent: Intent, due: Next) -> None:
        subject = intent.subject.get("container") or intent.subject.get("pod") or key
        doing = f"finish {intent.operation} of {subject}"
        try:
            async with self._runtime.locks.hold(subject, doing):
                await recovery.again(self._runtime.parts, key, intent.operation)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is tried again
            due.pause = min(2 * due.pause, LAST_PAUSE)
            log.warning("%s; tried again in %g s", describe(error), due.pause)
            due.at = asyncio.get_running_loop().time() + due.pause
        else:
            log.info("%s: done", doing)
