"""Plain values, equal where their fields are: what dataclasses give, without the 10 ms that importing them takes.

`tare oci` makes a container's groups with this room, and starts in milliseconds; so what it needs of the room imports nothing big.
"""

from __future__ import annotations


class Value:
    """The fields are the names in `__slots__`; a class below sets them in its `__init__` and they stay as they are."""

    __slots__: tuple[str, ...] = ()

    def fields(self) -> tuple[object, ...]:
        """All of them, in order."""
        return tuple(getattr(self, name) for name in self.__slots__)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.fields() == other.fields()

    def __hash__(self) -> int:
        return hash((type(self), *self.fields()))

    def __repr__(self) -> str:
        parts = (f"{name}={value!r}" for name, value in zip(self.__slots__, self.fields(), strict=True))
        return f"{type(self).__name__}({', '.join(parts)})"
