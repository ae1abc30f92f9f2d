"""What systemd is to a daemon of Type=notify with a file descriptor store: it listens, keeps, and hands over at the next start."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from tests.support.daemon import Daemon

# In the child: descriptors from 3 on are those kept, as sd_listen_fds(3) has them.
HAND_OVER = """
import os, sys
count, names = int(sys.argv[1]), sys.argv[2]
fds = [int(word) for word in sys.argv[3].split(",") if word]
high = [os.dup2(fd, 500 + number, False) for number, fd in enumerate(fds)]
for number, fd in enumerate(high):
    os.dup2(fd, 3 + number, True)
if count:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count), LISTEN_FDNAMES=names)
os.execvp(sys.argv[4], sys.argv[4:])
"""


class Supervised(Daemon):
    """A daemon under such a manager. `said` are the assignments that have come, in order; `store` what it keeps: (name, descriptor)."""

    def __init__(self, base: Path, watchdog: float = 0.0) -> None:
        super().__init__(base)
        self.watchdog = watchdog
        self.said: list[str] = []
        self.store: list[tuple[str, int]] = []
        self.ears = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ears.bind("")  # to an abstract address of the kernel's choice
        self.thread = threading.Thread(target=self.listen)
        self.thread.start()

    def listen(self) -> None:
        """Until an empty message."""
        while True:
            text, fds, _, _ = socket.recv_fds(self.ears, 4096, 16)
            if not text:
                return
            lines = text.decode().splitlines()
            words = dict(line.split("=", 1) for line in lines)
            if words.get("FDSTORE") == "1":
                self.store += [(words["FDNAME"], fd) for fd in fds]
            elif words.get("FDSTOREREMOVE") == "1":
                gone = [entry for entry in self.store if entry[0] == words["FDNAME"]]
                self.store = [entry for entry in self.store if entry not in gone]
                for _, fd in gone:
                    os.close(fd)
            self.said += lines

    def command(self) -> list[str]:
        names = ":".join(name for name, _ in self.store)
        fds = ",".join(str(fd) for _, fd in self.store)
        return [sys.executable, "-c", HAND_OVER, str(len(self.store)), names, fds, *super().command()]

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        values = {**(environment or {}), "NOTIFY_SOCKET": "@" + self.ears.getsockname()[1:].decode(), "FDSTORE": "512"}
        if self.watchdog:
            values |= {"WATCHDOG_USEC": str(int(self.watchdog * 1e6))}
        self.handed = tuple(fd for _, fd in self.store)
        super().start(values)

    def names(self) -> set[str]:
        return {name for name, _ in self.store}

    def await_word(self, word: str, since: int = 0) -> None:
        """Until the daemon has said this."""
        deadline = time.monotonic() + 30
        while word not in self.said[since:]:
            assert time.monotonic() < deadline, f"{word} was not said: {self.said[since:]}"
            time.sleep(0.01)

    def destroy(self) -> list[str]:
        try:
            return super().destroy() if self.base.exists() else []
        finally:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
                ours.sendto(b"", self.ears.getsockname())
            self.thread.join()
            self.ears.close()
            for _, fd in self.store:
                os.close(fd)
            self.store = []
