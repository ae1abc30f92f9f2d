"""One lock for each pod and container, so that operations on one thing do not overlap and never hold up another's.

A wait for a lock has a deadline, and its error names who has the lock. Locks order nothing on disk: what a killed daemon
held is settled by the intents (`state.operations`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tare.errors import DeadlineExceeded

PATIENCE = 120.0  # seconds


class _Lock:
    __slots__ = ("holder", "lock", "users")

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.holder = ""
        self.users = 0


class Locks:
    """Locks by ID, in memory while somebody holds or awaits them."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._locks: dict[str, _Lock] = {}
        self._patience = patience

    @asynccontextmanager
    async def hold(self, key: str, doing: str) -> AsyncIterator[None]:
        """Have the lock of `key` within the block. Raises DeadlineExceeded, naming the holder, after the patience is over."""
        lock = self._locks.setdefault(key, _Lock())
        lock.users += 1
        try:
            await self._acquire(lock, doing)
            lock.holder = doing
            try:
                yield
            finally:
                lock.lock.release()
        finally:
            lock.users -= 1
            if not lock.users:
                del self._locks[key]

    async def _acquire(self, lock: _Lock, doing: str) -> None:
        if not lock.lock.locked():
            await lock.lock.acquire()
            return
        try:
            async with asyncio.timeout(self._patience):
                await lock.lock.acquire()
        except TimeoutError:
            cause = f"{lock.holder} did not end within {self._patience:g} s"
            raise DeadlineExceeded(doing, step="wait", cause=cause) from None

    def waiting(self) -> int:
        """How many wait for a lock that another has."""
        return sum(lock.users - lock.lock.locked() for lock in self._locks.values())

    def held(self) -> set[str]:
        """The keys that somebody has, or waits for."""
        return set(self._locks)

    def __len__(self) -> int:
        return len(self._locks)
