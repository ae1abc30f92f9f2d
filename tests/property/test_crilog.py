"""Whatever a container says in whatever pieces, the records give it back, none is longer than allowed, and none is needless."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tare.launch import crilog
from tests.support.loggers import LINE, reassemble

PIECE = st.binary(min_size=1, max_size=40) | st.text("ab\n", min_size=1, max_size=40).map(str.encode)
BATCHES = st.lists(st.tuples(st.sampled_from(crilog.STREAMS), PIECE), max_size=20)
MAX_LINE = st.integers(min_value=1, max_value=12)


def written(batches: list[tuple[bytes, bytes]], max_line: int) -> bytes:
    """A log of these batches, ended."""
    log = b""
    is_open = dict.fromkeys(crilog.STREAMS, False)
    for number, (stream, data) in enumerate(batches):
        text, is_open[stream] = crilog.format_batch(data, number, stream, is_open[stream], max_line)
        log += text
    for stream in crilog.STREAMS:
        if is_open[stream]:
            log += crilog.end_line(len(batches), stream)
    return log


@settings(deadline=None)
@given(BATCHES, MAX_LINE)
def test_the_records_give_each_stream_back(batches: list[tuple[bytes, bytes]], max_line: int) -> None:
    expected: dict[str, bytes] = {}
    for stream, data in batches:
        expected[stream.decode()] = expected.get(stream.decode(), b"") + data
    ended = {name: data if data.endswith(b"\n") else data + b"\n" for name, data in expected.items()}
    assert reassemble(written(batches, max_line), max_line) == ended


@settings(deadline=None)
@given(PIECE, MAX_LINE)
def test_a_batch_has_as_few_records_as_its_lines_need(data: bytes, max_line: int) -> None:
    text, is_open = crilog.format_batch(data, 0, b"stdout", False, max_line)
    expected: list[bytes] = []
    *lines, rest = data.split(b"\n")
    for line, tag in [*((line, b"F") for line in lines), *([(rest, b"P")] if rest else [])]:
        parts = [line[start : start + max_line] for start in range(0, len(line), max_line)] or [b""]
        expected += [b"P " + part for part in parts[:-1]] + [tag + b" " + parts[-1]]
    assert [record[38:] for record in text.split(b"\n")[:-1]] == expected
    assert is_open == bool(rest)


@settings(deadline=None)
@given(st.integers(min_value=0, max_value=4_000_000_000 * 10**9))
def test_a_time_is_rfc_3339_with_nine_digits(time_ns: int) -> None:
    assert LINE.fullmatch(crilog.stamp(time_ns) + b" stdout F ")
