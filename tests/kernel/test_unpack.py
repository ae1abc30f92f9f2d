"""Layers unpacked on a real filesystem: what an archive says is what is there, in overlayfs form."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tare.images.inherit import inherit
from tare.images.layer import LayerError
from tare.images.unpack import OPEN_DIRECTORIES, Limits, Unpacked, unpack
from tests.support.images import Device, Directory, Fifo, File, Hardlink, Node, Opaque, Symlink, Whiteout, tar_of
from tests.support.trees import tree_of

pytestmark = pytest.mark.root

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)  # cap_net_bind_service+ep, revision 2


def chunks(data: bytes, size: int = 10_000) -> Callable[[], bytes]:
    pieces = iter([data[start : start + size] for start in range(0, len(data), size)])
    return lambda: next(pieces, b"")


def apply(root: Path, *entries: tuple[str, Node]) -> Unpacked:
    """Unpack entries in their order; a name may come twice."""
    root.mkdir(exist_ok=True)
    return unpack(chunks(tar_of(entries)), root)


def has(path: Path) -> str:
    """A word for what is at a path."""
    status = os.lstat(path)
    if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
        return "whiteout"
    if stat.S_ISDIR(status.st_mode) and "trusted.overlay.opaque" in os.listxattr(path):
        return "opaque"
    return stat.filemode(status.st_mode)[0]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0])
def test_everything_that_an_entry_says_is_there(tmp_path: Path, mask: int) -> None:
    data = os.urandom(40_000)
    with umask(mask):
        unpacked = apply(
            tmp_path / "l",
            ("d", Directory(mode=0o1777, uid=3, gid=4, mtime=1000.5, xattrs={"user.d": b"1"})),
            (
                "d/f",
                File(
                    data,
                    mode=0o4751,
                    uid=5,
                    gid=6,
                    mtime=2000.25,
                    xattrs={"user.f": b"\xff\0", "security.capability": CAPABILITY},
                ),
            ),
            ("d/empty", File(b"", mode=0o600)),
            ("d/h", Hardlink("d/f")),
            ("d/s", Symlink("../../../etc/passwd", uid=7, gid=8, mtime=3000)),
            ("d/c", Device("c", 5, 1, mode=0o622, uid=1, gid=2)),
            ("d/b", Device("b", 8, 17, mode=0o660)),
            ("d/p", Fifo(mode=0o2644, gid=9)),
        )
    tree = tree_of(tmp_path / "l")
    directory, file = tree["d"], tree["d/f"]
    assert (directory.mode, directory.uid, directory.gid, directory.mtime) == (0o1777, 3, 4, 1000.5)
    assert directory.xattrs == (("user.d", b"1"),)
    assert (tmp_path / "l/d/f").read_bytes() == data
    assert (file.mode, file.uid, file.gid, file.mtime) == (0o4751, 5, 6, 2000.25)
    assert file.xattrs == (("security.capability", CAPABILITY), ("user.f", b"\xff\0"))
    assert file.links == ("d/f", "d/h")
    assert (tree["d/s"].content, tree["d/s"].uid, tree["d/s"].gid, tree["d/s"].mtime) == (
        "../../../etc/passwd",
        7,
        8,
        3000,
    )
    assert (tree["d/c"].kind, tree["d/c"].mode, tree["d/c"].device, tree["d/c"].gid) == (
        "c",
        0o622,
        os.makedev(5, 1),
        2,
    )
    assert (tree["d/b"].kind, tree["d/b"].device) == ("b", os.makedev(8, 17))
    assert (tree["d/p"].kind, tree["d/p"].mode, tree["d/p"].gid) == ("p", 0o2644, 9)
    assert unpacked.implied == {b""}
    assert unpacked.inodes == len({(seen.kind, seen.links) for seen in tree.values()})


def test_sizes_are_those_of_du(tmp_path: Path) -> None:
    entries: list[tuple[str, Node]] = [(f"d{n}/f{n}", File(bytes(n * 700))) for n in range(40)]
    unpacked = apply(
        tmp_path / "l", *entries, *((f"many/{n:0200}", File(b"")) for n in range(100)), ("many", Directory())
    )
    blocks = sum(os.lstat(tmp_path / "l" / path).st_blocks * 512 for path in tree_of(tmp_path / "l"))
    assert abs(unpacked.size - blocks) <= 0.02 * blocks
    assert unpacked.inodes == len(tree_of(tmp_path / "l"))


def test_whiteouts_and_opaque_directories_have_overlayfs_form(tmp_path: Path) -> None:
    unpacked = apply(
        tmp_path / "l",
        ("gone", Whiteout()),
        ("a/gone", Whiteout()),
        ("b", Directory()),
        ("b", Opaque()),
        ("c/d", Opaque()),
        (".wh..wh.aufs", File(b"")),
        (".wh..wh.plnk/x", File(b"data")),
        ("after", File(b"")),
    )
    found = {path: has(tmp_path / "l" / path) for path in tree_of(tmp_path / "l") if path != "."}
    assert found == {
        "gone": "whiteout",
        "a": "d",
        "a/gone": "whiteout",
        "b": "opaque",
        "c": "d",
        "c/d": "opaque",
        "after": "-",
    }
    assert unpacked.implied == {b"", b"a", b"c", b"c/d"}


@pytest.mark.parametrize(
    ("entries", "means"),
    [
        ([("x", Whiteout()), ("x", Directory())], "opaque"),
        ([("x", Whiteout()), ("x/y", File(b""))], "opaque"),
        ([("x", Directory()), ("x", Whiteout())], "opaque"),
        ([("x/y", File(b"")), ("x", Whiteout())], "opaque"),
        ([("x", Whiteout()), ("x", File(b""))], "-"),
        ([("x", Whiteout()), ("x", Symlink("y"))], "l"),
        ([("x", Whiteout()), ("x", Fifo())], "p"),
        ([("x", File(b"")), ("x", Whiteout())], "-"),
        ([("x", Whiteout()), ("x", Whiteout())], "whiteout"),
        ([("x", Device("c", 0, 0))], "whiteout"),
    ],
)
def test_a_whiteout_hides_the_layers_below_but_not_this_one(
    tmp_path: Path, entries: list[tuple[str, Node]], means: str
) -> None:
    unpacked = apply(tmp_path / "l", *entries)
    assert has(tmp_path / "l/x") == means
    assert b"x" not in unpacked.implied


KINDS: dict[str, Node] = {
    "d": Directory(mode=0o711),
    "-": File(b"new"),
    "l": Symlink("nowhere"),
    "p": Fifo(),
    "c": Device("c", 1, 3),
}


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", [*KINDS, "full"])
def test_the_last_entry_of_a_name_wins(tmp_path: Path, first: str, second: str) -> None:
    before = [("x", Directory()), ("x/y/z", File(b"old"))] if first == "full" else [("x", KINDS[first])]
    apply(tmp_path / "l", ("keep", File(b"")), *before, ("x", KINDS[second]), ("last", File(b"")))
    assert has(tmp_path / "l/x") == second
    assert (tmp_path / "l/x/y/z").exists() == (first == "full" and second == "d")
    assert sorted(os.listdir(tmp_path / "l")) == ["keep", "last", "x"]


def test_a_hard_link_takes_the_place_of_another_file(tmp_path: Path) -> None:
    apply(
        tmp_path / "l",
        ("a", File(b"a")),
        ("b", File(b"b")),
        ("b", Hardlink("a")),
        ("a", Hardlink("a")),
        ("s", Symlink("a")),
        ("t", Hardlink("s")),
    )
    tree = tree_of(tmp_path / "l")
    assert (tree["a"].links, tree["t"].kind, tree["t"].links) == (("a", "b"), "l", ("s", "t"))


def test_a_relative_link_to_a_directory_inside_is_followed(tmp_path: Path) -> None:
    unpacked = apply(
        tmp_path / "l",
        ("usr/lib", Directory()),
        ("lib", Symlink("usr/lib")),
        ("opt/deep/alias", Symlink("../../lib")),
        ("lib/one", File(b"1")),
        ("opt/deep/alias/two", File(b"2")),
        ("lib/sub/gone", Whiteout()),
        ("lib/sub/gone/new", File(b"3")),
        ("three", Hardlink("lib/one")),
        ("lib/one", File(b"again")),
    )
    tree = tree_of(tmp_path / "l")
    assert {path for path in tree if path.startswith("usr/lib/")} == {
        "usr/lib/one", "usr/lib/two", "usr/lib/sub", "usr/lib/sub/gone", "usr/lib/sub/gone/new"
    }  # fmt: skip
    assert has(tmp_path / "l/usr/lib/sub/gone") == "opaque"
    assert (tmp_path / "l/three").read_bytes() == b"1"
    assert (tmp_path / "l/usr/lib/one").read_bytes() == b"again"
    assert unpacked.implied == {b"", b"usr", b"opt", b"opt/deep", b"usr/lib/sub"}


def test_more_directories_than_are_kept_open(tmp_path: Path) -> None:
    count = 2 * OPEN_DIRECTORIES
    entries: list[tuple[str, Node]] = [(f"{n % 7}/{n}/x", File(str(n).encode())) for n in range(count)]
    entries += [(f"{n % 7}/{n}/y", Hardlink(f"{(count - 1 - n) % 7}/{count - 1 - n}/x")) for n in range(count)]
    before = len(os.listdir("/proc/self/fd"))
    apply(tmp_path / "l", *entries, ("/".join("deep") + "/" + "/".join(map(str, range(200))) + "/f", File(b"bottom")))
    assert len(os.listdir("/proc/self/fd")) == before
    for number in range(count):
        assert (tmp_path / f"l/{number % 7}/{number}/y").read_bytes() == str(count - 1 - number).encode()


def test_times_of_directories_are_set_last(tmp_path: Path) -> None:
    apply(
        tmp_path / "l",
        ("./", Directory(mtime=50)),
        ("d", Directory(mtime=100)),
        ("d/e", Directory(mtime=200)),
        ("d/e/f", File(b"")),
        ("was", Directory(mtime=300)),
        ("was", Symlink("d", mtime=400)),
        ("d/g", File(b"")),
    )
    assert [os.lstat(tmp_path / "l" / path).st_mtime for path in (".", "d", "d/e", "was")] == [50, 100, 200, 400]


@pytest.mark.parametrize("mask", [0o022, 0])
def test_nothing_is_inherited_from_a_setgid_directory(tmp_path: Path, mask: int) -> None:
    """Neither its bit nor its group: not from one of the archive's, nor from the one that the layer is put in."""
    above = tmp_path / "above"
    above.mkdir()
    os.chown(above, 0, 50)
    above.chmod(0o2755)
    with umask(mask):
        apply(
            above / "l",
            ("top", File(b"", mode=0o644)),
            ("d", Directory(mode=0o2775, gid=50, mtime=100)),
            ("d/inner", Directory(mode=0o755)),
            ("d/inner/file", File(b"", mode=0o600)),
            ("d/file", File(b"", mode=0o644)),
            ("d/link", Symlink("file")),
            ("d/own", Directory(mode=0o2711, gid=7)),
        )
    found = {path: (node.mode, node.gid) for path, node in tree_of(above / "l").items() if node.kind != "l"}
    assert found == {
        ".": (0o755, 0) if mask else (0o777, 0),
        "top": (0o644, 0),
        "d": (0o2775, 50),
        "d/inner": (0o755, 0),
        "d/inner/file": (0o600, 0),
        "d/file": (0o644, 0),
        "d/own": (0o2711, 7),
    }
    assert os.lstat(above / "l/d/link").st_gid == 0 and os.lstat(above / "l/d").st_mtime == 100


