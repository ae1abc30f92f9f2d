"""Which container has which slot of the journal: one small file for each, written whole or not at all.

    slots/7      the ADD message that the container came with (wire format), its container ID, log path, longest line, flags

A slot's file is there before its record is in use, and goes after the record is free: one without a record in use is what
is left of an ADD or a REMOVE that a SIGKILL cut short.
"""

from __future__ import annotations

import os

from tare.launch import linux, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    Entry = tuple[bytes, bytes, int, int]


def entry(fields: list[wire.Field]) -> Entry:
    """(container ID, log path, longest line, flags) from the fields of ADD. Raises WireError where they are none."""
    match fields:
        case [bytes(identity), bytes(log_path), int(max_line), int(flags)]:
            if identity and b"/" not in identity and identity not in (b".", b"..") and max_line > 0:
                return identity, log_path, max_line, flags
    raise wire.WireError(f"these are no fields of ADD: {fields!r}")


def identity(fields: list[wire.Field]) -> bytes:
    """The container ID from the fields of any other request. Raises WireError where there is none."""
    match fields:
        case [bytes(name)]:
            return name
    raise wire.WireError(f"a container ID alone was expected, not {fields!r}")


def write(directory: str, slot: int, fields: list[wire.Field]) -> None:
    """Write a slot's file."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    linux.replace_file(f"{directory}/{slot}", wire.encode(wire.ADD, 0, fields))


def remove(directory: str, slot: int) -> None:
    """Remove a slot's file."""
    os.unlink(f"{directory}/{slot}")


def read(directory: str) -> dict[int, Entry]:
    """All slots that have a file."""
    found: dict[int, Entry] = {}
    if not os.path.isdir(directory):
        return found
    for name in os.listdir(directory):
        if name.isdigit():
            with open(f"{directory}/{name}", "rb") as file:
                _, _, fields = wire.decode(file.read())
            found[int(name)] = entry(fields)
    return found
