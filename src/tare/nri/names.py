"""NRI's names, those of plugins among them. Nothing here takes protobuf: a daemon with no plugin does without."""

from __future__ import annotations

import re

from tare.errors import InvalidArgument

VERSION = "v0.12.2"
SOCKET = "/var/run/nri/nri.sock"
PLUGINS = "/opt/nri/plugins"
NAME_VARIABLE, INDEX_VARIABLE, SOCKET_VARIABLE = "NRI_PLUGIN_NAME", "NRI_PLUGIN_IDX", "NRI_PLUGIN_SOCKET"

NAME = re.compile(r"[A-Za-z0-9_.+-]+")
INDEX = re.compile("[0-9]{2}")


def check_identity(name: str, index: str) -> None:
    """Raise InvalidArgument for what is no plugin's name or index."""
    if not NAME.fullmatch(name):
        cause = f"{name!r} is no name of letters, digits and _ . + -"
        raise InvalidArgument("register an NRI plugin", cause=cause)
    if not INDEX.fullmatch(index):
        raise InvalidArgument("register an NRI plugin", cause=f"{index!r} is no index of two digits")


def parted(file_name: str) -> tuple[str, str]:
    """(index, name) of a plugin's file "10-name". Raises InvalidArgument."""
    index, _, name = file_name.partition("-")
    check_identity(name, index)
    return index, name
