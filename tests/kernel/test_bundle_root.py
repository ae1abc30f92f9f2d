"""A directory of the node as a container's root: where it may lie, and how its mounts relate to the node's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tare.errors import InvalidArgument
from tare.handlers.builtin import StartFailed
from tare.launch import linux
from tests.support.launch import Box, Launch, in_launch, layer, line, until
from tests.support.mounts import MountLine, mount_table, mounted_tmpfs, mounts_below

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]


def table(box: Box) -> dict[str, MountLine]:
    """A container's mounts."""
    return mount_table(Path(f"/proc/{box.process.pid}/mountinfo").read_text())


def mount(point: Path) -> None:
    """A tmpfs on the node."""
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "late", point], check=True)


def test_a_directory_as_it_is_with_what_is_mounted_below(tmp_path: Path) -> None:
    root = layer(tmp_path / "bundle/rootfs")
    with mounted_tmpfs(root / "data"):

        async def body(launch: Launch) -> None:
            (root / "data/there").write_text("yes")
            result = await launch.run(["sh", "-c", "cat /data/there; echo new >/made"], bundle=root)
            assert result.out == "yes" and (root / "made").read_text() == "new\n"
            assert mounts_below(tmp_path) == [str(root / "data")]

        in_launch(tmp_path, body)


def test_a_read_only_directory(tmp_path: Path) -> None:
    root = layer(tmp_path / "rootfs")

    async def body(launch: Launch) -> None:
        result = await launch.run(["sh", "-c", "echo new >/made"], bundle=root, root={"readonly": True})
        assert "Read-only file system" in result.err and not (root / "made").exists()
        (root / "still").write_text("writable here")

    in_launch(tmp_path, body)


@pytest.mark.parametrize("node", [linux.MS_PRIVATE, linux.MS_SHARED])
@pytest.mark.parametrize("wanted", ["", "private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable"])
def test_propagation(tmp_path: Path, node: int, wanted: str) -> None:
    """Mounts of the node come in with slave, and without a word; what is mounted inside never goes out; "shared" is a group of its own."""
    with mounted_tmpfs(tmp_path / "disk", node):
        root = layer(tmp_path / "disk/rootfs")
        (root / "in").mkdir()

        async def body(launch: Launch) -> None:
            propagation = {"rootfsPropagation": wanted} if wanted else {}
            box = await launch.start(SLEEP, bundle=root, linux=propagation)
            words = table(box)["/"].propagation
            follows = wanted in ("", "slave", "rslave") and node == linux.MS_SHARED
            assert any(word.startswith("master:") for word in words) == follows
            assert any(word.startswith("shared:") for word in words) == (wanted in ("shared", "rshared"))
            assert ("unbindable" in words) == (wanted == "unbindable")
            shared = any(word.startswith("shared:") for word in table(box)["/proc"].propagation)
            assert shared == (wanted == "rshared")
            mount(root / "in")
            try:
                assert ("/in" in table(box)) == follows
                (root / "in/fresh").touch()
                script = ["mount", "-t", "tmpfs", "inner", "/tmp"]
                caps = {kind: ["CAP_SYS_ADMIN"] for kind in ("bounding", "effective", "permitted")}
                assert (await launch.exec(box, script, capabilities=caps)).code == 0
                assert "/tmp" in table(box) and str(root / "tmp") not in mounts_below(tmp_path)
            finally:
                subprocess.run(["umount", root / "in"], check=True)

        in_launch(tmp_path, body)


def test_an_unbindable_root_cannot_be_bound(tmp_path: Path) -> None:
    root = layer(tmp_path / "rootfs")

    async def body(launch: Launch) -> None:
        caps = {kind: ["CAP_SYS_ADMIN"] for kind in ("bounding", "effective", "permitted")}
        box = await launch.start(
            ["sh", "-c", "mount -o bind /etc /tmp && echo bound; echo done; sleep 1000"],
            bundle=root,
            capabilities=caps,
            linux={"rootfsPropagation": "unbindable"},
        )
        assert await line(box) == "done"

    in_launch(tmp_path, body)


def test_the_root_of_another_mount_namespaces_file_system(tmp_path: Path) -> None:
    """A root that is itself a mount, on a mount that is shared, like those that an engine hands over."""
    with mounted_tmpfs(tmp_path / "engine", linux.MS_SHARED):
        (tmp_path / "engine/merged").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "merged", tmp_path / "engine/merged"], check=True)
        try:
            layer(tmp_path / "engine/merged/x").rename(tmp_path / "engine/merged/y")
            root = tmp_path / "engine/merged/y"

            async def body(launch: Launch) -> None:
                box = await launch.start(["sh", "-c", "echo up; sleep 1000"], bundle=root)
                assert await line(box) == "up"
                lines = Path(f"/proc/{box.process.pid}/mountinfo").read_text().splitlines()
                assert [entry.split()[4] for entry in lines].count("/") == 1

            in_launch(tmp_path, body)
        finally:
            subprocess.run(["umount", tmp_path / "engine/merged"], check=True)


def test_what_cannot_be_a_root(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def body(launch: Launch) -> None:
        with pytest.raises(StartFailed) as caught:
            await launch.start(SLEEP, bundle=tmp_path / "nothing")
        assert (caught.value.step, caught.value.errno) == ("open the root file system", 2)
        assert str(tmp_path / "nothing") in str(caught.value)
        with pytest.raises(StartFailed) as caught:
            await launch.start(SLEEP, bundle=tmp_path / "file")
        assert (caught.value.step, caught.value.errno) == ("open the root file system", 20)
        with pytest.raises(InvalidArgument, match="rootfsPropagation"):
            await launch.start(SLEEP, bundle=tmp_path, linux={"rootfsPropagation": "sideways"})
        await until(lambda: not mounts_below(tmp_path), "nothing mounted")

    in_launch(tmp_path, body)
