"""Lookups in stacked layers agree with overlayfs itself, for random layers with whiteouts, opaque directories and links."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tare.launch import linux
from tare.storage.union import Kind, kind, read

pytestmark = pytest.mark.root

NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
TARGETS = st.lists(st.sampled_from(["a", "b", "c", "..", "."]), min_size=1, max_size=3).map("/".join)
LINKS = st.tuples(st.booleans(), TARGETS).map(lambda pair: ("link", ("/" if pair[0] else "") + pair[1]))
THINGS = st.one_of(
    st.just(("directory", "")), st.just(("opaque", "")), st.just(("whiteout", "")), st.text("xyz", max_size=3).map(lambda t: ("file", t)), LINKS
)  # fmt: skip
LAYERS = st.lists(st.lists(st.tuples(PATHS, THINGS), max_size=6), min_size=2, max_size=4)
LOOKUPS = st.lists(
    st.lists(st.sampled_from(["a", "b", "c", ".."]), min_size=1, max_size=4).map("/".join), min_size=1, max_size=8
)


def build(top: Path, things: list[tuple[str, tuple[str, str]]]) -> None:
    """A layer with these things in it, as far as they fit together."""
    top.mkdir()
    for path, (what, text) in things:
        place = top / path
        with contextlib.suppress(FileExistsError, NotADirectoryError, FileNotFoundError, OSError):
            if not real_directories(top, place):
                continue
            if what in ("directory", "opaque"):
                place.mkdir()
                if what == "opaque":
                    os.setxattr(place, "trusted.overlay.opaque", b"y")
            elif what == "whiteout":
                os.mknod(place, 0o600 | stat.S_IFCHR, os.makedev(0, 0))
            elif what == "link":
                place.symlink_to(text)
            else:
                place.write_text(text)


def real_directories(top: Path, place: Path) -> bool:
    """Make the parents, unless a link is among them: that would lead out of the layer."""
    here = top
    for name in place.relative_to(top).parts[:-1]:
        here = here / name
        if here.is_symlink():
            return False
        here.mkdir(exist_ok=True)
    return not place.is_symlink()


@contextlib.contextmanager
def mounted(layers: list[Path]) -> Iterator[int]:
    """The root of an overlay of these layers, topmost first, that nobody else sees."""
    context = linux.fsopen(b"overlay")
    try:
        linux.fsconfig(context, linux.FSCONFIG_SET_STRING, b"lowerdir", b":".join(bytes(path) for path in layers))
        linux.fsconfig(context, linux.FSCONFIG_CMD_CREATE)
        root = linux.fsmount(context)
    finally:
        os.close(context)
    try:
        yield root
    finally:
        os.close(root)


def ask_kernel(root: int, path: str) -> tuple[Kind | None, bytes | None]:
    """What overlayfs has at a path, links kept within the root."""
    flags = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
    try:
        fd = linux.openat2(root, path.encode(), os.O_PATH, flags)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return None, None
        raise
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            return Kind.DIRECTORY, None
        return Kind.FILE, Path(f"/proc/self/fd/{fd}").read_bytes()
    finally:
        os.close(fd)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LAYERS, LOOKUPS)
def test_lookups_agree_with_overlayfs(layers: list[list[tuple[str, tuple[str, str]]]], lookups: list[str]) -> None:
    top = Path(tempfile.mkdtemp())
    try:
        paths = [top / str(number) for number in range(len(layers))]
        for path, things in zip(paths, layers, strict=True):
            build(path, things)
        with mounted(paths) as root:
            for lookup in lookups:
                check(paths, root, lookup)
    finally:
        shutil.rmtree(top)


def check(layers: list[Path], root: int, lookup: str) -> None:
    """The same answer, or the same error."""
    try:
        expected = ask_kernel(root, lookup)
    except OSError as error:
        assert error.errno == errno.ELOOP
        with pytest.raises(OSError, match="Too many levels"):
            kind(layers, lookup)
        return
    assert (kind(layers, lookup), read(layers, lookup, 100)) == expected
