"""What has come from a client and is not yet taken, with the bounds from which on nothing more is read.

An inbox has a bound of its own, and all inboxes of one connection can have a budget together.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

HIGH = 1 << 20  # bytes in an inbox from which on nothing more is read
MANY = 4096  # pieces, likewise: small ones take more room than their bytes
BUDGET = 8 << 20  # bytes in all inboxes of a connection, likewise
PIECE = 64  # bytes that a piece takes besides its own

Piece = TypeVar("Piece", bytes, bytes | str)


class Budget:
    """What the inboxes of one connection hold together, in bytes."""

    def __init__(self, most: int = BUDGET) -> None:
        self._most, self.size = most, 0
        self.room = asyncio.Event()
        self.room.set()

    def add(self, pieces: int, size: int) -> None:
        """So much more, or less where it is below 0."""
        self.size += pieces * PIECE + size
        if self.size < self._most:
            self.room.set()
        else:
            self.room.clear()


class Inbox(Generic[Piece]):
    """Pieces that have come and are not yet taken, and how many bytes they are.

    `touched` (seconds of the loop's clock): when somebody took something last.
    """

    def __init__(self, taken: Callable[[int], None] | None = None, budget: Budget | None = None) -> None:
        self._taken = taken
        self._budget = budget or Budget()
        self.touched = 0.0
        self._pieces: deque[Piece] = deque()
        self._size = 0
        self._ended = False
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    def put(self, piece: Piece) -> None:
        """One more."""
        if self._ended:
            return
        self._pieces.append(piece)
        self._size += len(piece)
        self._budget.add(1, len(piece))
        self._news.set()
        if self._size >= HIGH or len(self._pieces) >= MANY:
            self._room.clear()

    def end(self) -> None:
        """There will be no more; what is here can still be taken."""
        self._ended = True
        self._news.set()

    def discard(self) -> None:
        """Nobody will take what is here or comes."""
        self._clear()
        self._ended = True
        self._news.set()

    def _clear(self) -> None:
        self._budget.add(-len(self._pieces), -self._size)
        self._pieces.clear()
        self._size = 0
        self._room.set()

    def size(self) -> int:
        """Bytes that are here."""
        return self._size

    def full(self) -> bool:
        """Whether there is no place for more here, whatever there is elsewhere."""
        return not self._room.is_set()

    def held(self) -> bool:
        """Whether nothing more is to be read: this is full, or all are together."""
        return self.full() or not self._budget.room.is_set()

    async def room(self) -> None:
        """Until there is place for more."""
        while self.held():
            await self._room.wait()
            await self._budget.room.wait()

    def touch(self) -> None:
        """Something that came from here has gone on its way."""
        self.touched = asyncio.get_running_loop().time()

    async def get(self) -> Piece | None:
        """What came next; None at the end."""
        while not self._pieces:
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        piece = self._pieces.popleft()
        self._size -= len(piece)
        self._budget.add(-1, -len(piece))
        self.touch()
        if self._size < HIGH and len(self._pieces) < MANY:
            self._room.set()
        if self._taken is not None:
            self._taken(len(piece))
        return piece

    def more(self: Inbox[bytes], first: bytes) -> bytes:
        """Bytes with those that came right behind them: fewer turns for a stream of small frames."""
        if not self._pieces:
            return first
        rest = self._size
        whole = b"".join((first, *self._pieces))
        self._clear()
        if self._taken is not None:
            self._taken(rest)
        return whole
