"""Loggers forked as the launcher forks them, in a run directory of the test's own, to be killed wherever a test likes.

    with Group(tmp_path) as group:
        group.start()
        box = group.container("c1")          # FIFOs, with spares of their reading ends as the keeper has them
        group.add(box)
        os.write(box.writers["stdout"], b"hello\\n")
        box.hang_up()
        group.ask(wire.DRAIN, box.id)
        assert box.said() == {"stdout": b"hello\\n"}

`ask` asks again, of a new logger, where the one asked is killed: that is what the daemon and the launcher do together.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from tare.launch import linux, logger, packets, wire

LINE = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z) (stdout|stderr) ([PF]) (.*)", re.DOTALL)
TRACED = tuple(f"launch/{name}.py" for name in ("logger", "pump", "journal", "crilog", "logfile", "slots", "spares"))
PATIENCE = 20.0


class Box:
    """A container as its logger sees it: FIFOs and a log path. `writers` are the container's own ends."""

    def __init__(self, run: Path, identity: str, log: Path | None) -> None:
        self.id = identity.encode()
        self.directory = run / "containers" / identity
        self.log = log
        self.directory.mkdir(parents=True)
        self.spares: list[int] = []
        self.writers: dict[str, int] = {}
        for name in ("stdout", "stderr"):
            os.mkfifo(self.directory / name)
            self.spares.append(os.open(self.directory / name, os.O_RDONLY | os.O_NONBLOCK))

    def open(self, names: Sequence[str] = ("stdout", "stderr"), flags: int = 0) -> None:
        """Begin to live: the container opens its streams for reading and writing."""
        for name in names:
            self.writers[name] = os.open(self.directory / name, os.O_RDWR | flags)

    def hang_up(self) -> None:
        """Die: the writing ends go."""
        for fd in self.writers.values():
            os.close(fd)
        self.writers.clear()

    def close(self) -> None:
        self.hang_up()
        packets.close_all(self.spares)
        self.spares.clear()

    def said(self, *earlier: Path) -> dict[str, bytes]:
        """By stream, what a reader of the log makes of it, after the files that it was before rotations."""
        assert self.log is not None
        return reassemble(b"".join(path.read_bytes() for path in (*earlier, self.log)))


def reassemble(log: bytes, max_line: int = 16384) -> dict[str, bytes]:
    """The bytes that made a log, by stream. Fails for anything that is not CRI format."""
    said: dict[str, list[bytes]] = {}
    assert log == b"" or log.endswith(b"\n"), "the log ends within a line"
    for line in log.split(b"\n")[:-1]:
        match = LINE.fullmatch(line)
        assert match, line[:100]
        _, stream, tag, text = match.groups()
        assert len(text) <= max_line or text.startswith(b"[tare:")
        said.setdefault(stream.decode(), []).append(text + (b"\n" if tag == b"F" else b""))
    return {name: b"".join(parts) for name, parts in said.items()}


class Group:
    """A group's directory, its private pipe, and whichever logger serves it now."""

    def __init__(self, base: Path, name: str = "g") -> None:
        self.run = base
        self.name = name
        self.directory = base / "loggers" / name
        self.directory.mkdir(parents=True)
        self.pipe = os.pipe2(os.O_CLOEXEC)
        self.pid = 0
        self.boxes: list[Box] = []
        self.deaths = 0

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for box in self.boxes:
            box.close()
        packets.close_all(self.pipe)

    def container(self, identity: str, *, log: bool = True, begun: bool = True) -> Box:
        """A container with FIFOs, which has opened them if it has `begun`."""
        box = Box(self.run, identity, self.run / "logs" / f"{identity}.log" if log else None)
        self.boxes.append(box)
        if begun:
            box.open()
        return box

    # Its life

    def start(self, *, kill_at: int = 0, before: Callable[[], None] | None = None) -> int:
        """Fork a logger. With `kill_at` it is killed before that opcode of its own; `before` runs in it first."""
        listener = packets.listen(str(self.directory / "sock"))
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                linux.keep_only(listener.fileno(), *self.pipe)
                if before is not None:
                    before()
                if kill_at:
                    sys.settrace(killer(kill_at))
                logger.serve(self.name.encode(), os.fsencode(self.run), listener.fileno(), self.pipe)
                status = 0
            except BaseException:  # noqa: BLE001 - a forked child says what it died of, and never returns
                traceback.print_exc()
            finally:
                os._exit(status)
        listener.close()
        self.pid = pid
        return pid

    def kill(self) -> None:
        """Kill the logger, if there is one."""
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self.reap()

    def reap(self) -> int:
        """Wait for its end: its exit code, negative for a signal."""
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    # Requests

    def request(self, kind: int, *fields: wire.Field, fds: Sequence[int] = ()) -> tuple[int, list[wire.Field]]:
        """Ask once. Raises Closed, or OSError, where the logger is killed meanwhile."""
        connection = packets.connect(str(self.directory / "sock"))
        connection.settimeout(PATIENCE)
        with connection:
            packets.send(connection, kind, 1, fields, fds)
            answer, request, reply, _ = packets.receive(connection)
        assert request == 1
        return answer, reply

    def ask(self, kind: int, *fields: wire.Field, fds: Sequence[int] = ()) -> None:
        """Ask until it is answered, of a new logger when one is killed. Fails for FAILED, and for any other death."""
        while True:
            try:
                answer, reply = self.request(kind, *fields, fds=fds)
            except (packets.Closed, ConnectionError):
                self.deaths += 1
                code = self.reap()
                assert code == -signal.SIGKILL, f"the logger ended with {code}"
                self.start()
                continue
            assert answer == wire.OK, reply
            return

    def add(self, box: Box, *, max_line: int = 16384, flags: int = 0, fds: Sequence[int] = ()) -> None:
        """Have a container logged."""
        path = bytes(box.log) if box.log is not None else b""
        self.ask(wire.ADD, box.id, path, max_line, flags, fds=fds)

    def settle(self, box: Box) -> None:
        """Until what is in the FIFOs now is in the log: a request is answered after the events that came before it."""
        for fd in box.spares:
            while waiting(fd):
                self.ask(wire.DRAIN, b"nobody")
        self.ask(wire.DRAIN, b"nobody")


def waiting(fd: int) -> int:
    """Bytes in a pipe."""
    count = bytearray(4)
    fcntl.ioctl(fd, linux.FIONREAD, count, True)
    return int.from_bytes(count, "little")


def killer(at: int) -> Callable[[FrameType, str, Any], Any]:
    """A trace function that kills this process before the `at`-th opcode in the logger's own code."""
    count = 0

    def local(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if event == "opcode":
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
        return local

    def every(frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(TRACED):
            return None
        frame.f_trace_opcodes = True
        return local

    return every
