"""Clients attached to a container's output: each gets all of it, in order, while the log is written; a slow one waits, and harms nobody for long."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tare.launch import taps, wire
from tests.support.loggers import Box, Group

pytestmark = pytest.mark.root

SECONDS = 20.0


class Tap:
    """A client's end."""

    def __init__(self, group: Group, box: Box) -> None:
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            group.ask(wire.ATTACH, box.id, fds=[theirs.fileno()])
        self.socket.settimeout(SECONDS)
        self.said: dict[int, bytes] = {1: b"", 2: b""}
        self.over = False

    def take(self) -> bool:
        """One packet; False at the end."""
        packet = self.socket.recv(1 << 17)
        if not packet:
            return False
        if packet == taps.OVER:
            self.over = True
        else:
            self.said[packet[0]] += packet[1:]
        return True

    def until(self, size: int) -> None:
        """Until so many bytes have come."""
        while sum(map(len, self.said.values())) < size:
            assert self.take()

    def rest(self) -> None:
        """To the end."""
        while self.take():
            continue
        self.close()

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    with Group(tmp_path) as group:
        group.start()
        yield group


def added(group: Group, name: str = "c1") -> Box:
    box = group.container(name)
    group.add(box)
    return box


def test_each_client_gets_all_from_when_it_came(group: Group) -> None:
    box = added(group)
    os.write(box.writers["stdout"], b"before\n")
    first = Tap(group, box)
    os.write(box.writers["stdout"], b"one\n")
    os.write(box.writers["stderr"], b"wrong\n")
    first.until(10)
    second = Tap(group, box)
    os.write(box.writers["stdout"], b"two\n")
    box.hang_up()
    group.ask(wire.DRAIN, box.id)
    for tap in (first, second):
        tap.rest()
    assert first.said[1].endswith(b"one\ntwo\n")
    assert first.said[2] == b"wrong\n"
    assert second.said == {1: b"two\n", 2: b""}
    assert first.over and second.over
    assert box.said() == {"stdout": b"before\none\ntwo\n", "stderr": b"wrong\n"}


def test_a_slow_client_holds_its_container_back_and_no_other(group: Group) -> None:
    box, other = added(group), added(group, "c2")
    tap = Tap(group, box)
    sent = os.urandom(4 << 20).replace(b"\n", b"n")
    writer = threading.Thread(target=write_all, args=(box.writers["stdout"], sent))
    writer.start()
    writer.join(1.0)
    assert writer.is_alive()
    os.write(other.writers["stdout"], b"free\n")
    wait_for(lambda: other.said().get("stdout") == b"free\n")
    tap.until(len(sent))
    writer.join(SECONDS)
    assert tap.said[1] == sent
    os.write(box.writers["stdout"], b"\n")
    box.hang_up()
    group.ask(wire.DRAIN, box.id)
    assert box.said()["stdout"] == sent + b"\n"
    tap.rest()
    assert tap.over


def test_a_client_that_leaves_lets_its_container_go_on(group: Group) -> None:
    box = added(group)
    tap = Tap(group, box)
    writer = threading.Thread(target=write_all, args=(box.writers["stdout"], b"x" * (2 << 20) + b"\n"))
    writer.start()
    writer.join(0.5)
    assert writer.is_alive()
    tap.close()
    writer.join(SECONDS)
    assert not writer.is_alive()
    box.hang_up()
    group.ask(wire.DRAIN, box.id)
    assert len(box.said()["stdout"]) == (2 << 20) + 1


def test_a_client_that_takes_nothing_is_cut_off(tmp_path: Path) -> None:
    def impatient() -> None:
        taps.PATIENCE = 0.5

    with Group(tmp_path) as group:
        group.start(before=impatient)
        box = added(group)
        tap = Tap(group, box)
        write_all(box.writers["stdout"], b"y" * (3 << 20) + b"\n")
        box.hang_up()
        group.ask(wire.DRAIN, box.id)
        assert len(box.said()["stdout"]) == (3 << 20) + 1
        tap.rest()
        assert not tap.over


def test_what_is_left_of_a_dead_container_is_kept_for_a_slow_client(group: Group) -> None:
    box = added(group)
    tap = Tap(group, box)
    sent = b"z" * 200_000 + b"\n"
    writer = threading.Thread(target=write_all, args=(box.writers["stdout"], sent * 3))
    writer.start()
    writer.join(0.5)
    tap.until(400_000)
    writer.join(SECONDS)
    box.hang_up()
    group.ask(wire.DRAIN, box.id)
    group.ask(wire.REMOVE, box.id)
    tap.rest()
    assert tap.over
    assert tap.said[1] == sent * 3


def test_a_logger_that_dies_is_told_from_a_container_that_ends(group: Group) -> None:
    box = added(group)
    tap = Tap(group, box)
    os.write(box.writers["stdout"], b"hello\n")
    tap.until(6)
    group.kill()
    tap.rest()
    assert not tap.over


def test_a_client_of_a_container_that_is_over_is_told_at_once(group: Group) -> None:
    box = added(group)
    box.hang_up()
    group.ask(wire.DRAIN, box.id)
    tap = Tap(group, box)
    tap.rest()
    assert tap.over


def test_what_is_no_such_socket_is_refused(group: Group) -> None:
    box = added(group)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, pytest.raises(AssertionError, match="SEQPACKET"):
        group.ask(wire.ATTACH, box.id, fds=[theirs.fileno()])


def test_stdin_that_is_ended_is_ended_for_good(group: Group) -> None:
    box = group.container("c1")
    os.mkfifo(box.directory / "stdin")
    group.add(box, flags=wire.ADD_STDIN)
    reader = os.open(box.directory / "stdin", os.O_RDONLY | os.O_NONBLOCK)
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    assert poll.poll(100) == []
    group.ask(wire.CLOSE_INPUT, box.id)
    assert [event & select.POLLHUP for _, event in poll.poll(5000)] == [select.POLLHUP]
    os.close(reader)
    group.kill()
    group.start()
    group.ask(wire.CLOSE_INPUT, box.id)
    assert not (box.directory / "stdin").exists()


def write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def wait_for(true: object) -> None:
    assert callable(true)
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
