"""A configuration list made from a template once the node's pod CIDR is known (UpdateRuntimeConfig).

    {"cniVersion": "1.0.0", "name": "pods", "plugins": [{"type": "ptp", "ipam": {"type": "host-local", "ranges": "$RANGES", "routes": "$ROUTES"}}]}

Of a template's strings "$POD_CIDR" becomes the first range, "$RANGES" a list of all as host-local has them, "$ROUTES" default routes of their
families. What comes out is JSON for any template that is. It is written as `10-tare.conflist`, unless somebody else has brought a list.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tare.errors import FailedPrecondition, InternalError
from tare.network.cni import config

NAME = "10-tare.conflist"
DEFAULT_ROUTES = {4: "0.0.0.0/0", 6: "::/0"}


def fill(text: bytes | str, ranges: Sequence[str], source: str) -> bytes:
    """The list for these ranges. Raises Malformed where the template, or what comes of it, is no list."""
    try:
        template = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise config.malformed(source, f"it is not JSON: {error}") from error
    families = dict.fromkeys(ipaddress.ip_network(item).version for item in ranges)
    values = {
        "$POD_CIDR": ranges[0],
        "$RANGES": [[{"subnet": item}] for item in ranges],
        "$ROUTES": [{"dst": DEFAULT_ROUTES[family]} for family in families],
    }
    data = json.dumps(replaced(template, values), indent=2).encode() + b"\n"
    if not config.parse(data, f"{source}.conflist").plugins:
        raise config.malformed(source, "it has no plugins")
    return data


def replaced(value: Any, values: dict[str, Any]) -> Any:
    """A JSON value with its placeholders replaced, wherever they are."""
    if isinstance(value, dict):
        return {key: replaced(entry, values) for key, entry in value.items()}
    if isinstance(value, list):
        return [replaced(entry, values) for entry in value]
    return values.get(value, value) if isinstance(value, str) else value


def write(template: Path, directory: Path, ranges: Sequence[str]) -> str | None:
    """Write the list; None, or whose list there is already, which stays. Raises FailedPrecondition, InternalError. Blocks."""
    doing = f"make a CNI configuration from {template}"
    try:
        text = template.read_bytes()
    except OSError as error:
        raise FailedPrecondition(doing, cause=error, hint="[network] conf_template names the file") from error
    data = fill(text, ranges, str(template))
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        others = [name for name, _, _ in config.listing(directory) if name != NAME and "/" not in name]
        if others:
            return others[0]
        path = directory / NAME
        if path.exists() and path.read_bytes() == data:
            return None
        new = directory / f".{NAME}.new"
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise InternalError(doing, cause=error) from error
    return None
