"""Records as they stand in a log file, byte for byte."""

from __future__ import annotations

import errno

from tare.launch import crilog

TIME = 1_767_225_600_000_000_007
STAMP = b"2026-01-01T00:00:00.000000007Z"


def test_whole_lines() -> None:
    text = STAMP + b" stdout F one\n" + STAMP + b" stdout F \n" + STAMP + b" stdout F two\n"
    assert crilog.format_batch(b"one\n\ntwo\n", TIME, b"stdout", False, 100) == (text, False)


def test_an_unfinished_line_goes_out_at_once() -> None:
    assert crilog.format_batch(b"wait", TIME, b"stderr", False, 100) == (STAMP + b" stderr P wait\n", True)
    assert crilog.format_batch(b"ed\n", TIME, b"stderr", True, 100) == (STAMP + b" stderr F ed\n", False)
    assert crilog.end_line(TIME, b"stderr") == STAMP + b" stderr F \n"


def test_nothing_said_changes_nothing() -> None:
    assert crilog.format_batch(b"", TIME, b"stdout", True, 100) == (b"", True)
    assert crilog.format_batch(b"", TIME, b"stdout", False, 100) == (b"", False)


def test_a_line_of_the_longest_length_is_whole_and_one_byte_more_is_not() -> None:
    assert crilog.format_batch(b"abc\n", TIME, b"stdout", False, 3)[0] == STAMP + b" stdout F abc\n"
    text = STAMP + b" stdout P abc\n" + STAMP + b" stdout F d\n"
    assert crilog.format_batch(b"abcd\n", TIME, b"stdout", False, 3)[0] == text


def test_carriage_returns_and_nul_bytes_are_the_containers_own() -> None:
    assert crilog.format_batch(b"a\r\0\xff\n", TIME, b"stdout", False, 9)[0] == STAMP + b" stdout F a\r\0\xff\n"


def test_a_notice_says_how_much_is_missing_and_why() -> None:
    full = STAMP + b" stdout F [tare: 2 lines of output dropped here: No space left on device]\n"
    assert crilog.loss_notice(TIME, b"stdout", 2, errno.ENOSPC) == full
    assert b"1 line of output" in crilog.loss_notice(TIME, b"stdout", 1, errno.ENOSPC)
    assert b"may be missing" in crilog.loss_notice(TIME, b"stdout", 1, 0)


def test_lines_are_counted_with_the_unfinished_one() -> None:
    assert [crilog.count_lines(data) for data in (b"", b"a", b"a\n", b"a\nb", b"\n\n")] == [0, 1, 1, 2, 2]
