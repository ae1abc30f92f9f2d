"""Bytes that come in chunks: a bounded hand-over between two threads, and a reader that takes them in portions of its own."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable


class Abandoned(Exception):
    """The thread at the other end has given up."""


class Channel:
    """Hands chunks from one thread to another, at most `depth` of them waiting.

    The giver ends with `finish`, with the error that stopped it if one did; the taker that wants no more says `abandon`.
    """

    def __init__(self, depth: int = 8) -> None:
        self._chunks: deque[bytes] = deque()
        self._changed = threading.Condition()
        self._depth = depth
        self._finished = False
        self._abandoned = False
        self._error: BaseException | None = None

    def put(self, chunk: bytes) -> None:
        """Wait for room, hand over. Raises Abandoned."""
        with self._changed:
            while len(self._chunks) >= self._depth and not self._abandoned:
                self._changed.wait()
            if self._abandoned:
                raise Abandoned
            self._chunks.append(chunk)
            self._changed.notify()

    def get(self) -> bytes:
        """The next chunk, b"" after the last. Raises what `finish` was given."""
        with self._changed:
            while not self._chunks and not self._finished:
                self._changed.wait()
            if self._chunks:
                self._changed.notify()
                return self._chunks.popleft()
            if self._error is not None:
                raise self._error
            return b""

    def finish(self, error: BaseException | None = None) -> None:
        """Nothing more comes."""
        with self._changed:
            self._finished, self._error = True, error
            self._changed.notify()

    def abandon(self) -> None:
        """Nothing more is wanted."""
        with self._changed:
            self._abandoned = True
            self._chunks.clear()
            self._changed.notify()


class ChunkReader:
    """Takes portions of any size from chunks of any size; `read` gives the next chunk, b"" at the end. No more than a chunk is held."""

    __slots__ = ("_chunk", "_position", "_read")

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self._chunk = b""
        self._position = 0

    def take(self, size: int) -> bytes:
        """That many bytes, fewer at the end."""
        start = self._position
        self._position = end = start + size
        if end <= len(self._chunk):
            return self._chunk[start:end]
        parts = [self._chunk[start:]]
        missing = size - len(parts[0])
        while missing and self._next():
            parts.append(self._chunk[:missing])
            self._position = len(parts[-1])
            missing -= self._position
        return b"".join(parts)

    def copy(self, size: int, descriptor: int) -> int:
        """Write that many bytes to a file; returns how many there were, fewer at the end."""
        missing = size
        while missing:
            start = self._position
            if start >= len(self._chunk):
                if not self._next():
                    break
                start = 0
            part = memoryview(self._chunk)[start : start + missing]
            written = os.write(descriptor, part)
            self._position = start + written
            missing -= written
        return size - missing

    def skip(self, size: int) -> int:
        """Pass over that many bytes; returns how many there were."""
        missing = size
        while missing:
            available = len(self._chunk) - self._position
            if available >= missing:
                self._position += missing
                return size
            missing -= max(available, 0)
            if not self._next():
                return size - missing
        return size

    def drain(self) -> None:
        """Pass over all that is left."""
        while self._next():
            pass

    def _next(self) -> bool:
        self._chunk = self._read()
        self._position = 0
        return bool(self._chunk)
