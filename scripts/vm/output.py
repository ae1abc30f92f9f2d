"""What comes out of the guest: the bytes that its command writes, then one line that says how that ended.

The line is `MARK CODE`, where MARK is drawn anew for each guest, so that nothing that a test prints can be taken for it. Bytes in,
bytes and an exit code out: reading them from somewhere and showing them is for others.
"""

from __future__ import annotations


class Output:
    """Takes the guest's stream apart. `code` is the command's exit code once it has been told, None before."""

    def __init__(self, mark: str) -> None:
        self.code: int | None = None
        self._mark = f"\n{mark} ".encode()
        self._kept = b""

    def feed(self, data: bytes) -> bytes:
        """What of the stream so far is the command's own and was not returned before. After the closing line there is none."""
        if self.code is not None:
            return b""
        stream = self._kept + data
        place = stream.find(self._mark)
        if place < 0:
            self._kept = stream[len(stream) - held_back(stream, self._mark) :]
            return stream[: len(stream) - len(self._kept)]
        own, line = stream[:place], stream[place + len(self._mark) :]
        self._kept = stream[place:]
        end = line.find(b"\n")
        if end >= 0:
            self.code = int(line[:end])
        return own

    def rest(self) -> bytes:
        """What was held back as the possible beginning of a closing line that never came."""
        kept, self._kept = self._kept, b""
        return b"" if self.code is not None else kept


def held_back(stream: bytes, mark: bytes) -> int:
    """How many of the last bytes may be the beginning of the mark."""
    return next(length for length in range(min(len(stream), len(mark)), -1, -1) if stream.endswith(mark[:length]))
