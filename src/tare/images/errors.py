"""What a pull can fail with. All of it is UNKNOWN on the wire: the kubelet reads the message of a failed PullImage, not its code."""

from __future__ import annotations

import errno

from tare.errors import InvalidArgument, TareError, UnknownError, describe


class PullError(UnknownError):
    """The image could not be had."""


class LayerError(PullError):
    """The archive breaks the rules of tar or of layers."""


class RegistryUnavailable(PullError):
    """No host could be reached, or none that answers. The kubelet matches the message's first word."""

    def __init__(
        self, doing: str, *, step: str | None = None, cause: BaseException | str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(f"RegistryUnavailable: {doing}", step=step, cause=cause, hint=hint)


class SignatureValidationFailed(PullError):
    """The policy does not allow the image, or its signatures do not hold. The kubelet matches the message's first word."""

    def __init__(
        self, doing: str, *, step: str | None = None, cause: BaseException | str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(f"SignatureValidationFailed: {doing}", step=step, cause=cause, hint=hint)


PREFIXED = (RegistryUnavailable, SignatureValidationFailed)


def explain(reference: str, error: Exception, verb: str = "pull") -> TareError:
    """Whatever ended a pull, as the error that its caller sees: the image, the step, the cause, what to try."""
    doing = f"{verb} image {reference}"
    if isinstance(error, InvalidArgument):
        return error
    if isinstance(error, TareError):
        kind = next((known for known in PREFIXED if isinstance(error, known)), PullError)
        words = error.doing.removeprefix(f"{kind.__name__}: ")
        cause = f"{words}: {error.cause}" if error.cause else words
        return kind(doing, step=error.step, cause=cause, hint=error.hint)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "free some space on the image disk" if full else None
    return PullError(doing, cause=describe(error), hint=hint)
