"""CRI log lines back into what a container wrote."""

from __future__ import annotations

import pytest

from tare.cli.crilog import Entry, LogFormatError, Renderer, Splitter, last, parse

TIME = b"2025-01-31T10:00:00.123456789+00:00"


def line(content: bytes, stream: bytes = b"stdout", tag: bytes = b"F") -> bytes:
    return b" ".join([TIME, stream, tag, content])


def test_a_line_has_time_stream_tag_and_content() -> None:
    assert parse(line(b"a b  c ", b"stderr")) == Entry(TIME, "stderr", True, b"a b  c ")


def test_content_may_be_empty_and_more_tags_may_follow_the_first() -> None:
    assert parse(line(b"")) == Entry(TIME, "stdout", True, b"")
    assert parse(b"T stdout P") == Entry(b"T", "stdout", False, b"")
    assert parse(line(b"x", tag=b"P:more")) == Entry(TIME, "stdout", False, b"x")


@pytest.mark.parametrize("bad", [b"", b"hello", b"a b", TIME + b" stdlog F x", TIME + b" stdout X x"])
def test_what_is_no_entry_is_refused(bad: bytes) -> None:
    with pytest.raises(LogFormatError):
        parse(bad)


def test_pieces_are_joined_and_each_stream_has_its_own_line() -> None:
    renderer = Renderer(timestamps=True)
    entries = [line(b"one ", tag=b"P"), line(b"err", b"stderr"), line(b"line"), line(b"two")]
    assert [renderer.render(parse(entry)) for entry in entries] == [
        TIME + b" one ",
        TIME + b" err\n",
        b"line\n",
        TIME + b" two\n",
    ]


def test_a_line_waits_for_its_newline() -> None:
    splitter = Splitter()
    assert splitter.feed(b"a\nb") == [b"a"]
    assert splitter.feed(b"c") == []
    assert splitter.feed(b"\n\nd") == [b"bc", b""]
    assert splitter.reset() == b"d"


def test_the_last_lines_keep_their_pieces_together() -> None:
    lines = [
        line(b"first"),
        line(b"se", tag=b"P"),
        line(b"e1", b"stderr"),
        line(b"cond"),
        line(b"unended", tag=b"P"),
    ]
    assert last(lines, 0) == []
    assert last(lines, 1) == lines[4:]
    assert last(lines, 2) == [lines[1], *lines[3:]]
    assert last(lines, 3) == lines[1:]
    assert last(lines, 9) == lines
