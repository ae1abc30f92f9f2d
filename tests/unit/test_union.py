"""Looking up paths in stacked directories (what needs no root: whiteouts are in tests/kernel)."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tare.storage.union import Kind, kind, read


@pytest.fixture(name="layers")
def _layers(tmp_path: Path) -> tuple[Path, Path]:
    top, low = tmp_path / "top", tmp_path / "low"
    for layer in (top, low):
        (layer / "etc").mkdir(parents=True)
    (low / "etc/passwd").write_text("low")
    (low / "etc/group").write_text("low group")
    (top / "etc/passwd").write_text("top")
    return top, low


def test_the_topmost_wins_and_directories_merge(layers: tuple[Path, Path]) -> None:
    assert read(layers, "/etc/passwd", 100) == b"top"
    assert read(layers, "etc//./group", 100) == b"low group"
    assert read(layers, "/etc/passwd", 2) == b"to"
    assert read(layers, "/etc/passwd", 0) == b""
    assert read(layers, "/etc/shadow", 100) is None
    assert read(layers, "/etc/passwd/x", 100) is None
    assert read(layers, "/etc", 100) is None
    assert kind(layers, "/etc") is kind(layers, "/") is kind(layers, "..") is Kind.DIRECTORY
    assert kind(layers, "/etc/group") is Kind.FILE
    assert kind(layers, "/nothing/at/all") is None


def test_a_file_hides_a_directory_below_it_and_the_other_way_round(layers: tuple[Path, Path]) -> None:
    top, low = layers
    (top / "a").write_text("file")
    (low / "a").mkdir()
    (low / "a/b").write_text("hidden")
    (top / "c").mkdir()
    (low / "c").write_text("hidden")
    assert read(layers, "/a", 100) == b"file"
    assert read(layers, "/a/b", 100) is None
    assert kind(layers, "/c") is Kind.DIRECTORY


@pytest.mark.parametrize(
    ("target", "content"),
    [
        ("group", b"low group"),
        ("./group", b"low group"),
        ("../etc/group", b"low group"),
        ("/etc/group", b"low group"),
        ("../../../../../etc/group", b"low group"),
        ("/proc/self/cmdline", None),
        ("/etc/missing", None),
    ],
)
def test_links_lead_nowhere_outside(layers: tuple[Path, Path], target: str, content: bytes | None) -> None:
    (layers[0] / "etc/link").symlink_to(target)
    (layers[1] / "elsewhere").symlink_to("etc")
    assert read(layers, "/etc/link", 100) == content
    assert read(layers, "/elsewhere/link", 100) == content


def test_links_in_a_circle(layers: tuple[Path, Path]) -> None:
    (layers[0] / "a").symlink_to("b")
    (layers[1] / "b").symlink_to("/a")
    with pytest.raises(OSError, match="Too many levels") as caught:
        kind(layers, "/a/x")
    assert caught.value.errno == errno.ELOOP


def test_what_is_no_file_is_not_read(layers: tuple[Path, Path]) -> None:
    os.mkfifo(layers[0] / "etc/fifo")
    assert read(layers, "/etc/fifo", 100) is None
    assert kind(layers, "/etc/fifo") is Kind.OTHER


def test_no_descriptor_stays_open(layers: tuple[Path, Path]) -> None:
    before = os.listdir("/proc/self/fd")
    for path in ("/etc/passwd", "/etc/none", "/", "/etc/passwd/x"):
        kind(layers, path)
    assert os.listdir("/proc/self/fd") == before


def test_a_layer_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        kind((tmp_path / "none",), "/etc")
