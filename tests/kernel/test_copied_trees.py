"""Copies between trees, one of which may be hostile: what arrives, who owns it, and that nothing outside is read or written."""

from __future__ import annotations

import ctypes
import io
import os
import socket
import stat
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tare.cli import tars, trees
from tare.cli.copying import split
from tare.errors import FailedPrecondition, InvalidArgument, NotFound, TareError

pytestmark = pytest.mark.root

libc = ctypes.CDLL(None)
AT_FDCWD, RENAME_EXCHANGE = -100, 2
MAPPED = trees.Owners(((0, 100_000, 1000),), ((0, 200_000, 1000),))


class Two:
    """A machine's tree and a container's, with a file outside of both."""

    def __init__(self, base: Path) -> None:
        self.here, self.there, self.secret = base / "here", base / "there", base / "secret"
        for path in (self.here, self.there):
            path.mkdir()
        self.secret.write_text("secret")
        self.warnings: list[str] = []
        self.roots = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in (self.here, self.there)}

    def place(self, base: Path, path: str, owners: trees.Owners = MAPPED) -> trees.Place:
        if base == self.here:
            owners = trees.Owners()
        return trees.Place(root=self.roots[base], path=path, said=path, owners=owners)

    def copy_in(self, path: str, to: str, *, keep: bool = False, follow: bool = False) -> None:
        source, target = self.place(self.here, path), self.place(self.there, to)
        trees.copy(source, target, follow=follow, keep_owners=keep, warn=self.warnings.append)

    def copy_out(self, path: str, to: str, *, keep: bool = False, follow: bool = False) -> None:
        source, target = self.place(self.there, path), self.place(self.here, to)
        trees.copy(source, target, follow=follow, keep_owners=keep, warn=self.warnings.append)

    def unpack(self, stream: io.BytesIO, to: str, *, keep: bool = False) -> None:
        tars.unpack(stream, self.place(self.there, to), keep_owners=keep, warn=self.warnings.append)

    def close(self) -> None:
        for fd in self.roots.values():
            os.close(fd)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Two]:
    made = Two(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    yield made
    assert len(os.listdir("/proc/self/fd")) == before
    made.close()


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("box:/etc", ("box", "/etc")),
        ("box:", ("box", "")),
        ("/a:b", ("", "/a:b")),
        ("./a:b", ("", "./a:b")),
        (":b", ("", ":b")),
        ("-", ("", "-")),
        ("plain", ("", "plain")),
    ],
)
def test_which_side_a_word_means(word: str, meant: tuple[str, str]) -> None:
    assert split(word) == meant


def test_a_tree_goes_in_and_comes_out_as_it_was(two: Two) -> None:
    tree = two.here / "tree"
    (tree / "deep/er").mkdir(parents=True)
    (tree / "deep/er/file").write_bytes(os.urandom(3 << 20))
    (tree / "deep/link").symlink_to("/etc/passwd")
    (tree / "deep").chmod(0o750)
    os.utime(tree / "deep/er/file", ns=(5, 1_000_000_007))
    two.copy_in("/tree", "/")
    two.copy_out("/tree/deep", "/back")
    back = two.here / "back"
    assert (back / "er/file").read_bytes() == (tree / "deep/er/file").read_bytes()
    assert (back / "er/file").stat().st_mtime_ns == 1_000_000_007
    assert os.readlink(back / "link") == "/etc/passwd"
    assert stat.S_IMODE((two.there / "tree/deep").stat().st_mode) == 0o750
    assert not two.warnings


def test_a_directory_that_is_there_takes_it_under_its_name_or_as_contents(two: Two) -> None:
    (two.here / "tree").mkdir()
    (two.here / "tree/new").write_text("new")
    (two.there / "into/tree").mkdir(parents=True)
    (two.there / "into/tree/old").write_text("old")
    two.copy_in("/tree/", "/into/")
    assert sorted(os.listdir(two.there / "into/tree")) == ["new", "old"]
    two.copy_in("/tree/.", "/into")
    two.copy_in("/tree/../tree", "/made")
    assert sorted(os.listdir(two.there / "into")) == ["new", "tree"]
    assert os.listdir(two.there / "made") == ["new"]


