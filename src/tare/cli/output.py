"""How answers look: tables (plain columns where nobody watches), JSON, sizes, ages."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from google.protobuf.message import Message

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
SHORT_ID = 13


def size(count: int) -> str:
    """Bytes for a reader, in powers of 1000: "4.26MB"."""
    value, unit = float(count), 0
    while value >= 999.5 and unit + 1 < len(UNITS):
        value /= 1000
        unit += 1
    return f"{count}B" if unit == 0 else f"{value:.3g}{UNITS[unit]}"


def age(nanoseconds: int, now: int) -> str:
    """How long ago, in the largest unit that fits: "3 minutes ago"."""
    seconds = max(0, now - nanoseconds) // 1_000_000_000
    for name, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = seconds // length
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return f"{seconds} second{'' if seconds == 1 else 's'} ago"


def short_id(identifier: str) -> str:
    """The beginning of an ID, enough to name it by."""
    return identifier.removeprefix("sha256:")[:SHORT_ID]


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded with spaces, two between them."""
    lines = [columns, *rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    texts = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join(texts) + "\n"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output."""
    if not sys.stdout.isatty():
        sys.stdout.write(plain_table(columns, rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    Console().print(table)


def as_dict(message: Message) -> dict[str, Any]:
    """A message by protobuf's JSON mapping, unset fields included: lower camel case names, 64-bit numbers as strings."""
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, always_print_fields_with_no_presence=True)


def print_json(value: object) -> None:
    """Indented JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
