"""The service tare.v1.Daemon: what can be asked of the daemon itself."""

from __future__ import annotations

import logging
from typing import Protocol

from tare.api.v1 import tare_pb2 as pb

log = logging.getLogger(__name__)


class Levels(Protocol):
    """The log's level: "debug", "info", "warning" or "error"."""

    def level(self) -> str:
        """The one that holds."""

    def set_level(self, wanted: str) -> str:
        """Another one; returns the one before. Raises InvalidArgument."""


class Daemon:
    """Over the log."""

    lasting: frozenset[str] = frozenset()

    def __init__(self, levels: Levels) -> None:
        self._levels = levels

    async def LogLevel(self, request: pb.LogLevelRequest) -> pb.LogLevelReply:
        """Asked, or changed."""
        before = self._levels.level()
        if request.level:
            before = self._levels.set_level(request.level)
            log.warning("the log level was %s and is %s", before, request.level)
        return pb.LogLevelReply(level=self._levels.level(), before=before)