def test_the_root_of_a_container_and_a_path_that_ends_in_dots(two: Two) -> None:
    (two.there / "a/b").mkdir(parents=True)
    two.copy_out("/", "/all")
    assert os.listdir(two.here / "all") == ["a"]
    (two.here / "into").mkdir()
    two.copy_out("/a/b/..", "/into")
    assert os.listdir(two.here / "into") == ["a"]


def test_owners_are_the_containers_root_or_kept(two: Two) -> None:
    (two.here / "file").write_text("x")
    os.chown(two.here / "file", 7, 8)
    two.copy_in("/file", "/plain")
    two.copy_in("/file", "/kept", keep=True)
    found = [(status.st_uid, status.st_gid) for status in map(os.stat, (two.there / "plain", two.there / "kept"))]
    assert found == [(100_000, 200_000), (100_007, 200_008)]
    two.copy_out("/kept", "/plain")
    two.copy_out("/kept", "/kept", keep=True)
    found = [(status.st_uid, status.st_gid) for status in map(os.stat, (two.here / "plain", two.here / "kept"))]
    assert found == [(0, 0), (7, 8)]
    os.chown(two.there / "kept", 5, 5)  # nobody's in the container
    two.copy_out("/kept", "/stranger", keep=True)
    assert (two.here / "stranger").stat().st_uid == 0


def test_a_set_id_bit_does_not_come_to_another_owner(two: Two) -> None:
    (two.there / "shell").write_text("x")
    os.chown(two.there / "shell", 100_007, 200_008)
    (two.there / "shell").chmod(0o6755)
    two.copy_out("/shell", "/plain")
    two.copy_out("/shell", "/kept", keep=True)
    assert stat.S_IMODE((two.here / "plain").stat().st_mode) == 0o755
    assert stat.S_IMODE((two.here / "kept").stat().st_mode) == 0o6755


def test_holes_stay_holes(two: Two) -> None:
    with (two.there / "sparse").open("wb") as file:
        file.seek(1 << 30)
        file.write(b"middle")
        file.truncate(1 << 40)
    two.copy_out("/sparse", "/copy")
    status = (two.here / "copy").stat()
    assert (status.st_size, status.st_blocks < 1000) == (1 << 40, True)
    with (two.here / "copy").open("rb") as file:
        file.seek(1 << 30)
        assert file.read(8) == b"middle\0\0"


def test_hard_links_are_files_of_their_own(two: Two) -> None:
    (two.there / "d").mkdir()
    (two.there / "d/one").write_text("same")
    os.link(two.there / "d/one", two.there / "d/two")
    two.copy_out("/d", "/d")
    assert [(two.here / "d" / name).read_text() for name in ("one", "two")] == ["same", "same"]


# Links and what is hostile


def test_links_of_a_container_lead_within_it(two: Two) -> None:
    (two.there / "secret").write_text("its own")
    for name, text in (("up", "../../../../secret"), ("whole", "/secret")):
        (two.there / name).symlink_to(text)
        two.copy_out(f"/{name}", f"/{name}", follow=True)
        assert (two.here / name).read_text() == "its own"
    two.copy_out("/up", "/as-link")
    assert os.readlink(two.here / "as-link") == "../../../../secret"


def test_a_target_that_is_a_link_is_written_where_it_leads_within_the_tree(two: Two) -> None:
    (two.here / "file").write_text("new")
    (two.there / "dir").mkdir()
    (two.there / "dir/real").write_text("old")
    (two.there / "link").symlink_to("/dir/real")
    (two.there / "out").symlink_to(f"../../..{two.secret}")
    two.copy_in("/file", "/link")
    assert ((two.there / "dir/real").read_text(), (two.there / "link").is_symlink()) == ("new", True)
    with pytest.raises(NotFound):
        two.copy_in("/file", "/out")
    (two.there / "loop").symlink_to("loop")
    with pytest.raises(FailedPrecondition, match="symbolic links"):
        two.copy_in("/file", "/loop")
    assert two.secret.read_text() == "secret"


