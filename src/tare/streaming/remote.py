"""Kubernetes' remote command: which streams a session has under each sub-protocol, and how its end is told. Pure.

    SPDY        v1 (or no name)  error, stdin, stdout, stderr; failures as text on the error stream
                v2, v3           the same; v3 has resize too
                v4               the end as a JSON Status on the error stream, with the exit code
    WebSocket   see `channels`

Source: Kubernetes, remote command sub-protocols (k8s.io/apimachinery, remotecommand constants) and the Status object of its API.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ERROR, STDIN, STDOUT, STDERR, RESIZE = "error", "stdin", "stdout", "stderr", "resize"
V1, V2, V3, V4 = (f"{name}channel.k8s.io" for name in ("", "v2.", "v3.", "v4."))
SPDY_PROTOCOLS = (V4, V3, V2, V1)
MAX_SIZE = 0xFFFF
MAX_RESIZE = 4096  # bytes of one message of a window's size
MAX_RESIZES = 16 * MAX_RESIZE  # bytes of those that come at once
BLANK = re.compile(r"\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The streams that a request asked for. A terminal has no stderr of its own."""

    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    tty: bool = False

    def names(self, protocol: str) -> tuple[str, ...]:
        """What the client opens, under a SPDY sub-protocol."""
        resize = self.tty and protocol in (V3, V4)
        chosen = ((STDIN, self.stdin), (STDOUT, self.stdout), (STDERR, self.stderr and not self.tty), (RESIZE, resize))
        return (ERROR, *(name for name, asked in chosen if asked))


def chosen(offered: Sequence[str], known: Sequence[str]) -> str | None:
    """The first of the client's protocols that is known here; v1's name for a client that offers none; None where nothing fits."""
    if not offered:
        return V1
    return next((name for name in offered if name in known), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a session ended: an exit code, or words of what went wrong."""

    code: int = 0
    error: str = ""


def status(outcome: Outcome) -> bytes:
    """The Status object of v4 and v5."""
    body: dict[str, object]
    if outcome.error:
        body = {"status": "Failure", "message": outcome.error, "reason": "InternalError", "code": 500}
        body["details"] = {"causes": [{"message": outcome.error}]}
    elif outcome.code:
        message = f"command terminated with non-zero exit code: exit status {outcome.code}"
        causes = [{"reason": "ExitCode", "message": str(outcome.code)}]
        body = {"status": "Failure", "message": message, "reason": "NonZeroExitCode", "details": {"causes": causes}}
    else:
        body = {"status": "Success"}
    return json.dumps({"metadata": {}, **body}).encode()


def words(outcome: Outcome) -> bytes:
    """The end as v1 to v3 tell it: nothing for success."""
    if outcome.error:
        return outcome.error.encode()
    if outcome.code:
        return f"command terminated with non-zero exit code: exit status {outcome.code}".encode()
    return b""


def told(protocol: str, outcome: Outcome) -> bytes:
    """What goes on the error stream."""
    return words(outcome) if protocol in (V1, V2, V3) else status(outcome)


@dataclass(frozen=True, slots=True)
class Size:
    """A terminal's window, in characters."""

    width: int
    height: int


class Sizes:
    """Window sizes out of the bytes of a resize stream: JSON objects, one after the other, in pieces of any length."""

    def __init__(self) -> None:
        self._rest = ""
        self._decoder = json.JSONDecoder()

    def feed(self, data: bytes) -> list[Size]:
        """The sizes that are whole by now; what is no size is passed over.

        Raises ValueError for an object that never ends, and for more at once than a window's sizes can be.
        """
        if len(self._rest) + len(data) > MAX_RESIZES:
            raise ValueError(f"more than {MAX_RESIZES} bytes of a window's sizes at once")
        text = self._rest + data.decode("utf-8", "replace")
        found: list[Size] = []
        at = blank(text, 0)
        while at < len(text):
            try:
                value, end = self._decoder.raw_decode(text, at)
            except json.JSONDecodeError:
                if len(text) - at > MAX_RESIZE:
                    raise ValueError("a window's size that is no JSON object") from None
                break
            except RecursionError:
                raise ValueError("a window's size that is nested without end") from None
            at = blank(text, end)
            size = size_of(value)
            if size is not None:
                found.append(size)
        self._rest = text[at:]
        return found


def blank(text: str, at: int) -> int:
    """Where the blanks that begin here end."""
    found = BLANK.match(text, at)
    return found.end() if found else at


def size_of(value: object) -> Size | None:
    """A size from its object, where that is one."""
    if not isinstance(value, Mapping):
        return None
    width, height = value.get("Width"), value.get("Height")
    if isinstance(width, int) and isinstance(height, int) and 0 < width <= MAX_SIZE and 0 < height <= MAX_SIZE:
        return Size(width, height)
    return None
