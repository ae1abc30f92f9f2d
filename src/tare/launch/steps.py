"""The loop that walks a plan's steps in a child, and what its steps share.

Everything is looked up before the first step: from then on there is no import, no lookup of names, no printing of a traceback.
A step that fails ends the child, with the step's label, the errno and the kernel's subject sent to the launcher.
"""

from __future__ import annotations

import os
import sys

from tare.launch import (
    attributes,
    bundles,
    copying,
    credentials,
    fresh,
    gates,
    hooks,
    labels,
    listener,
    mounts,
    overlays,
    packets,
    staging,
    userns,
    wire,
)
from tare.launch.machine import Machine

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket
    from collections.abc import Callable
    from typing import Any

    from tare.launch.plan import Step

OPERATIONS: dict[str, Callable[..., None]] = {
    **gates.OPERATIONS,
    **mounts.OPERATIONS,
    **overlays.OPERATIONS,
    **bundles.OPERATIONS,
    **copying.OPERATIONS,
    **fresh.OPERATIONS,
    **userns.OPERATIONS,
    **staging.OPERATIONS,
    **credentials.OPERATIONS,
    **attributes.OPERATIONS,
    **labels.OPERATIONS,
    **hooks.OPERATIONS,
    **listener.OPERATIONS,
}


def resolve(
    steps: list[Step], operations: dict[str, Callable[..., None]] = OPERATIONS
) -> list[tuple[Callable[..., None], str, tuple[Any, ...]]]:
    """Steps with their functions in the place of the names."""
    return [(operations[step[0]], step[1], step[2:]) for step in steps]


def run(machine: Machine, steps: list[tuple[Callable[..., None], str, tuple[Any, ...]]]) -> None:
    """All of them, or the end of this process."""
    for function, label, arguments in steps:
        try:
            function(machine, *arguments)
        except OSError as error:
            fail(machine.status, label, error)
        except BaseException:  # noqa: BLE001 - whatever it is, it ends this child and is told to the launcher
            fail_with(machine.status, label)


def fail(status: _socket.socket, label: str, error: OSError) -> None:
    """Say what failed, and end."""
    try:
        packets.send(status, wire.FAILED, 0, described(label, error))
    finally:
        os._exit(1)


def described(label: str, error: OSError) -> tuple[bytes, int, bytes]:
    """What failed: at which step, with which errno, in the kernel's words, with its subject."""
    subject = os.fsencode(error.filename) if isinstance(error.filename, str | bytes) else b""
    words = os.fsencode(error.strerror or str(error))
    return os.fsencode(label), error.errno or 0, words + (b": " + subject) * bool(subject)


def fail_with(status: _socket.socket, label: str) -> None:
    """Say that the exception being handled, no OSError, was not foreseen, and end."""
    fail(status, label, unforeseen())


def unforeseen() -> OSError:
    """The exception being handled as an OSError without a number."""
    error = sys.exc_info()[1]
    return OSError(0, f"{type(error).__name__}: {error}")
