"""The one family of errors that reaches a caller, each with the gRPC status code it is sent as.

An error says in plain words what was being done, at which step, to what, in whose words it failed, and what to try.
Errors that only one module raises are defined there, as subclasses of these. No gRPC import: `cri/` maps the code names.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar


class TareError(Exception):
    """Something that was asked for could not be done.

    `doing` is a phrase such as "pull image docker.io/library/busybox:latest"; `step` names the stage of a multi-step
    operation; `cause` is the kernel's, the registry's or a library's own word; `hint` is what the reader can try.
    """

    code: ClassVar[str] = "INTERNAL"

    def __init__(
        self, doing: str, *, step: str | None = None, cause: BaseException | str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(doing)
        self.doing = doing
        self.step = step
        self.cause = describe(cause) if isinstance(cause, BaseException) else cause
        self.hint = hint

    def __str__(self) -> str:
        text = self.doing
        if self.step:
            text += f": at step {self.step}"
        if self.cause:
            text += f": {self.cause}"
        if self.hint:
            text += f" ({self.hint})"
        return text


class InternalError(TareError):
    """A defect of Tare or of the machine under it."""


class InvalidArgument(TareError):
    """The request itself is wrong; asking again will not help."""

    code = "INVALID_ARGUMENT"


class NotFound(TareError):
    """No such pod, container or image."""

    code = "NOT_FOUND"


class AlreadyExists(TareError):
    """The name is taken; the message names the holder."""

    code = "ALREADY_EXISTS"


class FailedPrecondition(TareError):
    """The thing exists, but its state (or the node's) does not allow this."""

    code = "FAILED_PRECONDITION"


class DeadlineExceeded(TareError):
    """A wait came to its end; the message names the stage that was waited for."""

    code = "DEADLINE_EXCEEDED"


class ResourceExhausted(TareError):
    """The disk, an address range or another bounded thing is used up."""

    code = "RESOURCE_EXHAUSTED"


class Unavailable(TareError):
    """Something needed is not there now and may be later."""

    code = "UNAVAILABLE"


class PermissionDenied(TareError):
    """The caller may not have this."""

    code = "PERMISSION_DENIED"


class UnknownError(TareError):
    """Reported as UNKNOWN because the kubelet looks for its message, not for its code."""

    code = "UNKNOWN"


def describe(error: BaseException) -> str:
    """An exception in one line: a `TareError` in its own words, an OSError as the kernel's words and the path."""
    if isinstance(error, TareError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
