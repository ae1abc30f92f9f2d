"""Kernel settings under /proc/sys, of the network namespace of the calling thread."""

from __future__ import annotations

from pathlib import Path

from tare.errors import FailedPrecondition

ROOT = Path("/proc/sys")


def path_of(*key: str) -> Path:
    """The file of a setting whose name has these parts; an interface's name, which may hold dots, is one part."""
    return ROOT.joinpath(*key)


def ensure(value: str, *key: str) -> None:
    """Give the setting this value if it has another: where /proc/sys is read-only, one that is right already will do.

    Raises FailedPrecondition with the command that an administrator would give.
    """
    path = path_of(*key)
    try:
        if path.read_text().strip() != value:
            path.write_text(value)
    except OSError as error:
        name = "/".join(key)
        raise FailedPrecondition(f"set {name}={value}", cause=error, hint=f"try: sysctl -w {name}={value}") from error


def read(*key: str) -> str:
    """What a setting is. Raises FailedPrecondition."""
    try:
        return path_of(*key).read_text().strip()
    except OSError as error:
        raise FailedPrecondition(f"read {'/'.join(key)}", cause=error) from error
