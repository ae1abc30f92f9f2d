"""One object of a JSON configuration, read with checks; errors name the JSON path (pure)."""

from __future__ import annotations

from collections.abc import Mapping

from tare.errors import InvalidArgument

LARGEST = (1 << 63) - 1


class Section:
    """One object of `linux.resources`, read with checks; errors name the JSON path."""

    def __init__(self, path: str, value: object) -> None:
        if not isinstance(value, Mapping):
            raise InvalidArgument(f"read {path}", cause="is not an object")
        self._path = path
        self._value: Mapping[str, object] = value

    def integer(self, key: str, lowest: int = -1, highest: int = LARGEST) -> int | None:
        """A whole number, or None where it is absent."""
        value = self._value.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise InvalidArgument(f"read {self._path}.{key}", cause=f"{value!r} is not a whole number")
        if not lowest <= value <= highest:
            raise InvalidArgument(f"read {self._path}.{key}", cause=f"{value} is not between {lowest} and {highest}")
        return value

    def text(self, key: str) -> str:
        """A string of one line; empty where it is absent."""
        value = self._value.get(key, "")
        if not isinstance(value, str) or "\n" in value or "\0" in value:
            raise InvalidArgument(f"read {self._path}.{key}", cause=f"{value!r} is not one line of text")
        return value

    def flag(self, key: str) -> bool | None:
        """true or false, or None where it is absent."""
        value = self._value.get(key)
        if value is not None and not isinstance(value, bool):
            raise InvalidArgument(f"read {self._path}.{key}", cause=f"{value!r} is neither true nor false")
        return value

    def section(self, key: str) -> Section | None:
        """A nested object, or None where it is absent."""
        value = self._value.get(key)
        return None if value is None else Section(f"{self._path}.{key}", value)

    def sections(self, key: str) -> list[Section]:
        """A list of objects; empty where it is absent."""
        value = self._value.get(key)
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            raise InvalidArgument(f"read {self._path}.{key}", cause="is not a list")
        return [Section(f"{self._path}.{key}[{index}]", item) for index, item in enumerate(value)]

    def texts(self) -> dict[str, str]:
        """All members, which are strings."""
        return {key: self.text(key) for key in self._value}

    def wrong(self, key: str, cause: str) -> InvalidArgument:
        """An error about one member."""
        return InvalidArgument(f"read {self._path}.{key}", cause=cause)
