"""Any stack of layers: what overlayfs shows of the layers that Tare unpacked is what umoci unpacks into one tree."""

from __future__ import annotations

import io
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tare.images.inherit import inherit
from tare.images.unpack import unpack
from tests.support.images import (
    Device,
    Directory,
    Fifo,
    File,
    Hardlink,
    Node,
    Opaque,
    Symlink,
    Whiteout,
    make_image,
    tar_of,
)
from tests.support.registry import run
from tests.support.trees import Seen, tree_of

pytestmark = pytest.mark.root

Entries = list[tuple[str, Node]]
NAMES = ["a", "b", "c", "long-" + "n" * 120, "ünï"]
name = st.sampled_from(NAMES)
mode = st.sampled_from([0o755, 0o700, 0o1777, 0o4755, 0o2750, 0o644])
owner = st.sampled_from([0, 7, 70000])
xattrs = st.sampled_from([{}, {"user.x": b"1"}, {"user.y": b"\xfe\0"}])


@st.composite
def file_node(draw: st.DrawFn) -> Node:
    meta: dict[str, Any] = {
        "mode": draw(mode),
        "uid": draw(owner),
        "gid": draw(owner),
        "mtime": draw(st.integers(0, 2**31)),
    }
    kind = draw(st.sampled_from(["file", "file", "symlink", "device", "fifo"]))
    if kind == "symlink":
        return Symlink(draw(st.sampled_from(["a", "../b", "/etc", "nowhere"])), **meta)
    if kind == "device":
        return Device(draw(st.sampled_from(["c", "b"])), 5, draw(st.integers(1, 9)), **meta)
    return Fifo(**meta) if kind == "fifo" else File(draw(st.binary(max_size=2000)), xattrs=draw(xattrs), **meta)


class Stack:
    """Layers in the making, and which paths are directories or files in what they amount to."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.kinds: dict[str, str] = {}
        self.layers: list[Entries] = []

    def remove(self, path: str) -> None:
        """Forget a path and what is below it."""
        self.kinds = {
            known: kind for known, kind in self.kinds.items() if known != path and not known.startswith(path + "/")
        }

    def add_layer(self) -> None:
        """A layer of some changes to what there is; no path is spoken of twice."""
        draw = self.draw
        entries: Entries = []
        spoken: set[str] = set()
        for _ in range(draw(st.integers(1, 6))):
            parent = draw(st.sampled_from(["", *sorted(path for path, kind in self.kinds.items() if kind == "d")]))
            path = f"{parent}/{draw(name)}".lstrip("/")
            if path in spoken or path.count("/") > 3:
                continue
            spoken.add(path)
            change = draw(st.sampled_from(["file", "file", "directory", "link", "remove", "empty"]))
            entries += self.change(change, path, [seen for seen, node in entries if isinstance(node, File)])
        self.layers.append(entries)

    def change(self, change: str, path: str, files: list[str]) -> Entries:
        """The entries that make one change, if it can be made."""
        kind = self.kinds.get(path)
        if change == "remove" and kind and self.layers:
            self.remove(path)
            return [(path, Whiteout())]
        if change == "empty" and kind == "d" and self.layers:
            self.remove(path)
            self.kinds[path] = "d"
            return [(path, Directory(mode=self.draw(mode))), (path, Opaque())]
        if change == "directory":
            self.kinds[path] = "d"
            return [(path, Directory(mode=self.draw(mode), uid=self.draw(owner), xattrs=self.draw(xattrs)))]
        if change == "link" and files and kind is None:
            self.kinds[path] = "-"
            return [(path, Hardlink(self.draw(st.sampled_from(files))))]
        if change == "file" and kind != "d":
            self.kinds[path] = "-"
            return [(path, self.draw(file_node()))]
        return []


def hides_its_own(layer: Entries) -> bool:
    """Whether a layer hides a path above one of its own entries.

    A whiteout is for the layers below alone, so what is implied above the entry begins anew; umoci keeps the lower
    directory's looks there if the whiteout comes later in the archive.
    """
    hidden = [name for name, node in layer if isinstance(node, Whiteout)]
    return any(name.startswith(f"{above}/") for above in hidden for name, _ in layer)


@st.composite
def stacks(draw: st.DrawFn) -> list[Entries]:
    stack = Stack(draw)
    for _ in range(draw(st.integers(1, 4))):
        stack.add_layer()
    root: tuple[str, Node] = ("./", Directory(mode=0o755))
    assume(not any(hides_its_own(layer) for layer in stack.layers))
    return [[root, *layer] if number == 0 else layer for number, layer in enumerate(stack.layers)]


@contextmanager
def overlay(layers: list[Path], scratch: Path) -> Iterator[Path]:
    """A read-only overlay of layers, bottom first."""
    point, bottom = scratch / "merged", scratch / "bottom"
    point.mkdir()
    bottom.mkdir()
    lower = ":".join(map(str, [*reversed(layers), bottom]))
    subprocess.run(
        ["mount", "-t", "overlay", "tare-test", "-o", f"ro,lowerdir={lower}", str(point)], check=True, timeout=30
    )
    try:
        yield point
    finally:
        subprocess.run(["umount", str(point)], check=True, timeout=30)


def without_directory_times(tree: dict[str, Seen]) -> dict[str, Seen]:
    return {path: replace(seen, mtime=0) if seen.kind == "d" else seen for path, seen in tree.items()}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(stacks())
def test_the_same_tree_as_umoci(stack: list[Entries]) -> None:
    with tempfile.TemporaryDirectory(prefix="tare-umoci-") as directory:
        scratch = Path(directory)
        archives = [tar_of(layer) for layer in stack]
        make_image(scratch / "layout", archives)
        run("umoci", "unpack", "--image", f"{scratch}/layout:latest", str(scratch / "bundle"))
        layers: list[Path] = []
        for number, archive in enumerate(archives):
            layer = scratch / str(number)
            layer.mkdir(mode=0o755)
            unpacked = unpack(io.BytesIO(archive).read, layer)
            inherit(layer, unpacked.implied, layers[::-1])
            layers.append(layer)
        with overlay(layers, scratch) as merged:
            ours = without_directory_times(tree_of(merged, ignore_xattrs=("trusted.",)))
        theirs = without_directory_times(tree_of(scratch / "bundle" / "rootfs", ignore_xattrs=("trusted.",)))
        assert ours == theirs


def test_umoci_is_given_something_to_do(tmp_path: Path) -> None:
    """The oracle itself sees whiteouts, opaque directories and links (so that an empty comparison would be noticed)."""
    first: Entries = [("./", Directory()), ("d", Directory()), ("d/x", File(b"1")), ("gone", File(b""))]
    second: Entries = [
        ("gone", Whiteout()),
        ("d", Directory()),
        ("d", Opaque()),
        ("d/y", File(b"2")),
        ("d/z", Hardlink("d/y")),
    ]
    make_image(tmp_path / "layout", [tar_of(first), tar_of(second)])
    run("umoci", "unpack", "--image", f"{tmp_path}/layout:latest", str(tmp_path / "bundle"))
    assert sorted(os.listdir(tmp_path / "bundle/rootfs/d")) == ["y", "z"]
    assert not (tmp_path / "bundle/rootfs/gone").exists()
