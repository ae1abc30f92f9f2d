"""JSON in and out without Python's json package, whose import of `re` takes as long as making a container's namespaces.

Its C parts do the work: `_json`'s scanner reads, and its string encoder is what a few lines write with.
"""

from __future__ import annotations

import _json

from tare.handlers.shapes import InvalidConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def constant(name: str) -> float:
    """NaN and Infinity are no JSON."""
    raise InvalidConfig("", f"{name} is no JSON")


class Settings:
    """What the scanner asks for, as attributes."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = staticmethod(constant)


SCAN = _json.make_scanner(Settings)  # type: ignore[arg-type]


def decoded(data: bytes) -> Any:
    """The value of a JSON text. Raises InvalidConfig, with the place where it stops being one."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidConfig("", f"it is not UTF-8 at byte {error.start}") from None
    start = len(text) - len(text.lstrip(" \t\r\n\ufeff"))
    try:
        value, end = SCAN(text, start)
    except InvalidConfig:
        raise
    except RecursionError:
        raise InvalidConfig("", "it is nested too deeply") from None
    except (StopIteration, ValueError, SystemError):
        raise explained(text) from None
    rest = text[end:].lstrip(" \t\r\n")
    if rest:
        raise InvalidConfig("", f"there is more after its end, at {place(text, len(text) - len(rest))}")
    return value


def explained(text: str) -> InvalidConfig:
    """Why a text is no JSON. The scanner raises json's own exceptions only where that has been imported; here there is time for it."""
    import json

    try:
        json.loads(text, parse_constant=constant)
    except json.JSONDecodeError as error:
        return InvalidConfig("", f"it is no JSON at {place(text, error.pos)}: {error.msg}")
    except ValueError as error:
        return error if isinstance(error, InvalidConfig) else InvalidConfig("", f"it is no JSON: {error}")
    return InvalidConfig("", "it is no JSON")


def place(text: str, index: int) -> str:
    """Line and column of a place in a text."""
    before = text[:index]
    return f"line {before.count(chr(10)) + 1}, column {index - before.rfind(chr(10))}"


def encoded(value: Any, indent: int = 0) -> bytes:
    """A value as JSON, in ASCII; with `indent` one member a line."""
    return written(value, indent, "\n" if indent else "").encode()


def written(value: Any, indent: int, newline: str) -> str:
    """A value as text. `newline` begins a line at this depth."""
    if isinstance(value, str):
        text: str = _json.encode_basestring_ascii(value)
        return text
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    deeper = newline + " " * indent if indent else ""
    space = " " if indent else ""
    if isinstance(value, dict):
        parts = [
            f"{deeper}{_json.encode_basestring_ascii(key)}:{space}{written(item, indent, deeper)}"
            for key, item in value.items()
        ]
        return "{" + ",".join(parts) + (newline if parts else "") + "}"
    parts = [deeper + written(item, indent, deeper) for item in value]
    return "[" + ",".join(parts) + (newline if parts else "") + "]"
