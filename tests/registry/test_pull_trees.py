"""Any tree of files that tar and umoci make layers of arrives, by way of a registry, as umoci itself unpacks it."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernel.test_unpack_umoci import overlay, without_directory_times
from tests.support.image_service import image_service
from tests.support.registry import Registry, run
from tests.support.trees import Seen, tree_of

pytestmark = pytest.mark.root

NAMES = ["a", "b", "cc", "n" * 150, "ünï", ".hid", "with space"]
OWNERS = [0, 7, 70000]
Change = tuple[str, str, int]

paths = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3).map("/".join)
kinds = st.sampled_from(["file", "file", "hole", "directory", "symlink", "link", "fifo", "device", "mode", "remove"])
changes = st.lists(st.tuples(kinds, paths, st.integers(0, 1 << 20)), min_size=1, max_size=12)


def clear(path: Path) -> None:
    """Nothing is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def looks(path: Path, number: int, *, mode: bool = True) -> None:
    """Owner, mode, time and an attribute, by number."""
    os.chown(path, OWNERS[number % 3], OWNERS[number // 3 % 3], follow_symlinks=False)
    if mode:
        path.chmod([0o755, 0o700, 0o1777, 0o4755, 0o2750, 0o644][number % 6])
        if number % 4 == 0 and not path.is_fifo() and not path.is_char_device():
            os.setxattr(path, "user.x", str(number).encode())
    os.utime(path, (number, 1_000_000_000 + number), follow_symlinks=False)


def make(kind: str, path: Path, number: int, root: Path) -> None:
    """One thing that was not there."""
    if kind == "file":
        path.write_bytes(str(number).encode() * (number % 3000))
    elif kind == "hole":
        with path.open("wb") as file:
            file.seek(number)
            file.write(b"end")
    elif kind == "directory":
        path.mkdir()
    elif kind == "symlink":
        path.symlink_to(["a", "../b", "/etc", "nowhere"][number % 4])
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        os.mknod(path, 0o20600, os.makedev(5, 1 + number % 9))
    elif kind == "link":
        others = sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())
        if not others:
            return
        os.link(others[number % len(others)], path)
        return
    looks(path, number, mode=kind != "symlink")


def apply(root: Path, wanted: list[Change]) -> None:
    """Change a tree; what cannot be done to it as it is, is left out."""
    for kind, name, number in wanted:
        path = root / name
        if any((root / above).is_symlink() or (root / above).is_file() for above in Path(name).parents):
            continue
        if kind in ("mode", "remove"):
            if os.path.lexists(path):
                if kind == "remove":
                    clear(path)
                elif not path.is_symlink():
                    looks(path, number)
            continue
        if not path.parent.is_dir():
            continue
        clear(path)
        make(kind, path, number, root)


def image_of(scratch: Path, first: list[Change], format: str, later: list[list[Change]]) -> str:
    """A layout whose lowest layer tar made, and umoci those above; the image's name in it."""
    tree, layout = scratch / "tree", scratch / "layout"
    tree.mkdir()
    apply(tree, first)
    pack = [
        "tar",
        f"--format={format}",
        "--numeric-owner",
        "--sparse",
        "-C",
        str(tree),
        "-cf",
        str(scratch / "1.tar"),
        ".",
    ]
    run(*pack[:1], *(["--xattrs"] if format == "pax" else []), *pack[1:])
    run("umoci", "init", "--layout", str(layout))
    image = f"{layout}:latest"
    run("umoci", "new", "--image", image)
    run("umoci", "raw", "add-layer", "--image", image, str(scratch / "1.tar"))
    for number, more in enumerate(later):
        bundle = scratch / f"bundle{number}"
        run("umoci", "unpack", "--image", image, str(bundle))
        apply(bundle / "rootfs", more)
        run("umoci", "repack", "--image", image, str(bundle))
    return image


def timeless(tree: dict[str, Seen]) -> dict[str, Seen]:
    """Without the times of layers' roots, and of whiteouts: those are of their making."""
    return {p: replace(s, mtime=0) if "/" not in p or (s.kind, s.device) == ("c", 0) else s for p, s in tree.items()}


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes, st.sampled_from(["gnu", "pax"]), st.lists(changes, max_size=2))
def test_a_tree_arrives(registry: Registry, first: list[Change], format: str, later: list[list[Change]]) -> None:
    with tempfile.TemporaryDirectory(prefix="tare-trees-") as name:
        scratch = Path(name)
        image = image_of(scratch, first, format, later)
        run("umoci", "unpack", "--image", image, str(scratch / "oracle"))
        registry.push(scratch / "layout", "trees/any:1")
        unpacked = [pulled(scratch / str(n), f"{registry.url}/trees/any:1", n, scratch) for n in (1, 4)]
        theirs = without_directory_times(tree_of(scratch / "oracle/rootfs", ignore_xattrs=("trusted.",)))
        assert unpacked[0][0] == theirs
        assert unpacked[0][1] == unpacked[1][1]


def pulled(directory: Path, image: str, parallel: int, scratch: Path) -> tuple[dict[str, Seen], dict[str, Seen]]:
    """What a container would see, and what is in the layers' directories."""
    directory.mkdir()
    found: list[dict[str, Seen]] = []

    async def main() -> None:
        async with image_service(directory, parallel_layers=parallel) as service:
            layers = list(service.layer_paths(await service.pull(image, None)))[::-1]
            with overlay(layers, directory) as merged:
                found.append(without_directory_times(tree_of(merged, ignore_xattrs=("trusted.",))))
            found.append(timeless(tree_of(directory / "root/layers")))

    asyncio.run(main())
    return found[0], found[1]


def test_many_layers_at_once_are_what_one_after_the_other_are(registry: Registry, tmp_path: Path) -> None:
    """With some thousands of files of this machine, in layers that change each other's."""
    source = next(path for path in (Path("/usr/lib/python3"), Path("/usr/share/perl"), Path("/etc")) if path.is_dir())
    tree, layout = tmp_path / "tree", tmp_path / "layout"
    subprocess.run(["cp", "-a", "--no-preserve=context", str(source), str(tree)], check=True, timeout=60)
    run("umoci", "init", "--layout", str(layout))
    run("umoci", "new", "--image", f"{layout}:latest")
    edits: list[Callable[[Path], object]] = [
        lambda path: None,
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes() * 2),
        lambda path: path.chmod(0o700),
    ]
    for number in range(4):
        files = sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())
        for at, path in enumerate(files[number::17]):
            edits[at % len(edits) if number else 0](path)
        run("tar", "--format=pax", "-C", str(tree), "-cf", str(tmp_path / "l.tar"), ".")
        run("umoci", "raw", "add-layer", "--image", f"{layout}:latest", str(tmp_path / "l.tar"))
    registry.push(layout, "trees/many:1")
    one, many = (pulled(tmp_path / str(n), f"{registry.url}/trees/many:1", n, tmp_path) for n in (1, 4))
    assert len(one[1]) > 100 and one == many
