"""The service manager (systemd) as the daemon sees it: what it has kept for us while there was none, and what it is told.

It is told when the daemon serves and when it ends, and again and again that its loop still turns: a daemon that hangs is killed and
started again. Of what it keeps, the keeper tells it itself (`launch.mirror`); a daemon that is started gets all of it.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field

from tare.launch import notify, packets

log = logging.getLogger(__name__)
FIRST = 3  # of the descriptors that a manager hands over, sd_listen_fds(3)
PINGS = 3  # in the time after which silence means that the daemon hangs
LOST = 75  # exit code, EX_TEMPFAIL


@dataclass(slots=True)
class Manager:
    """`address` is where it listens (b"": there is none), `patience` the seconds of silence that it bears (0: any).

    `keeps`: it keeps descriptors for us; `kept` are those that it has handed over, and `intact` says that there are some, so that it
    has not let go of them since.
    """

    address: bytes = b""
    patience: float = 0.0
    keeps: bool = False
    kept: dict[bytes, list[int]] = field(default_factory=dict)
    intact: bool = False

    @classmethod
    def find(cls, environment: MutableMapping[str, str]) -> Manager:
        """The one that has started this process; what it says in the environment is for this process alone and is taken out."""
        values = {name: environment.pop(name, "") for name in VARIABLES}
        mine = str(os.getpid())
        manager = cls(address=os.fsencode(values["NOTIFY_SOCKET"]), keeps=values["FDSTORE"] not in ("", "0"))
        if values["WATCHDOG_PID"] in ("", mine) and values["WATCHDOG_USEC"].isdecimal():
            manager.patience = int(values["WATCHDOG_USEC"]) / 1e6
        if values["LISTEN_PID"] == mine and values["LISTEN_FDS"].isdecimal():
            names = values["LISTEN_FDNAMES"].split(":")
            for fd, name in zip(range(FIRST, FIRST + int(values["LISTEN_FDS"])), names, strict=False):
                os.set_inheritable(fd, False)
                manager.kept.setdefault(os.fsencode(name), []).append(fd)
            manager.intact = bool(manager.kept)
        for fds in manager.kept.values():
            fds.sort(key=writes)
        return manager

    def close(self) -> None:
        """The keeper has what was kept."""
        for fds in self.kept.values():
            packets.close_all(fds)
        self.kept = {}

    def say(self, **words: object) -> None:
        """Tell it, `READY=1` for example. What it does not take now is not said."""
        if self.address:
            notify.send(self.address, "\n".join(f"{name}={word}" for name, word in words.items()).encode())

    async def keep_calm(self, status: Callable[[], str]) -> None:
        """Say, for ever, that the loop turns, and how things are."""
        while self.patience:
            self.say(WATCHDOG=1, STATUS=status())
            await asyncio.sleep(self.patience / PINGS)

    def begin_again(self) -> None:
        """End at once where only the next daemon gets what the manager has kept: of a keeper that is gone, with the loggers perhaps, that is
        the one copy. Returns where it keeps nothing."""
        if self.keeps:
            log.error("the keeper is gone: this daemon ends, for the next one to get what the service manager has kept")
            logging.shutdown()
            os._exit(LOST)


VARIABLES = (
    *("NOTIFY_SOCKET", "FDSTORE", "WATCHDOG_PID", "WATCHDOG_USEC"),
    *("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"),
)


def writes(fd: int) -> bool:
    """Whether a descriptor is for writing alone: the second end of a pipe."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
