"""Another network namespace, entered by a thread that ends with what it has to do there: a namespace is a thread's own (setns(2))."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def inside(namespace: Path, function: Callable[[], T]) -> T:
    """The function's result, or its error, from within the namespace that a file pins. Raises OSError."""
    results: list[T] = []
    errors: list[BaseException] = []

    def enter() -> None:
        try:
            switch(namespace)
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            errors.append(error)

    thread = threading.Thread(target=enter, name="netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def switch(namespace: Path) -> None:
    """Move the calling thread, which is to end soon, into the namespace that a file pins. Raises OSError."""
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(namespace))
    finally:
        os.close(fd)
