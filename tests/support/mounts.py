"""Mount tables for tests to look at, and a file system of a test's own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tare.launch import linux


def mounts_below(directory: Path) -> list[str]:
    """Mount points below a directory, inner ones first."""
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in reversed(list(points)) if point.startswith(f"{directory}/")]


@dataclass(frozen=True, slots=True, kw_only=True)
class MountLine:
    """A line of mountinfo: where, with which flags, of which type, and its propagation fields ("master:7")."""

    point: str
    flags: frozenset[str]
    kind: str
    source: str
    propagation: tuple[str, ...]
    super_options: frozenset[str]


def mount_table(text: str) -> dict[str, MountLine]:
    """Mount point → the uppermost mount there, of a /proc/PID/mountinfo (proc(5))."""
    found = {}
    for entry in text.splitlines():
        left, _, right = entry.partition(" - ")
        fields, (kind, source, options) = left.split(), right.split(" ", 2)
        found[fields[4]] = MountLine(
            point=fields[4],
            flags=frozenset(fields[5].split(",")),
            kind=kind,
            source=source,
            propagation=tuple(fields[6:]),
            super_options=frozenset(options.split(",")),
        )
    return found


@contextlib.contextmanager
def mounted_tmpfs(path: Path, propagation: int = 0) -> Iterator[Path]:
    """A tmpfs of the test's own at `path`, made a directory; with an MS_ propagation."""
    path.mkdir()
    linux.mount(b"tmpfs", bytes(path), b"tmpfs")
    try:
        if propagation:
            linux.mount(None, bytes(path), None, propagation)
        yield path
    finally:
        linux.umount(bytes(path), linux.MNT_DETACH)
