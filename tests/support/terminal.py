"""Commands on a terminal, as somebody who types sees them."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import time

SECONDS = 30.0


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
        os.close(slave)
        self.said = b""

    def until(self, text: bytes) -> None:
        """Until it has said this."""
        deadline = time.monotonic() + SECONDS
        while text not in self.said:
            ready, _, _ = select.select([self.master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.said!r}"
            self.said += os.read(self.master, 4096)

    def close(self) -> int:
        """Its exit code, once it has ended."""
        code = self.process.wait(SECONDS)
        os.close(self.master)
        return code
