"""What a value of a JSON configuration may be: small checks that are put together into tables (`schema`).

A check takes a value and the JSON path it is at, and raises InvalidConfig with the path that is wrong. Plain functions and no
library: all of it runs each time that a container is made.
"""

from __future__ import annotations

from tare.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    Check = Callable[[Any, str], None]

INT32, INT64, UINT32, UINT64 = (1 << 31) - 1, (1 << 63) - 1, (1 << 32) - 1, (1 << 64) - 1
SHOWN = 60  # characters of a wrong value that an error repeats


class InvalidConfig(InvalidArgument):
    """A configuration that is refused: `path` is where ("process.args[1]"), `problem` what is wrong there."""

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(path or "the configuration", cause=problem)
        self.path = path
        self.problem = problem


def name_of(value: object) -> str:
    """A value's JSON type, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an object" if isinstance(value, dict) else "an array"


def show(value: object) -> str:
    """A wrong value, as far as it helps."""
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def expected(what: str, value: object, path: str) -> InvalidConfig:
    """The error for a value of another type."""
    return InvalidConfig(path, f"{what} is expected, not {name_of(value)}")


def boolean(value: Any, path: str) -> None:
    """true or false."""
    if not isinstance(value, bool):
        raise expected("a boolean", value, path)


def text(value: Any, path: str) -> None:
    """A string that the kernel can take whole."""
    if not isinstance(value, str):
        raise expected("a string", value, path)
    if "\0" in value:
        raise InvalidConfig(path, "there is a NUL byte in it")
    if not value.isascii():
        try:
            value.encode("utf-8", "surrogateescape")  # which is how bytes that are no text come and go
        except UnicodeEncodeError:
            raise InvalidConfig(path, "half of a surrogate pair is in it") from None


def filled(value: Any, path: str) -> None:
    """A string that is not empty."""
    text(value, path)
    if not value:
        raise InvalidConfig(path, "is empty")


def absolute(value: Any, path: str) -> None:
    """An absolute path."""
    text(value, path)
    if not value.startswith("/"):
        raise InvalidConfig(path, f"{show(value)} is not an absolute path")


def variable(value: Any, path: str) -> None:
    """NAME=value."""
    text(value, path)
    if value.find("=") < 1:
        raise InvalidConfig(path, f"{show(value)} is not of the form NAME=value")


def whole(lowest: int, highest: int) -> Check:
    """A whole number within bounds."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool):
            if isinstance(value, float):
                raise InvalidConfig(path, f"{show(value)} is not a whole number")
            raise expected("a number", value, path)
        if not lowest <= value <= highest:
            raise InvalidConfig(path, f"{value} is not between {lowest} and {highest}")

    return check


def one_of(*names: str) -> Check:
    """One of a few strings."""

    def check(value: Any, path: str) -> None:
        text(value, path)
        if value not in names:
            raise InvalidConfig(path, f"{show(value)} is unknown; it may be {', '.join(filter(None, names))}")

    return check


def array(check: Check, at_least: int = 0) -> Check:
    """An array whose items are alike. null stands for an absent one, as Go writes it."""

    def check_all(value: Any, path: str) -> None:
        if not isinstance(value, list):
            raise expected("an array", value, path)
        if len(value) < at_least:
            raise InvalidConfig(path, "is empty")
        for index, item in enumerate(value):
            check(item, f"{path}[{index}]")

    return check_all


def members(check: Check) -> Check:
    """An object used as a map: any names, values alike."""

    def check_all(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise expected("an object", value, path)
        for name, item in value.items():
            filled(name, f"{path}.{name}")
            check(item, f"{path}.{name}")

    return check_all


def record(fields: Mapping[str, Check], required: tuple[str, ...] = (), also: Check | None = None) -> Check:
    """An object with these fields. Unknown ones are ignored, as the specification asks; null is the same as absent."""

    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise expected("an object", value, path)
        prefix = f"{path}." if path else ""
        for name in required:
            if value.get(name) is None:
                raise InvalidConfig(prefix + name, "is required")
        for name, item in value.items():
            field = fields.get(name)
            if field is not None and item is not None:
                field(item, prefix + name)
        if also is not None:
            also(value, path)

    return check
