"""The one seam between our errors and gRPC's: which status code and which words a caller gets.

A `TareError` is sent in its own words under its own code. Where something is used up that is the code, and which it is is looked
up and said (`storage.room`). Anything else is a defect: INTERNAL, in one line. What it was in full goes to the daemon's log, since
a traceback tells a client nothing and may hold what it should not see.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import ClassVar, Final

import grpc

from tare.errors import InvalidArgument, TareError, UnknownError, describe
from tare.storage.room import shortage

# A status message travels percent-encoded in a header, of which clients take 8 KiB in all.
MAX_MESSAGE_BYTES: Final = 2048
CUT: Final = " … "


class Unimplemented(TareError):
    """A method of CRI that this version does not have."""

    code: ClassVar[str] = "UNIMPLEMENTED"


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a failed call is answered with."""

    code: grpc.StatusCode
    message: str
    defect: bool = False


def refusal(method: str, error: Exception) -> Refusal:
    """The answer to a call of `method` that ended in `error`; `defect` where the error was not foreseen."""
    used_up = (
        shortage(error) if isinstance(error, OSError | TareError | sqlite3.Error | RuntimeError | MemoryError) else None
    )
    if used_up is not None:
        return exhausted(method, error, used_up)
    if isinstance(error, TareError):
        return Refusal(grpc.StatusCode[error.code], shortened(str(error)))
    line = " ".join(describe(error).split())
    return Refusal(grpc.StatusCode.INTERNAL, shortened(f"{method}: unexpected error: {line}"), defect=True)


def exhausted(method: str, error: Exception, used_up: str) -> Refusal:
    """The answer where something is used up: which thing comes last. A code that its client goes by stays what it is."""
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, TareError) and error.code not in ("INTERNAL", "FAILED_PRECONDITION"):
        code = grpc.StatusCode[error.code]
    words = str(error) if isinstance(error, TareError) else f"{method}: {describe(error)}"
    return Refusal(code, shortened(words if used_up in words else f"{words}: {used_up}"))


def shortened(message: str) -> str:
    """The message with its middle cut out where it is too long for a header: both ends matter (the kubelet reads the beginning)."""
    encoded = message.encode(errors="replace")
    if len(encoded) <= MAX_MESSAGE_BYTES:
        return encoded.decode()
    half = (MAX_MESSAGE_BYTES - len(CUT.encode())) // 2
    return encoded[:half].decode(errors="ignore") + CUT + encoded[-half:].decode(errors="ignore")


def pull_error(error: TareError) -> TareError:
    """A failed pull as UNKNOWN: only then does a kubelet read the beginning of the message. A malformed reference stays what it is."""
    if isinstance(error, InvalidArgument | UnknownError):
        return error
    return UnknownError(error.doing, step=error.step, cause=error.cause, hint=error.hint)