def test_a_link_in_the_way_of_a_directory_is_an_error(two: Two) -> None:
    (two.here / "tree/sub").mkdir(parents=True)
    (two.here / "tree/sub/secret").write_text("overwritten")
    (two.there / "tree").mkdir()
    (two.there / "tree/sub").symlink_to(two.secret.parent)
    with pytest.raises(FailedPrecondition, match="Not a directory: sub"):
        two.copy_in("/tree", "/")
    assert two.secret.read_text() == "secret"


def test_what_is_neither_file_directory_nor_link_is_left_out_and_never_replaced(two: Two) -> None:
    (two.there / "d").mkdir()
    os.mkfifo(two.there / "d/pipe")
    os.mknod(two.there / "d/zero", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(two.there / "d/sock"))
    two.copy_out("/d", "/d")
    assert os.listdir(two.here / "d") == []
    assert sorted(text.split(" ")[0] for text in two.warnings) == ["/d/pipe", "/d/sock", "/d/zero"]
    with pytest.raises(InvalidArgument, match="neither a file"):
        two.copy_out("/d/zero", "/x")
    (two.here / "file").write_text("x")
    with pytest.raises(InvalidArgument, match="neither a file"):
        two.copy_in("/file", "/d/zero")
    assert stat.S_ISCHR((two.there / "d/zero").stat().st_mode)


def test_more_directories_than_can_be_held_are_an_error(two: Two) -> None:
    at = os.open(two.there, os.O_RDONLY)
    for _ in range(400):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    with pytest.raises(FailedPrecondition, match="within one another"):
        two.copy_out("/d", "/d")
    with pytest.raises(FailedPrecondition, match="within one another"):
        tars.pack(two.place(two.there, "/d"), io.BytesIO(), two.warnings.append)


@pytest.mark.parametrize(
    ("source", "target", "kind", "words"),
    [
        ("/none", "/x", NotFound, "no such file"),
        ("/file", "/none/x", NotFound, "does not exist"),
        ("/file", "/none/", NotFound, "no directory"),
        ("/dir", "/there", InvalidArgument, "cannot be copied onto it"),
        ("/file/", "/x", FailedPrecondition, "Not a directory"),
        ("/file", "/folder", FailedPrecondition, "Is a directory"),
    ],
)
def test_what_cannot_be_copied_says_why(two: Two, source: str, target: str, kind: type[TareError], words: str) -> None:
    (two.here / "file").write_text("x")
    (two.here / "dir").mkdir()
    (two.there / "there").write_text("y")
    (two.there / "folder/file").mkdir(parents=True)
    with pytest.raises(kind, match=words):
        two.copy_in(source, target)


class Swapper:
    """Swaps a directory with a link to the secret's, as fast as it can, until it is closed."""

    def __init__(self, victim: Path, link_to: Path) -> None:
        self.victim, self.link = os.fsencode(victim), os.fsencode(victim.with_name("link"))
        os.symlink(link_to, self.link)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.swap)
        self.thread.start()

    def swap(self) -> None:
        while not self.over.is_set():
            assert libc.renameat2(AT_FDCWD, self.victim, AT_FDCWD, self.link, RENAME_EXCHANGE) == 0

    def close(self) -> None:
        self.over.set()
        self.thread.join()


def often(work: Callable[[], None]) -> None:
    for _ in range(300):
        try:
            work()
        except TareError:
            continue