def test_a_directory_that_is_listed_again_is_as_it_is_listed_last(tmp_path: Path) -> None:
    apply(
        tmp_path / "l",
        ("closed", Directory(mode=0o700, uid=1, gid=2)),
        ("closed", Directory(mode=0o755)),
        ("special", Directory(mode=0o2775, gid=3)),
        ("special", Directory(mode=0o755)),
        ("implied/x", File(b"")),
        ("implied", Directory(mode=0o700)),
        ("other", Directory(mode=0o2777)),
        ("other", File(b"")),
        ("other", Directory(mode=0o711)),
    )
    tree = tree_of(tmp_path / "l")
    found = {
        path: (tree[path].mode, tree[path].uid, tree[path].gid) for path in ("closed", "special", "implied", "other")
    }
    assert found == {
        "closed": (0o755, 0, 0),
        "special": (0o755, 0, 0),
        "implied": (0o700, 0, 0),
        "other": (0o711, 0, 0),
    }


def test_the_roots_own_entry(tmp_path: Path) -> None:
    unpacked = apply(tmp_path / "l", ("./", Directory(mode=0o750, uid=1, gid=2, xattrs={"user.r": b"1"})))
    seen = tree_of(tmp_path / "l")["."]
    assert (seen.mode, seen.uid, seen.gid, seen.xattrs) == (0o750, 1, 2, (("user.r", b"1"),))
    assert unpacked.implied == frozenset()


