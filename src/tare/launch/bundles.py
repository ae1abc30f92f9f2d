"""A step for other runtimes' bundles: what was made here, detached, takes its place on the node."""

from __future__ import annotations

import os
import stat

from tare.launch import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tare.launch.machine import Machine


def put(machine: Machine, slot: int, path: bytes) -> None:
    """Attach a detached mount at a path of ours, where nothing is: a directory or an empty file is made for it."""
    tree = machine.slots.pop(slot)
    try:
        if stat.S_ISDIR(os.fstat(tree).st_mode):
            os.mkdir(path, 0o700)
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        linux.move_mount(tree, linux.AT_FDCWD, path)
    finally:
        os.close(tree)


OPERATIONS: dict[str, Callable[..., None]] = {"put": put}
