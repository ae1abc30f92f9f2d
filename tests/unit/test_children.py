"""What the launcher hears of a child that may be in other hands: each message in its shape, at its time, and of who has to say it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from tare.launch import children, packets, wire

MAKER, OTHER = 70, 71


@pytest.fixture
def child() -> Iterator[children.Child]:
    """An exec that is being made by MAKER."""
    made = children.Child(wire.EXEC, b"e", socket.socket(), 1)
    made.helper_pid = MAKER
    yield made
    for end in (made.status, made.theirs, made.connection):
        if end is not None:
            end.close()
    made.outcome.close()


def test_who_was_made_is_heard_once_and_of_its_maker(child: children.Child) -> None:
    assert child.may_say(MAKER, wire.CHILD, [5], [9])
    assert not child.may_say(OTHER, wire.CHILD, [5], [9])
    assert not child.may_say(MAKER, wire.CHILD, [5], [])
    assert not child.may_say(MAKER, wire.CHILD, [5], [9, 10])
    assert not child.may_say(MAKER, wire.CHILD, [b"5"], [9])
    child.pid = 5
    assert not child.may_say(MAKER, wire.CHILD, [6], [9])


def test_a_child_without_a_maker_names_nobody(child: children.Child) -> None:
    child.helper_pid = 0
    assert not child.may_say(OTHER, wire.CHILD, [5], [9])


def test_a_terminal_comes_once(child: children.Child) -> None:
    assert child.may_say(OTHER, wire.TERMINAL, [], [9])
    assert not child.may_say(OTHER, wire.TERMINAL, [], [])
    child.terminal = 9
    assert not child.may_say(OTHER, wire.TERMINAL, [], [9])


def test_it_is_at_its_gate_once(child: children.Child) -> None:
    assert child.may_say(OTHER, wire.READY, [b"a warning", b"another"], [])
    assert not child.may_say(OTHER, wire.READY, [1], [])
    assert not child.may_say(OTHER, wire.READY, [], [9])
    child.early = (wire.READY, [])
    assert not child.may_say(OTHER, wire.READY, [], [])
    child.early, child.ready = None, True
    assert not child.may_say(OTHER, wire.READY, [], [])


def test_warnings_fit_into_an_answer(child: children.Child) -> None:
    """One that is as long as a packet can be, and many that are empty, are nobody's; what is heard has room in an answer."""
    longest = wire.MAX_PACKET - wire.HEADER.size - wire.FIELD.size
    assert len(wire.encode(wire.READY, 0, [bytes(longest)])) == wire.MAX_PACKET
    assert not child.may_say(OTHER, wire.READY, [bytes(longest)], [])
    assert not child.may_say(OTHER, wire.READY, [b""] * (longest // wire.FIELD.size), [])
    most = [bytes(wire.MAX_PACKET // 2 - wire.FIELD.size)]
    assert child.may_say(OTHER, wire.READY, most, [])
    assert wire.encode(wire.OK, 1, [1, 1, *most])


def test_only_a_container_waits_to_be_placed_and_once(child: children.Child) -> None:
    assert not child.may_say(OTHER, wire.BARRIER, [], [])
    child.kind = wire.CREATE
    assert child.may_say(OTHER, wire.BARRIER, [], [])
    child.placed = True
    assert not child.may_say(OTHER, wire.BARRIER, [], [])


def test_only_who_was_asked_to_do_something_has_done_it(child: children.Child) -> None:
    assert not child.may_say(OTHER, wire.OK, [1, 1], []) and not child.may_say(OTHER, wire.OK, [1], [])
    child.kind = wire.NAMESPACES
    assert child.may_say(OTHER, wire.OK, [1], [9]) and not child.may_say(OTHER, wire.OK, [b"1"], [])
    child.kind = wire.CHECK
    assert child.may_say(OTHER, wire.OK, [b"d", b"f"], []) and not child.may_say(OTHER, wire.OK, [1], [])
    child.answered = True
    assert not child.may_say(OTHER, wire.OK, [b"d"], [])


def test_a_failure_has_a_number_that_there_is(child: children.Child) -> None:
    assert child.may_say(OTHER, wire.FAILED, [b"setup", 0, b""], [])
    wrong: list[list[wire.Field]] = [[b"setup", -1, b""], [b"setup", 1 << 40, b""], [b"setup", b"", b""], []]
    for fields in wrong:
        assert not child.may_say(OTHER, wire.FAILED, fields, [])
    child.outcome[:5] = b"\xff\xff\xff\xff\x02"
    assert child.read_outcome() == (b"exec", 4095)


@pytest.mark.parametrize("kind", [wire.GO, wire.HOLD, wire.ASK, wire.BORN, 0, 255])
def test_nothing_else_is_a_childs_to_say(kind: int, child: children.Child) -> None:
    assert not child.may_say(OTHER, kind, [], [])


def test_the_kernel_says_who_speaks(child: children.Child) -> None:
    assert child.status is not None
    child.status.setblocking(True)
    packets.send(child.theirs, wire.READY)
    assert packets.receive_from(child.status)[:2] == (os.getpid(), wire.READY)
    speaker = os.fork()
    if speaker == 0:
        packets.send(child.theirs, wire.CHILD, 0, (1,), (0,))
        os._exit(0)
    sender, kind, _, _, fds = packets.receive_from(child.status)
    packets.close_all(fds)
    os.waitpid(speaker, 0)
    assert (sender, kind, len(fds)) == (speaker, wire.CHILD, 1)
