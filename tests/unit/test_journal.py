"""The journal as a file: what one logger notes, the next one reads. (That it survives kills: tests/kernel/test_logger_kill.py.)"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tare.launch import journal

U8, U32, U64 = (st.integers(min_value=0, max_value=(1 << bits) - 1) for bits in (8, 32, 64))


def in_process(action: Callable[[], None]) -> None:
    """Run something in a process that dies afterwards, as a logger does, and with it its lock."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@settings(deadline=None)
@given(st.booleans(), U8, U8, U32, st.tuples(U32, U32), st.tuples(U64, U64, U64))
def test_a_record_is_read_as_it_was_written(
    used: bool, is_open: int, ended: int, error: int, lost: tuple[int, int], numbers: tuple[int, int, int]
) -> None:
    record = journal.Record()
    record.used, record.is_open, record.ended, record.error, record.lost = used, is_open, ended, error, list(lost)
    record.device, record.inode, record.offset = numbers
    packed = record.pack()
    assert len(packed) <= 64
    again = journal.Record.unpack(packed)
    assert all(getattr(again, name) == getattr(record, name) for name in journal.Record.__slots__)


def test_the_next_one_reads_what_was_noted(tmp_path: Path) -> None:
    path = bytes(tmp_path / "journal")

    def note() -> None:
        book = journal.Journal(path)
        assert (book.phase, book.pipe) == (journal.IDLE, 0)
        book.pipe = 77
        book.begin(3, 1, journal.DATA)
        book.moved(5, 123)
        book.buffer[:5] = b"hello"
        book.aim(1, 2, 3)

    def read() -> None:
        book = journal.Journal(path)
        assert (book.phase, book.pipe) == (journal.HELD, 77)
        assert book.subject() == (3, 1, journal.DATA)
        assert book.amount() == (5, 123)
        assert book.target() == (1, 2, 3)
        assert book.data(5) == b"hello"

    in_process(note)
    in_process(read)


def test_a_commit_cut_short_is_done_again(tmp_path: Path) -> None:
    path = bytes(tmp_path / "journal")

    class Killed(journal.Journal):
        def redo(self) -> None:
            os._exit(0)

    def commit() -> None:
        book = Killed(path)
        book.reserve(2)
        record = journal.Record()
        record.used, record.offset = True, 4096
        book.commit(2, record)

    def finish() -> None:
        book = journal.Journal(path)
        assert book.phase == journal.REDO
        assert not book.record(2).used
        book.redo()
        assert book.phase == journal.IDLE
        assert (book.record(2).used, book.record(2).offset) == (True, 4096)

    in_process(commit)
    in_process(finish)


def test_a_journal_of_another_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(struct.pack("<I", 9))

    def refuse() -> None:
        with pytest.raises(OSError, match="journal of version 9"):
            journal.Journal(bytes(path))

    in_process(refuse)
    assert path.read_bytes() == struct.pack("<I", 9)


def test_it_takes_little_room(tmp_path: Path) -> None:
    in_process(lambda: journal.Journal(bytes(tmp_path / "journal")).reserve(0))
    assert (tmp_path / "journal").stat().st_blocks * 512 <= 80 << 10
