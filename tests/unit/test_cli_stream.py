"""The command line's end of a session that is joined before its container starts: what fails is told, and nothing is waited for."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tare.cli import stream
from tare.cli.stream import SessionFailed, Socket


class Given(Socket):
    """One whose daemon has said what it is going to say."""

    def __init__(self, connection: socket.socket, early: list[bytes]) -> None:
        self.connection = connection
        self.early = early
        self.unsent = bytearray()
        self.over = False

    def receive(self) -> Iterator[bytes]:
        self.over = True
        yield from ()


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The connection that a session has."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(stream, "connect", lambda url, beside: ours)
    with ours, theirs:
        yield ours


def joined(monkeypatch: pytest.MonkeyPatch, early: list[bytes], **options: Any) -> int | None:
    """A session without input."""
    monkeypatch.setattr(stream, "Socket", lambda connection, url, protocol: Given(connection, early))
    return stream.join("http://x/y", "/run/x", stdin=False, tty=False, keys="", **options)


def test_a_start_that_fails_ends_the_session(ours: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon goes on waiting for another start, and says nothing."""

    def fails() -> None:
        raise RuntimeError("the launcher is gone")

    with pytest.raises(RuntimeError, match="the launcher is gone"):
        joined(monkeypatch, [b"\1"], ready=fails)
    assert ours.fileno() == -1


def test_nothing_is_started_for_a_daemon_that_hangs_up(ours: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SessionFailed, match="the daemon is not ready"):
        joined(monkeypatch, [], ready=lambda: pytest.fail("it was started"))
    assert ours.fileno() == -1


@pytest.mark.timeout(30)
def test_a_signal_that_came_before_the_session_is_looked_at(
    ours: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    made: list[Given] = []

    def given(connection: socket.socket, url: str, protocol: str) -> Given:
        made.append(Given(connection, [b"\1"]))
        return made[0]

    def look() -> None:
        looked.append(1)
        made[0].over = True

    monkeypatch.setattr(stream, "Socket", given)
    with pytest.raises(SessionFailed, match="the daemon hung up"):
        stream.join("http://x/y", "/run/x", stdin=False, tty=False, keys="", ready=lambda: None, signalled=look)
    assert looked == [1]
