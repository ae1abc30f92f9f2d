"""The child that looks at paths which a pod names: only a process that can be given up may block on one."""

from __future__ import annotations

import os
import socket
import stat

from tare.launch import packets, plan, steps, wire


def main(status: socket.socket, plan_fd: int) -> None:
    """Answer one field for each path: b"d", b"f" for anything else, or the errno as text; does not return."""
    try:
        answers = [look(path, make) for path, make in plan.read(plan_fd)["paths"]]
        packets.send(status, wire.OK, 0, answers)
        os._exit(0)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this child and is told to the launcher
        steps.fail_with(status, "look at mount sources")


def look(path: bytes, make: bool) -> bytes:
    """What is at a path; a directory, made with mode 0755, where there is nothing and `make` says so."""
    try:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            if not make:
                raise
            os.umask(0o022)
            os.makedirs(path, 0o755, exist_ok=True)
            mode = os.stat(path).st_mode
    except OSError as error:
        return b"%d" % (error.errno or 5)
    return b"d" if stat.S_ISDIR(mode) else b"f"