def test_a_race_of_links_neither_reads_nor_writes_outside(two: Two) -> None:
    (two.here / "tree/sub").mkdir(parents=True)
    (two.here / "tree/sub/secret").write_text("overwritten")
    (two.there / "tree/sub").mkdir(parents=True)
    (two.there / "tree/sub/secret").write_text("its own")
    swapper = Swapper(two.there / "tree/sub", two.secret.parent)
    try:
        often(lambda: two.copy_in("/tree/sub/secret", "/tree/sub/secret"))
        often(lambda: two.copy_in("/tree", "/"))
        often(lambda: two.copy_out("/tree", "/read"))
        often(lambda: two.copy_out("/tree/sub/secret", "/one", follow=True))
        often(lambda: two.unpack(tar_of("tree/sub/secret", b"overwritten"), "/"))
    finally:
        swapper.close()
    assert two.secret.read_text() == "secret"
    for path in (two.here / "read").rglob("secret"):
        assert path.read_text() != "secret"
    assert not (two.here / "one").exists() or (two.here / "one").read_text() != "secret"


# Tar streams


def tar_of(name: str, data: bytes, **fields: object) -> io.BytesIO:
    """A tar with one member."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in fields.items():
            setattr(info, field, value)
        archive.addfile(info, io.BytesIO(data))
    out.seek(0)
    return out


def test_a_tar_stream_comes_back(two: Two) -> None:
    tree = two.there / "..data"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep/file").write_bytes(os.urandom(1 << 20))
    os.chown(tree / "deep/file", 100_007, 200_008)
    (tree / "deep/file").chmod(0o4711)
    (tree / "link").symlink_to("deep/file")
    out = io.BytesIO()
    tars.pack(two.place(two.there, "/..data"), out, two.warnings.append)
    out.seek(0)
    (two.there / "again").mkdir()
    two.unpack(out, "/again", keep=True)
    back = two.there / "again/..data"
    assert (back / "deep/file").read_bytes() == (tree / "deep/file").read_bytes()
    status = (back / "deep/file").stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (100_007, 200_008, 0o4711)
    assert os.readlink(back / "link") == "deep/file"
    assert not two.warnings


def test_a_tar_makes_missing_directories_hard_links_and_replaces_files(two: Two) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo("a/b/file")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"new"))
        link = tarfile.TarInfo("a/hard")
        link.type, link.linkname = tarfile.LNKTYPE, "a/b/file"
        archive.addfile(link)
    (two.there / "a/b").mkdir(parents=True)
    (two.there / "a/b/file").symlink_to(two.secret)
    for _ in range(2):
        out.seek(0)
        two.unpack(out, "/")
    assert (two.there / "a/b/file").read_text() == "new"
    assert (two.there / "a/hard").stat().st_ino == (two.there / "a/b/file").stat().st_ino
    assert two.secret.read_text() == "secret"


@pytest.mark.parametrize("name", ["../secret", "/secret", "a/../../secret", ".."])
def test_a_member_that_leads_outside_is_refused(two: Two, name: str) -> None:
    with pytest.raises(InvalidArgument, match="leads outside"):
        two.unpack(tar_of(name, b"x"), "/")
    with pytest.raises(InvalidArgument, match="leads outside"):
        link = tar_of("link", b"", type=tarfile.LNKTYPE, linkname=name)
        two.unpack(link, "/")
    assert two.secret.read_text() == "secret"


@pytest.mark.parametrize("data", [b"", b"no tar" * 200, b"\x1f\x8b\x08\0garbage" + b"x" * 600])
def test_what_is_no_tar_is_refused(two: Two, data: bytes) -> None:
    with pytest.raises(InvalidArgument):
        two.unpack(io.BytesIO(data), "/")


def test_a_file_that_shrinks_while_it_is_packed_does_not_break_the_stream(two: Two) -> None:
    path = two.there / "shrinks"
    path.write_bytes(b"x" * (1 << 20))

    class Sink(io.BytesIO):
        def write(self, data: object) -> int:
            os.truncate(path, 1000)
            return super().write(data)  # type: ignore[arg-type] # bytes

    out = Sink()
    (two.there / "d").mkdir()
    path.rename(two.there / "d/shrinks")
    path = two.there / "d/shrinks"
    tars.pack(two.place(two.there, "/d"), out, two.warnings.append)
    with tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive:
        assert archive.getmember("d/shrinks").size == 1 << 20
