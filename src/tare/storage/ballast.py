"""Space that is kept for the moment in which there is none: a file that is given up so that removal, collection and records go on.

    <root>/ballast     a few megabytes, allocated; made again once there is room for it several times over

What it frees is for ending things (`state.file`): nothing that begins asks for it.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)
SIZE = 4 << 20
ROOM = 4  # times its size is to be free before it is made


class Ballast:
    """The file in one directory."""

    def __init__(self, directory: Path, size: int = SIZE) -> None:
        self._path = directory / "ballast"
        self._size = size

    def keep(self) -> None:
        """Have it, if there is room."""
        try:
            if self._whole():
                return
            status = os.statvfs(self._path.parent)
            if status.f_bavail * status.f_frsize < ROOM * self._size:
                return
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, self._size)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            log.info("%s cannot be had now: %s", self._path, error.strerror)
            self.give_up()

    def _whole(self) -> bool:
        try:
            return os.stat(self._path).st_size >= self._size
        except FileNotFoundError:
            return False

    def give_up(self) -> bool:
        """Free its space; whether there was any."""
        try:
            there = os.stat(self._path).st_size > 0
            os.unlink(self._path)
        except OSError:
            return False
        if there:
            log.warning("the disk is full: %s is given up, so that things can be removed", self._path)
        return there
