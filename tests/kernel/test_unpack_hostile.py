"""Archives made to do harm: nothing outside the layer changes, whatever they say, and nothing of a refused layer stays."""

from __future__ import annotations

import io
import os
import shutil
import stat
import tarfile
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tare.images.layer import LayerError
from tare.images.layers import unpack_blob
from tare.images.unpack import unpack
from tare.storage.content import Reader
from tests.support.images import Blob
from tests.support.trees import Seen, tree_of

pytestmark = pytest.mark.root

Member = tuple[str, str, str]  # name, kind, link


class Stage:
    """A layer's root beside things that must not change."""

    def __init__(self, directory: Path) -> None:
        self.layer = directory / "layers" / "one"
        self.outside = directory / "outside"
        self.outside.mkdir(parents=True)
        (self.outside / "secret").write_text("kept")
        (self.outside / "dir").mkdir()
        self.layer.parent.mkdir()
        (self.layer.parent / "other").mkdir()
        (self.layer.parent / "other" / "file").write_text("kept")
        self._directory = directory

    def surroundings(self) -> dict[str, Seen]:
        """All but the layer itself, without the time at which its name came and went."""
        tree = tree_of(self._directory)
        return {path: seen for path, seen in tree.items() if not path.startswith("layers/one") and path != "layers"}


def archive_of(members: list[Member]) -> bytes:
    kinds = {
        "file": tarfile.REGTYPE, "dir": tarfile.DIRTYPE, "sym": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE,
        "fifo": tarfile.FIFOTYPE, "dev": tarfile.CHRTYPE,
    }  # fmt: skip
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind, link in members:
            info = tarfile.TarInfo(name)
            info.name, info.type, info.linkname, info.mode = name, kinds[kind], link, 0o777
            info.uid = info.gid = 4242
            info.size = 4 if kind == "file" else 0
            archive.addfile(info, io.BytesIO(b"evil"))
    return buffer.getvalue()


def attempt(stage: Stage, members: list[Member]) -> str:
    """Unpack as a pull does; what the refusal says, "" if there was none."""
    archive = archive_of(members)
    with tempfile.TemporaryFile() as source:
        source.write(archive)
        source.flush()
        reader = Reader(os.dup(source.fileno()), len(archive))
    try:
        unpack_blob(reader, Blob(archive).digest, stage.layer)
    except LayerError as error:
        assert not stage.layer.exists()
        return str(error)
    finally:
        reader.close()
    return ""


