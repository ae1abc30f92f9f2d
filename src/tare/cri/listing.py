"""Lists as bytes: of each thing in a list its message is made and encoded once, and kept for as long as its record is the same.

A kubelet asks for all pods and containers every second or so, and next to none of them has changed. Records are immutable, so that one that
is the same object has the same message. A repeated field of messages is, encoded, nothing but its items one after the other, each with the
field's number and its own length before it (protobuf's wire format), so that a list is a join.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Generic, NewType, Protocol, TypeVar

from google.protobuf.message import Message

Encoded = NewType("Encoded", bytes)
"""A reply that is encoded already."""

LENGTH_DELIMITED: Final = 2  # wire type
SPARE: Final = 64  # entries of things that are gone, before they are looked for


class Record(Protocol):
    """What has an ID, and is another object when it is not the same any more."""

    @property
    def id(self) -> str:
        """Its own."""


R = TypeVar("R", bound=Record)


class Lists(Generic[R]):
    """Lists of one kind: `translate` makes an item, which goes into the reply's field number `field`; `everything` tells all records."""

    def __init__(self, translate: Callable[[R], Message], field: int, everything: Callable[[], Sequence[R]]) -> None:
        self._translate = translate
        self._tag = varint(field << 3 | LENGTH_DELIMITED)
        self._everything = everything
        self._known: dict[str, tuple[R, bytes]] = {}

    def encoded(self, records: Sequence[R]) -> Encoded:
        """The reply that has these records in its one field."""
        known = self._known
        pieces = []
        for record in records:
            entry = known.get(record.id)
            if entry is None or entry[0] is not record:
                entry = known[record.id] = (record, self._piece(record))
            pieces.append(entry[1])
        if len(known) > len(records) + SPARE:
            self._forget()
        return Encoded(b"".join(pieces))

    def _piece(self, record: R) -> bytes:
        data = self._translate(record).SerializeToString()
        return self._tag + varint(len(data)) + data

    def _forget(self) -> None:
        """Keep nothing of what is no more."""
        alive = {record.id for record in self._everything()}
        for key in self._known.keys() - alive:
            del self._known[key]


def varint(value: int) -> bytes:
    """A number as protobuf encodes it."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
