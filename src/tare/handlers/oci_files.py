"""The directory of one container of another runtime, and what is read and written there (`oci` draws it)."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tare.handlers.processes import Process
from tare.launch import linux


class Bundle:
    """The directory of one container."""

    def __init__(self, run: Path, container_id: str) -> None:
        self.id = container_id
        self.directory = run / "bundles" / container_id
        self.rootfs = self.directory / "rootfs"
        self.volumes = self.directory / "volumes"
        self.state = self.directory / "state"
        self.log = self.directory / "log"
        self.pid_file = self.directory / "pid"
        self.started = self.directory / "started"
        self.exec = self.directory / "exec"

    def make(self, handler: str) -> None:
        """The directory, with the name of who uses it first: from then on it can be taken away again."""
        self.directory.mkdir(mode=0o700, parents=True)
        (self.directory / "handler").write_text(handler)
        for path in (self.rootfs, self.volumes, self.state, self.exec):
            path.mkdir(mode=0o700)

    def handler(self) -> str:
        """The name of the handler that it was made for; "" where it was not made."""
        return read(self.directory / "handler")

    def process(self) -> Process | None:
        """The main process, once there is one."""
        words = read(self.directory / "process").split()
        return Process(int(words[0]), int(words[1])) if len(words) == 2 else None

    def put_process(self, process: Process) -> None:
        """Write it down."""
        linux.replace_file(str(self.directory / "process"), f"{process.pid} {process.start_time}\n".encode())

    def clear(self) -> None:
        """Unmount all that is mounted in it, and remove it. Waits for what the file systems have to write.

        Mount points are removed by calls that fail on what is mounted still, never with what is below them: that is an image's.
        """
        for path in (self.rootfs, *listed(self.volumes)):
            unmount(path)
            with contextlib.suppress(FileNotFoundError):
                (path.unlink if path.is_file() else path.rmdir)()
        if self.directory.exists():
            shutil.rmtree(self.directory)


def unmount(path: Path) -> None:
    """Unmount all that is mounted at a path."""
    while True:
        try:
            linux.umount(bytes(path), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):  # nothing is mounted there, or nothing is there
                return
            raise


def encoded(value: dict[str, Any]) -> bytes:
    """As JSON. What is no UTF-8 in an environment (surrogates, in Python) goes out as the bytes that it was."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")


def read(path: Path) -> str:
    """A small file's text; "" where there is none."""
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""


def listed(directory: Path) -> Sequence[Path]:
    """What is in a directory; nothing where there is none."""
    try:
        return sorted(directory.iterdir())
    except FileNotFoundError:
        return ()
