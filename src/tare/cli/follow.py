"""Reads a container's log file: to its end, from its last lines, or on and on across rotation.

A rotated file is renamed away and a new one appears under its path once the runtime has closed the old one. So what is in the
old one is whole when another file is seen at the path, and is read to its end first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import FileIO

from tare.cli import crilog

BLOCK = 1 << 16


class LogFile:
    """The file at `path`, which may not be there yet. Closed by its user."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file: FileIO | None = None
        self._splitter = crilog.Splitter()

    def __enter__(self) -> LogFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go; reading again begins at its start."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._splitter.reset()

    def read(self) -> Iterator[bytes]:
        """The lines that came since the last call, going over to a newer file at the path if there is one."""
        if self._file is None and not self._open():
            return
        while True:
            replaced = self._replaced()
            yield from self._read_on()
            if not replaced:
                return
            self.close()
            if not self._open():
                return

    def skip_to_last(self, count: int) -> list[bytes]:
        """The entries of the container's last `count` lines; `read` goes on after them. Raises LogFormatError."""
        if self._file is None and not self._open():
            return []
        file = self._opened()
        end = file.seek(0, os.SEEK_END)
        block = BLOCK
        while True:
            start = max(0, end - block)
            file.seek(start)
            self._splitter.reset()
            lines = self._splitter.feed(read_exactly(file, end - start))
            if start > 0:
                lines = lines[1:]
            found = crilog.last(lines, count)
            if start == 0 or len(found) < len(lines):
                return found
            block *= 4

    def _opened(self) -> FileIO:
        if self._file is None:
            raise ValueError("log file is closed")
        return self._file

    def _open(self) -> bool:
        try:
            self._file = open(self.path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        except FileNotFoundError:
            return False
        return True

    def _read_on(self) -> Iterator[bytes]:
        file = self._opened()
        if os.fstat(file.fileno()).st_size < file.tell():
            file.seek(0)  # truncated in place
            self._splitter.reset()
        while data := file.read(BLOCK):
            yield from self._splitter.feed(data)

    def _replaced(self) -> bool:
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False
        ours = os.fstat(self._opened().fileno())
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)


def read_exactly(file: FileIO, count: int) -> bytes:
    """Up to `count` bytes, fewer only at the file's end."""
    parts = []
    while count > 0 and (data := file.read(count)):
        parts.append(data)
        count -= len(data)
    return b"".join(parts)