def test_attributes_that_a_file_cannot_have_are_left_out_if_they_are_the_users(tmp_path: Path) -> None:
    apply(tmp_path / "l", ("s", Symlink("x", xattrs={"user.a": b"1"})), ("p", Fifo(xattrs={"user.a": b"1"})))
    with pytest.raises(LayerError, match=r"unpack 's'"):
        apply(tmp_path / "m", ("s", File(b"", xattrs={"security.capability": b"no capability"})))


def test_implied_directories_look_as_they_do_below(tmp_path: Path) -> None:
    apply(
        tmp_path / "1",
        ("./", Directory(mode=0o751)),
        ("tmp", Directory(mode=0o1777, uid=1, gid=2, mtime=99, xattrs={"user.t": b"1"})),
        ("tmp/in", Directory(mode=0o700)),
        ("hidden", Directory(mode=0o700)),
        ("hidden/in", Directory(mode=0o700)),
        ("opaque/in", Directory(mode=0o700)),
        ("link", Symlink("tmp")),
    )
    apply(tmp_path / "2", ("hidden", Whiteout()), ("opaque", Directory(mode=0o711)), ("opaque", Opaque()))
    third = apply(
        tmp_path / "3",
        *(
            (f"{name}/new", File(b""))
            for name in ("tmp", "tmp/in", "hidden", "hidden/in", "opaque", "opaque/in", "link", "new")
        ),
    )
    inherit(tmp_path / "3", third.implied, [tmp_path / "2", tmp_path / "1"])
    tree = tree_of(tmp_path / "3")
    assert (tree["tmp"].mode, tree["tmp"].uid, tree["tmp"].gid, tree["tmp"].mtime) == (0o1777, 1, 2, 99)
    assert tree["tmp"].xattrs == (("user.t", b"1"),)
    modes = {
        name: tree[name].mode for name in (".", "tmp/in", "hidden", "hidden/in", "opaque", "opaque/in", "link", "new")
    }
    assert modes == {
        ".": 0o755, "tmp/in": 0o700, "hidden": 0o755, "hidden/in": 0o755, "opaque": 0o711, "opaque/in": 0o755,
        "link": 0o755, "new": 0o755,
    }  # fmt: skip


