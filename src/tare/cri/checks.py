"""What a field of a request may hold. Each check returns the value in the type of our records, or raises InvalidArgument naming the field.

Checked here is what is wrong whatever the node and the image are: numbers out of the kernel's range, relative paths, NUL
bytes. What depends on the node (whether a path exists, a profile is loaded, a CPU is there) is the runtime's to find out.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import Final, TypeVar

from tare.errors import InvalidArgument

Choice = TypeVar("Choice", bound=enum.IntEnum)

PATH_MAX: Final = 4096
# The largest ID is kept for "no ID" (credentials(7)).
MAX_ID: Final = (1 << 32) - 2
CPUSET: Final = re.compile(r"[0-9]{1,9}(-[0-9]{1,9})?(,[0-9]{1,9}(-[0-9]{1,9})?)*")


def refuse(field: str, cause: str, hint: str | None = None) -> InvalidArgument:
    """The error for a field, named by its path in the request ("config.metadata.name")."""
    return InvalidArgument(f"check {field}", cause=cause, hint=hint)


def text(value: str, field: str) -> str:
    """Without NUL bytes, which end a string for the kernel."""
    if "\0" in value:
        raise refuse(field, "it holds a NUL byte")
    return value


def texts(values: Iterable[str], field: str) -> tuple[str, ...]:
    """Each without NUL bytes."""
    return tuple(text(value, f"{field}[{index}]") for index, value in enumerate(values))


def present(value: str, field: str) -> str:
    """Not empty, without NUL bytes."""
    if not value:
        raise refuse(field, "it is empty")
    return text(value, field)


def words(values: Iterable[str], field: str) -> tuple[str, ...]:
    """Each not empty and without blanks or control characters: they stand in one line of a file."""
    found = tuple(values)
    for index, value in enumerate(found):
        if not value or any(char.isspace() or not char.isprintable() for char in value):
            raise refuse(f"{field}[{index}]", f"{value!r} is not one word")
    return found


def absolute(value: str, field: str) -> str:
    """An absolute path, no longer than the kernel takes."""
    if not present(value, field).startswith("/"):
        raise refuse(field, f"{value!r} is not an absolute path")
    return path(value, field)


def optional_absolute(value: str, field: str) -> str:
    """Empty, or an absolute path."""
    return absolute(value, field) if value else ""


def path(value: str, field: str) -> str:
    """Any path that the kernel could take."""
    if len(text(value, field).encode()) >= PATH_MAX:
        raise refuse(field, f"the path is longer than {PATH_MAX - 1} bytes")
    return value


def inside(value: str, field: str) -> str:
    """Empty, or a path relative to some directory that cannot leave it."""
    if value.startswith("/") or ".." in value.split("/"):
        raise refuse(field, f"{value!r} must be relative and without '..'")
    return path(value, field)


def upward_free(value: str, field: str) -> str:
    """A path, absolute or not, that has no ".." in it."""
    if ".." in value.split("/"):
        raise refuse(field, f"{value!r} must not hold '..'")
    return path(value, field)


def within(value: int, low: int, high: int, field: str, unit: str = "") -> int:
    """From `low` to `high`, both included."""
    if not low <= value <= high:
        raise refuse(field, f"{value} is not between {low} and {high}{' ' + unit if unit else ''}")
    return value


def set_within(value: int, low: int, high: int, field: str, unit: str = "") -> int:
    """0 for not set, or from `low` to `high`."""
    return within(value, low, high, field, unit) if value else 0


def user_id(value: int, field: str) -> int:
    """A user's or group's ID."""
    return within(value, 0, MAX_ID, field)


def choice(kind: type[Choice], value: int, field: str) -> Choice:
    """A value that the enum has; protobuf lets any number through."""
    try:
        return kind(value)
    except ValueError as error:
        raise refuse(field, f"{value} is no {kind.__name__} that this runtime knows") from error


def cpuset(value: str, field: str) -> str:
    """Empty, or a list of numbers and ascending ranges as in cpuset(7): "0-3,8"."""
    if value and not CPUSET.fullmatch(value):
        raise refuse(field, f"{value!r} is not a list such as 0-3,8")
    for part in filter(None, value.split(",")):
        first, _, last = part.partition("-")
        if last and int(last) < int(first):
            raise refuse(field, f"the range {part} goes down")
    return value
