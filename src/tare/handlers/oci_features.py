"""What another runtime's binary can do, by its own word (`features`, OCI runtime specification 1.1, features.md), and whether it is there.

The binary is looked at again when it has changed, so a handler becomes usable by installing it, and unusable by removing it.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from tare.config import HandlerConfig
from tare.errors import FailedPrecondition, TareError, Unavailable, describe

if TYPE_CHECKING:
    from tare.handlers.commands import Commands

SECONDS = 10.0


class Features:
    """Of one handler. Until `look` has been awaited, nothing is known of it but whether the file is there."""

    def __init__(self, settings: HandlerConfig) -> None:
        self._settings = settings
        self._seen: tuple[int, int, int] | None = None
        self._trouble: str | None = None
        self._told: dict[str, Any] = {}

    def trouble(self) -> str | None:
        """Why the handler cannot be used, or None."""
        path = self._settings.path
        try:
            status = os.stat(path)
        except OSError as error:
            return f"{path}: {error.strerror}"
        if not os.access(path, os.X_OK):
            return f"{path} is not executable"
        return self._trouble if self._seen == mark(status) else None

    def require(self, name: str) -> None:
        """Raise FailedPrecondition where the handler cannot be used."""
        trouble = self.trouble()
        if trouble is not None:
            raise FailedPrecondition(f"use runtime handler {name}", cause=trouble, hint="is it installed?")

    async def look(self, commands: Commands) -> None:
        """Ask the binary, if it is not the one that was asked before. Raises nothing: what fails is the handler's trouble."""
        path, options = self._settings.path, self._settings.options
        try:
            now = mark(os.stat(path))
        except OSError:
            return
        if now == self._seen:
            return
        self._trouble, self._told = None, {}
        try:
            result, text = await commands.capture([path, *options, "features"], timeout=SECONDS)
            if not result.code:
                told = json.loads(text)
                self._told = told if isinstance(told, dict) else {}
            else:  # older ones tell nothing
                result, _ = await commands.capture([path, "--version"], timeout=SECONDS)
                self._trouble = f"{path} does not run: {result.words}" if result.code else None
        except Unavailable:
            return  # a process of Tare's was lost, which says nothing of the program: the next look asks again
        except (TareError, ValueError) as error:
            self._trouble = f"{path} does not run: {describe(error) if isinstance(error, TareError) else error}"
        self._seen = now

    @property
    def recursive_read_only(self) -> bool:
        """Whether the mount option rro is known."""
        return "rro" in (self._told.get("mountOptions") or ())

    @property
    def idmap_mounts(self) -> bool:
        """Whether mounts may have mappings."""
        extensions = (self._told.get("linux") or {}).get("mountExtensions") or {}
        return bool((extensions.get("idmap") or {}).get("enabled"))

    @property
    def user_namespaces(self) -> bool:
        """Never: the root file system would have to be mapped for a runtime that is given it ready-made."""
        return False


def mark(status: os.stat_result) -> tuple[int, int, int]:
    """What tells one file from another that has taken its place."""
    return status.st_dev, status.st_ino, status.st_mtime_ns
