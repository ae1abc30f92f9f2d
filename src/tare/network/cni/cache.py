"""What ADD was told and answered, kept as libcni keeps it, so that other tools know Tare's attachments and Tare theirs.

    <directory>/results/<network>-<container>-<interface>
        {"kind": "cniCacheV1", "containerId", "config" (base64 of the list), "ifName", "networkName", "netns", "cniArgs": [[name, value]],
         "capabilityArgs", "result"}

Files are written whole and renamed. Calls touch the disk: make them in a thread. Source: libcni/api.go, cachedInfo.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KIND = "cniCacheV1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """One interface of one container on one network. `result` is None where ADD has not answered."""

    container_id: str
    network: str
    interface: str
    netns: str
    config: bytes
    args: tuple[tuple[str, str], ...] = ()
    capabilities: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] | None = None


class Cache:
    """The cache of a directory, such as /var/lib/cni."""

    def __init__(self, directory: Path) -> None:
        self._results = directory / "results"

    def path(self, network: str, container_id: str, interface: str) -> Path:
        """Where an attachment is."""
        return self._results / f"{network}-{container_id}-{interface}"

    def put(self, attachment: Attachment) -> None:
        """Keep one. Raises OSError."""
        path = self.path(attachment.network, attachment.container_id, attachment.interface)
        self._results.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(encode(attachment))
        new.replace(path)

    def get(self, network: str, container_id: str, interface: str) -> Attachment | None:
        """One that was kept; None where there is none, or what is there is not one. Raises OSError."""
        try:
            data = self.path(network, container_id, interface).read_bytes()
        except FileNotFoundError:
            return None
        return decode(data)

    def remove(self, network: str, container_id: str, interface: str) -> None:
        """Forget one. Idempotent. Raises OSError."""
        self.path(network, container_id, interface).unlink(missing_ok=True)

    def all(self, network: str) -> list[Attachment]:
        """Those of a network, whoever made them. Raises OSError."""
        found = []
        try:
            names = sorted(os.listdir(self._results))
        except FileNotFoundError:
            return []
        for name in names:
            if not name.startswith(f"{network}-"):
                continue
            try:
                attachment = decode((self._results / name).read_bytes())
            except FileNotFoundError:
                continue  # it was deleted meanwhile
            if attachment is not None and attachment.network == network:
                found.append(attachment)
        return found


def encode(attachment: Attachment) -> bytes:
    """A file's content."""
    value: dict[str, Any] = {
        "kind": KIND,
        "containerId": attachment.container_id,
        "config": base64.b64encode(attachment.config).decode(),
        "ifName": attachment.interface,
        "networkName": attachment.network,
        "netns": attachment.netns,
        "cniArgs": [list(pair) for pair in attachment.args],
        "capabilityArgs": dict(attachment.capabilities),
    }
    if attachment.result is not None:
        value["result"] = attachment.result
    return json.dumps(value).encode()


def decode(data: bytes) -> Attachment | None:
    """An attachment from a file's content; None where it is something else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("kind") != KIND:
        return None
    names = [value.get(key) for key in ("containerId", "networkName", "ifName")]
    args, capabilities, result = value.get("cniArgs") or [], value.get("capabilityArgs") or {}, value.get("result")
    try:
        config = base64.b64decode(value.get("config") or "", validate=True)
        pairs = tuple((str(name), str(entry)) for name, entry in args)
    except (TypeError, ValueError, binascii.Error):
        return None
    strings = all(isinstance(name, str) and name for name in names)
    if not strings or not isinstance(capabilities, dict) or not isinstance(result, dict | None):
        return None
    netns = value.get("netns", "")
    return Attachment(
        container_id=str(names[0]),
        network=str(names[1]),
        interface=str(names[2]),
        netns=netns if isinstance(netns, str) else "",
        config=config,
        args=pairs,
        capabilities=capabilities,
        result=result,
    )


def lives(netns: str) -> bool:
    """Whether a path is a namespace (of the network, as a cache has no others)."""
    try:
        return os.stat(netns).st_dev == os.stat("/proc/self/ns/net").st_dev
    except OSError:
        return False