def test_the_root_looks_as_it_does_below(tmp_path: Path) -> None:
    apply(tmp_path / "1", ("./", Directory(mode=0o751)))
    second = apply(tmp_path / "2", ("f", File(b"")))
    inherit(tmp_path / "2", second.implied, [tmp_path / "1"])
    assert stat.S_IMODE(os.stat(tmp_path / "2").st_mode) == 0o751


def test_what_follows_the_archive_is_read_and_ignored(tmp_path: Path) -> None:
    (tmp_path / "l").mkdir()
    read = chunks(tar_of({"a": "1"}) + b"rubbish" * 1000 + tar_of({"b": "1"}))
    unpack(read, tmp_path / "l")
    assert (read(), os.listdir(tmp_path / "l")) == (b"", ["a"])


@pytest.mark.parametrize("size", [1, 511, 512, 513, 100_000])
def test_chunks_of_any_size(tmp_path: Path, size: int) -> None:
    (tmp_path / "l").mkdir()
    tree = {f"d/{n}": File(bytes([n]) * n * 300) for n in range(8)} | {"x" * 200: File(b"long name")}
    unpack(chunks(tar_of(tree), size), tmp_path / "l")
    assert all((tmp_path / "l" / path).read_bytes() == file.data for path, file in tree.items())


def test_the_number_of_entries_and_their_bytes_are_bounded(tmp_path: Path) -> None:
    archive = tar_of([(str(n), File(data=b"x" * 10)) for n in range(4)])
    for name, limits, words in (
        ("l1", Limits(entries=3), "more than 3 entries"),
        ("l2", Limits(size=39), "more than 39 bytes"),
    ):
        (tmp_path / name).mkdir()
        with pytest.raises(LayerError, match=words):
            unpack(chunks(archive), tmp_path / name, limits)


@pytest.mark.parametrize("options", ["gnu", "0.0", "0.1", "1.0"])
@pytest.mark.parametrize("pieces", [2, 60])
def test_sparse_files_have_their_holes(tmp_path: Path, options: str, pieces: int) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        for number in range(pieces):
            file.seek(number * (1 << 20) + 8192)
            file.write(b"%d" % number * 3000)
        file.truncate(4 << 30)
    how = ["--format=gnu"] if options == "gnu" else ["--format=posix", f"--sparse-version={options}"]
    (tmp_path / "after").write_text("after")
    subprocess.run(["tar", "-C", tmp_path, "-cSf", tmp_path / "a.tar", *how, "source", "after"], check=True, timeout=60)
    layer = tmp_path / "layer"
    layer.mkdir()
    unpacked = unpack(chunks((tmp_path / "a.tar").read_bytes()), layer)
    result = layer / "source"
    assert result.stat().st_size == 4 << 30
    assert result.stat().st_blocks * 512 <= unpacked.size < 2 << 20
    with result.open("rb") as file:
        for number in range(pieces):
            file.seek(number * (1 << 20) + 8192)
            expected = b"%d" % number * 3000
            assert file.read(len(expected) + 1) == expected + b"\0"
    assert (layer / "after").read_text() == "after"
    with pytest.raises(LayerError, match="more than 1000000 bytes"):
        unpack(chunks((tmp_path / "a.tar").read_bytes()), layer, Limits(size=1_000_000))
