"""One object of a JSON configuration, read with checks; errors name the JSON path (pure)."""

from __future__ import annotations

from tare.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

LARGEST = (1 << 63) - 1


class Section:
    """One object of `linux.resources`, read with checks; errors name the JSON path."""

    def __init__(self, path: str, value: object) -> None:
        if not isinstance(value, dict):
            raise InvalidArgument(f"read {path}", cause="is not an object")
        self.path = path
        self._value: Mapping[str, object] = value

    def integer(self, key: str, lowest: int = -1, highest: int = LARGEST) -> int | None:
        """A whole number, or None where it is absent."""
        value = self._value.get(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise InvalidArgument(f"read {self.path}.{key}", cause=f"{value!r} is not a whole number")
        if not lowest <= value <= highest:
            raise InvalidArgument(f"read {self.path}.{key}", cause=f"{value} is not between {lowest} and {highest}")
        return value

    def required(self, key: str, lowest: int, highest: int) -> int:
        """A whole number that must be there."""
        value = self.integer(key, lowest, highest)
        if value is None:
            raise self.wrong(key, "is absent")
        return value

    def text(self, key: str) -> str:
        """A string of one line; empty where it is absent."""
        value = self._value.get(key, "")
        if not isinstance(value, str) or "\n" in value or "\0" in value:
            raise InvalidArgument(f"read {self.path}.{key}", cause=f"{value!r} is not one line of text")
        return value

    def flag(self, key: str) -> bool | None:
        """true or false, or None where it is absent."""
        value = self._value.get(key)
        if value is not None and not isinstance(value, bool):
            raise InvalidArgument(f"read {self.path}.{key}", cause=f"{value!r} is neither true nor false")
        return value

    def section(self, key: str) -> Section | None:
        """A nested object, or None where it is absent."""
        value = self._value.get(key)
        return None if value is None else Section(f"{self.path}.{key}", value)

    def sections(self, key: str) -> list[Section]:
        """A list of objects; empty where it is absent."""
        value = self._value.get(key)
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            raise InvalidArgument(f"read {self.path}.{key}", cause="is not a list")
        return [Section(f"{self.path}.{key}[{index}]", item) for index, item in enumerate(value)]

    def members(self) -> dict[str, Section]:
        """All members, which are objects."""
        return {key: Section(f"{self.path}.{key}", value) for key, value in self._value.items()}

    def paragraphs(self) -> dict[str, str]:
        """All members, which are strings of one or more lines."""
        found = {}
        for key, value in self._value.items():
            if not isinstance(value, str) or "\0" in value:
                raise self.wrong(key, f"{value!r} is not text")
            if any(character in key for character in "\0\n"):
                raise self.wrong(repr(key), "is not one line")
            found[key] = value
        return found

    def wrong(self, key: str, cause: str) -> InvalidArgument:
        """An error about one member, or ("") about the object itself."""
        return InvalidArgument(f"read {self.path}.{key}" if key else f"read {self.path}", cause=cause)


def present(whole: Section, key: str) -> Section:
    """A member that is known to be there."""
    section = whole.section(key)
    if section is None:
        raise whole.wrong(key, "is absent")
    return section
