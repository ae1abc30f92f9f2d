"""Whatever a container wrote, and however its log was cut, the command line brings it back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tare.cli.crilog import Renderer, Splitter, last, parse

Piece = tuple[str, bool, bytes]
CONTENT = st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"."))
PIECES = st.lists(st.tuples(st.sampled_from(["stdout", "stderr"]), st.booleans(), CONTENT))


def encode(pieces: list[Piece]) -> bytes:
    return b"".join(b"T %s %s %s\n" % (s.encode(), b"F" if whole else b"P", c) for s, whole, c in pieces)


@given(PIECES, st.lists(st.integers(min_value=1, max_value=40)))
def test_cutting_the_file_anywhere_changes_nothing(pieces: list[Piece], cuts: list[int]) -> None:
    data, splitter, renderer = encode(pieces), Splitter(), Renderer()
    out = {"stdout": b"", "stderr": b""}
    for cut in [*cuts, len(data)]:
        chunk, data = data[:cut], data[cut:]
        for line in splitter.feed(chunk):
            entry = parse(line)
            out[entry.stream] += renderer.render(entry)
    for line in splitter.feed(data):
        entry = parse(line)
        out[entry.stream] += renderer.render(entry)
    for stream, written in out.items():
        assert written == b"".join(c + (b"\n" if whole else b"") for s, whole, c in pieces if s == stream)


@given(PIECES, st.integers(min_value=0, max_value=10))
def test_the_last_lines_are_those_that_end_last(pieces: list[Piece], count: int) -> None:
    lines = encode(pieces).split(b"\n")[:-1]
    groups: list[list[int]] = []
    going: dict[str, list[int]] = {}
    for index, (stream, whole, _) in enumerate(pieces):
        going.setdefault(stream, []).append(index)
        if whole:
            groups.append(going.pop(stream))
    groups += going.values()
    groups.sort(key=lambda group: group[-1])
    expected = sorted(index for group in groups[len(groups) - min(count, len(groups)) :] for index in group)
    assert last(lines, count) == [lines[index] for index in expected]
