"""Reading log files that grow, are rotated and are cut short."""

from __future__ import annotations

from pathlib import Path

import pytest

from tare.cli.follow import BLOCK, LogFile


def entry(text: str) -> bytes:
    return f"T stdout F {text}".encode()


def append(path: Path, *lines: bytes) -> None:
    with path.open("ab") as file:
        file.write(b"".join(line + b"\n" for line in lines))


def test_a_file_that_comes_later_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    with LogFile(str(path)) as log:
        assert list(log.read()) == []
        append(path, b"a")
        assert list(log.read()) == [b"a"]
        append(path, b"b", b"c")
        assert list(log.read()) == [b"b", b"c"]


def test_a_rotated_file_is_read_to_its_end_before_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    append(path, b"a")
    with LogFile(str(path)) as log:
        assert list(log.read()) == [b"a"]
        path.rename(tmp_path / "0.log.1")
        append(tmp_path / "0.log.1", b"b")
        assert list(log.read()) == [b"b"]
        append(tmp_path / "0.log.1", b"c")
        append(path, b"d")
        assert list(log.read()) == [b"c", b"d"]


def test_a_file_cut_short_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    append(path, b"long line")
    with LogFile(str(path)) as log:
        assert list(log.read()) == [b"long line"]
        path.write_bytes(b"b\n")
        assert list(log.read()) == [b"b"]


@pytest.mark.parametrize("padding", [0, BLOCK, 5 * BLOCK])
def test_the_last_lines_are_found_from_the_end_and_reading_goes_on_after_them(tmp_path: Path, padding: int) -> None:
    path = tmp_path / "0.log"
    append(path, entry("first"), entry("x" * padding), entry("y"), entry("z"))
    with LogFile(str(path)) as log:
        assert log.skip_to_last(2) == [entry("y"), entry("z")]
        append(path, entry("new"))
        assert list(log.read()) == [entry("new")]
    with LogFile(str(path)) as log:
        assert log.skip_to_last(9)[0] == entry("first")
