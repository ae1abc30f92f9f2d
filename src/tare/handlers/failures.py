"""What the launcher's children say of their failure, as errors of a container's start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tare.errors import TareError
from tare.handlers.channel import Refused


class StartFailed(TareError):
    """A container's process could not be started: at which step, with which errno (0: none), in the kernel's words."""

    def __init__(self, doing: str, *, step: str, cause: str, errno: int) -> None:
        super().__init__(doing, step=step, cause=cause, hint=advice(step, errno))
        self.errno = errno


def failed(error: Refused, doing: str, process: Mapping[str, Any]) -> StartFailed:
    """What the launcher's child said, as an error of the process's start; where execve failed, with the program's name."""
    cause = error.cause or ""
    if error.step == "exec":
        cause = f"{process['args'][0]}: {cause}"
    return StartFailed(doing, step=error.step or "setup", cause=cause, errno=error.errno)


def advice(step: str, errno: int) -> str | None:
    """What to try, for the failures that users meet most."""
    if step == "exec" and errno == 2:
        return "is the command in the image, and is its interpreter?"
    if step == "exec" and errno == 13:
        return "is the command a file with execute permission?"
    if step == "exec" and errno == 8:
        return "is the command a program for this machine's architecture, or a script with a #! line?"
    return None
