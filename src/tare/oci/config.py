"""A container's config.json: read, and checked whole before anything is made of it (`handlers.checking`). Nothing is opened but the file itself."""

from __future__ import annotations

from tare.handlers.checking import check
from tare.handlers.shapes import InvalidConfig
from tare.oci import documents

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Config = dict[str, Any]

FILE = "config.json"
LARGEST = 16 << 20
OWN_MEMBERS = {"": ("directories",), "process": ("stdin",)}
"""What Tare's daemon adds to a specification for itself, and a bundle has no say in."""


def load(bundle: str) -> Config:
    """The configuration of a bundle, checked. Raises InvalidConfig, OSError."""
    return parse(read(f"{bundle}/{FILE}"))


def read(path: str) -> bytes:
    """A file's bytes, of which there may not be too many. Raises OSError, InvalidConfig."""
    with open(path, "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise InvalidConfig("", f"it is longer than {LARGEST} bytes")
    return data


def parse(data: bytes) -> Config:
    """The configuration that is in these bytes. Raises InvalidConfig."""
    config: Config = documents.decoded(data)
    check(config)
    for where, names in OWN_MEMBERS.items():
        for name in names:
            (config[where] if where else config).pop(name, None)
    config["linux"] = config.get("linux") or {}
    return config
