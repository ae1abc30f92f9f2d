"""The one seam between our errors and gRPC's: which status code and which words a caller gets. Pure.

A `TareError` is sent in its own words under its own code. Anything else is a defect: INTERNAL, in one line. What it was in
full goes to the daemon's log, since a traceback tells a client nothing and may hold what it should not see.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import grpc

from tare.errors import InvalidArgument, TareError, UnknownError, describe

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
    if isinstance(error, TareError):
        return Refusal(grpc.StatusCode[error.code], shortened(str(error)))
    line = " ".join(describe(error).split())
    return Refusal(grpc.StatusCode.INTERNAL, shortened(f"{method}: unexpected error: {line}"), defect=True)


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
