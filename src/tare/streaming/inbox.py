"""What has come from a client and is not yet taken, with the bound from which on nothing more is read."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

HIGH = 1 << 20  # bytes in an inbox from which on nothing more is read
MANY = 4096  # pieces, likewise: small ones take more room than their bytes

Piece = TypeVar("Piece", bytes, bytes | str)


class Inbox(Generic[Piece]):
    """Pieces that have come and are not yet taken, and how many bytes they are."""

    def __init__(self, taken: Callable[[int], None] | None = None) -> None:
        self._taken = taken
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
        self._news.set()
        if self._size >= HIGH or len(self._pieces) >= MANY:
            self._room.clear()

    def end(self) -> None:
        """There will be no more; what is here can still be taken."""
        self._ended = True
        self._news.set()

    def discard(self) -> None:
        """Nobody will take what is here or comes."""
        self._pieces.clear()
        self._size = 0
        self._ended = True
        self._news.set()
        self._room.set()

    def full(self) -> bool:
        """Whether there is no place for more."""
        return not self._room.is_set()

    async def room(self) -> None:
        """Until there is place for more."""
        await self._room.wait()

    async def get(self) -> Piece | None:
        """What came next; None at the end."""
        while not self._pieces:
            if self._ended:
                return None
            self._news.clear()
            await self._news.wait()
        piece = self._pieces.popleft()
        self._size -= len(piece)
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
        self._pieces.clear()
        self._size = 0
        self._room.set()
        if self._taken is not None:
            self._taken(rest)
        return whole
