"""SELinux labels of what a pod mounts: given to a tree and to nothing that its links lead to. The labels are kept where SELinux is off too."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tare.launch import checks
from tare.runtime import podfiles
from tests.support.launch import Launch, in_launch

pytestmark = pytest.mark.root
LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


def label(path: Path) -> str:
    """The label of a path itself; "" where it has none."""
    try:
        return os.getxattr(path, checks.SELINUX, follow_symlinks=False).decode()
    except OSError as error:
        assert error.errno == errno.ENODATA
        return ""


def test_a_tree_is_labelled_and_nothing_outside_of_it(tmp_path: Path) -> None:
    outside, tree = tmp_path / "outside", tmp_path / "tree"
    (outside / "deep").mkdir(parents=True)
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "file").touch()
    (tree / "a" / "away").symlink_to(outside)
    (tree / "a" / "nowhere").symlink_to("/no/such")
    os.mkfifo(tree / "a" / "b" / "fifo")
    (tmp_path / "link").symlink_to(tree)
    single = tmp_path / "single"
    single.touch()

    async def body(launch: Launch) -> None:
        wanted = [tmp_path / "link", single, tmp_path / "absent"]
        found = await launch.handler.relabel([(str(path), LABEL) for path in wanted])
        assert [(item.path, item.directory, item.errno) for item in found] == [
            (str(wanted[0]), True, 0),
            (str(single), False, 0),
            (str(wanted[2]), False, errno.ENOENT),
        ]
        assert {label(path) for path in (tree, single, *tree.rglob("*"))} == {LABEL}
        assert {label(path) for path in (tmp_path / "link", outside, outside / "deep")} == {""}
        assert await launch.handler.relabel([]) == []

    in_launch(tmp_path, body)


def test_file_systems_without_labels_are_fine(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        (found,) = await launch.handler.relabel([("/proc/sys/kernel/pty", LABEL)])
        assert (found.directory, found.errno) == (True, 0)

    in_launch(tmp_path, body)


def test_a_pods_files_have_their_owner_and_label(tmp_path: Path) -> None:
    podfiles.write(tmp_path, {"hosts": b"x\n"}, podfiles.Owner(uid=5, gid=6, label=LABEL))
    status = (tmp_path / "hosts").stat()
    assert (status.st_uid, status.st_gid, status.st_mode & 0o777, label(tmp_path / "hosts")) == (5, 6, 0o644, LABEL)
    podfiles.write(tmp_path, {"hosts": b"y\n", "hostname": b"z\n"}, podfiles.Owner())
    assert ((tmp_path / "hosts").stat().st_uid, label(tmp_path / "hostname")) == (0, "")
