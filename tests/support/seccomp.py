"""A seccomp agent for tests: it is given listeners at a socket, and answers the calls that are for it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECV, SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND
NOTIFICATION = struct.Struct("=QIIiI7Q")  # id, pid, flags, call, architecture, instruction pointer and arguments
ANSWER = struct.Struct("=QqiI")  # id, value, error, flags
CONTINUE = 1
Json = dict[str, Any]


class Agent:
    """Listens at a path in a thread. Answers calls by `answers` (number → errno), and lets the others go on."""

    def __init__(self, path: Path, answers: dict[int, int]) -> None:
        self.answers = answers
        self.states: list[Json] = []
        self.calls: set[int] = set()
        self._stop, self._wake = os.pipe2(os.O_CLOEXEC)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listening.bind(str(path))
        self._listening.listen()
        self._listeners: list[int] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        os.close(self._wake)
        self._thread.join()
        self._listening.close()
        os.close(self._stop)
        for fd in self._listeners:
            os.close(fd)

    def _serve(self) -> None:
        while True:
            waited_for: list[Any] = [self._stop, self._listening, *self._listeners]
            ready = select.select(waited_for, [], [])[0]
            if self._stop in ready:
                return
            if self._listening in ready:
                self._take()
            for fd in ready:
                if fd in self._listeners:
                    self._answer(fd)

    def _take(self) -> None:
        """One connection: one state, the listener with its first bytes, and the end."""
        connection, _ = self._listening.accept()
        with connection:
            data, fds, _, _ = socket.recv_fds(connection, 100, 4)
            assert len(fds) == 1
            while part := connection.recv(65536):
                data += part
        self.states.append(json.loads(data))
        self._listeners += fds

    def _answer(self, fd: int) -> None:
        buffer = bytearray(NOTIFICATION.size)
        try:
            fcntl.ioctl(fd, RECV, buffer)
            identity, _, _, call, *_ = NOTIFICATION.unpack(buffer)
            self.calls.add(call)
            number = self.answers.get(call, 0)
            answer = ANSWER.pack(identity, 0, -number, 0 if number else CONTINUE)
            fcntl.ioctl(fd, SEND, bytearray(answer))
        except OSError as error:
            assert error.errno in (errno.ENOENT, errno.EINTR, errno.EBADF), error  # it has been killed meanwhile
            poll = select.poll()
            poll.register(fd)
            if any(event & select.POLLHUP for _, event in poll.poll(0)):  # nobody has the filter any more
                self._listeners.remove(fd)
                os.close(fd)


@contextmanager
def agent(path: Path, answers: dict[int, int] | None = None) -> Iterator[Agent]:
    made = Agent(path, answers or {})
    try:
        yield made
    finally:
        made.close()


def number_of(name: str) -> int:
    """A call's number on this machine."""
    number = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name(name.encode())
    assert isinstance(number, int) and number >= 0
    return number