REFUSED: dict[str, tuple[list[Member], str]] = {
    "name with dots": ([("../outside/secret", "file", "")], "leads out"),
    "name with dots inside": ([("a/../../../outside/secret", "file", "")], "leads out"),
    "absolute link, file beneath": ([("x", "sym", "OUTSIDE"), ("x/secret", "file", "")], "outside the layer"),
    "absolute link, directory beneath": ([("x", "sym", "OUTSIDE"), ("x/new", "dir", "")], "outside the layer"),
    "absolute link, link beneath": ([("x", "sym", "OUTSIDE"), ("x/new", "sym", "y")], "outside the layer"),
    "absolute link, whiteout beneath": ([("x", "sym", "OUTSIDE"), ("x/.wh.secret", "file", "")], "outside the layer"),
    "absolute link, opaque beneath": ([("x", "sym", "OUTSIDE"), ("x/.wh..wh..opq", "file", "")], "outside the layer"),
    "relative link out, file beneath": ([("x", "sym", "../../outside"), ("x/secret", "file", "")], "out of the layer"),
    "relative link out by a detour": ([("a/b", "dir", ""), ("a/b/x", "sym", "../../../../outside"), ("a/b/x/y", "file", "")], "out of the layer"),
    "link to a link out": ([("x", "sym", "../.."), ("y", "sym", "x"), ("y/outside/secret", "file", "")], "out of the layer"),
    "link to itself": ([("x", "sym", "x"), ("x/y", "file", "")], "too many"),
    "links in a ring": ([("x", "sym", "y"), ("y", "sym", "x"), ("x/z", "file", "")], "too many"),
    "links that grow": ([("x", "sym", "y/x/x"), ("y", "sym", "."), ("x/z", "file", "")], "links"),
    "hard link to outside by dots": ([("h", "hard", "../../outside/secret")], "leads out"),
    "hard link to outside by name": ([("h", "hard", "/outside/secret")], "hard link"),
    "hard link through a link": ([("x", "sym", "OUTSIDE"), ("h", "hard", "x/secret")], "outside the layer"),
    "hard link to a directory": ([("d", "dir", ""), ("h", "hard", "d")], "hard link"),
    "hard link to nothing": ([("h", "hard", "nothing")], "hard link"),
    "hard link to a whiteout": ([(".wh.x", "file", ""), ("h", "hard", "x")], "removes"),
    "hard link to what it replaces": ([("d", "dir", ""), ("d/f", "file", ""), ("d", "hard", "d/f")], "hard link"),
    "file below a file": ([("f", "file", ""), ("f/g", "file", "")], "no directory"),
    "file below a device": ([("f", "dev", ""), (".wh.f", "file", ""), ("g", "fifo", ""), ("g/x", "file", "")], "no directory"),
    "root as a file": ([(".", "file", "")], "not a directory"),
    "root as a link": ([("/", "sym", "OUTSIDE")], "not a directory"),
    "everything hidden": ([(".wh..wh..opq", "file", "")], "hides all"),
    "long name": ([("n" * 300, "file", "")], "255"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    members, word = REFUSED[name]
    stage = Stage(tmp_path)
    before = stage.surroundings()
    said = attempt(stage, [(path, kind, link.replace("OUTSIDE", str(stage.outside))) for path, kind, link in members])
    assert word in said
    assert stage.surroundings() == before


def test_what_only_looks_hostile_lands_inside(tmp_path: Path) -> None:
    stage = Stage(tmp_path)
    before = stage.surroundings()
    members = [
        ("/etc/passwd", "file", ""),
        ("a/../b", "file", ""),
        ("x", "sym", str(stage.outside)),
        ("y", "hard", "x"),
        ("x", "dir", ""),
        ("x/secret", "file", ""),
        ("z", "sym", "../../outside/secret"),
        ("z", "file", ""),
    ]
    assert attempt(stage, members) == ""
    assert (stage.layer / "x/secret").read_bytes() == b"evil"
    assert os.readlink(stage.layer / "y") == str(stage.outside)
    assert (stage.layer / "z").read_bytes() == b"evil"
    assert sorted(os.listdir(stage.layer)) == ["b", "etc", "x", "y", "z"]
    assert stage.surroundings() == before


names = st.sampled_from(
    ["a", "b", "a/b", "b/a", "a/a/a", "../x", "/a", ".wh.a", "a/.wh.b", "a/.wh..wh..opq", "b/c/../a", "."]
)
links = st.sampled_from(
    ["a", "b", "..", "../..", "../../outside", "/", "/etc", "a/b", "b/a", ".", "../outside/secret", "OUTSIDE"]
)
member = st.tuples(names, st.sampled_from(["file", "dir", "sym", "hard", "fifo", "dev"]), links)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(member, min_size=1, max_size=8))
def test_no_combination_reaches_outside(members: list[Member]) -> None:
    directory = Path(tempfile.mkdtemp(prefix="tare-hostile-"))
    try:
        stage = Stage(directory)
        before = stage.surroundings()
        descriptors = len(os.listdir("/proc/self/fd"))
        attempt(stage, [(path, kind, link.replace("OUTSIDE", str(stage.outside))) for path, kind, link in members])
        assert stage.surroundings() == before
        assert len(os.listdir("/proc/self/fd")) == descriptors
    finally:
        shutil.rmtree(directory)


@settings(max_examples=100, deadline=None)
@given(st.lists(member, min_size=1, max_size=4), st.data())
def test_a_damaged_archive_is_refused_or_unpacked(members: list[Member], data: st.DataObject) -> None:
    archive = bytearray(archive_of(members))
    for _ in range(data.draw(st.integers(0, 3))):
        archive[data.draw(st.integers(0, len(archive) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(archive)))
    pieces = iter([bytes(archive[:cut])])
    with tempfile.TemporaryDirectory(prefix="tare-hostile-") as directory:
        try:
            unpack(lambda: next(pieces, b""), Path(directory))
        except LayerError:
            return


def test_directories_that_give_way_cost_what_they_hold() -> None:
    """Each of many directories is listed again as a file; to look at all of the others each time takes ten times as long."""
    names = [f"d{number}" for number in range(10_000)]
    archive = archive_of([(name, "dir", "") for name in names] + [(name, "fifo", "") for name in names])
    with tempfile.TemporaryDirectory(
        dir="/dev/shm"
    ) as directory:  # memory, so that it is not the disk that is measured
        began = time.process_time()
        unpack(io.BytesIO(archive).read1, Path(directory))
        assert time.process_time() - began < 4
        assert all(stat.S_ISFIFO(entry.stat().st_mode) for entry in os.scandir(directory))


def test_what_was_in_a_directory_that_gave_way_is_forgotten(tmp_path: Path) -> None:
    """Its whiteouts, and that directories in it were only implied; a link in it is not followed."""
    (tmp_path / "outside" / "kept").mkdir(parents=True)
    (tmp_path / "layer").mkdir()
    members = [
        ("a/b/.wh.c", "file", ""),
        ("a/b/implied/x", "file", ""),
        ("a/l", "sym", "../../outside"),
        ("a/d/", "dir", ""),
        ("a", "file", ""),
        ("a", "dir", ""),
        ("a/b/c/x", "file", ""),
    ]
    done = unpack(io.BytesIO(archive_of(members)).read1, tmp_path / "layer")
    assert done.implied == {b"", b"a/b", b"a/b/c"}
    assert sorted(path.name for path in (tmp_path / "layer").rglob("*")) == ["a", "b", "c", "x"]
    assert (tmp_path / "outside" / "kept").exists()
