"""Bind mounts whose owners are mapped: by mappings of their own, by the container's, recursively, or not at all because they cannot be."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tare.errors import InvalidArgument
from tare.handlers.builtin import StartFailed
from tests.support import leaks
from tests.support.launch import FIRST_ID, MAPPING, Launch, bind, in_launch, namespaces, until, user_namespace
from tests.support.mounts import mounted_tmpfs, mounts_below

pytestmark = pytest.mark.root

SHIFT = [{"containerID": 0, "hostID": 7000, "size": 1000}]
CAPS = {kind: ["CAP_CHOWN", "CAP_DAC_OVERRIDE"] for kind in ("bounding", "effective", "permitted")}


def mapped(target: str, source: Path, *options: str, uid: Any = None, gid: Any = None) -> dict[str, Any]:
    """A bind mount with mappings of its own."""
    mount = bind(target, source, *(options or ("idmap", "rprivate")))
    return mount | ({"uidMappings": uid, "gidMappings": gid or uid} if uid else {})


def tree(directory: Path) -> Path:
    """A directory with a file of user 5 and group 6."""
    directory.mkdir(exist_ok=True)
    (directory / "file").write_text("here")
    os.chown(directory / "file", 5, 6)
    return directory


def owners(text: str) -> list[tuple[str, str]]:
    """Of what `ls -ln` shows."""
    rows = (row.split() for row in text.splitlines())
    return [(row[2], row[3]) for row in rows if len(row) > 8]


def test_mappings_of_its_own(tmp_path: Path) -> None:
    """Without a user namespace: what is user 5 on the disk is user 7005 here, and what 7005 makes is 5 on the disk."""
    data = tree(tmp_path / "data")
    data.chmod(0o777)
    other = [{"containerID": 0, "hostID": 9000, "size": 1000}]

    async def body(launch: Launch) -> None:
        mounts = [
            mapped("/data", data, uid=SHIFT),
            mapped("/apart", data, uid=SHIFT, gid=other),
            mapped("/again", data, uid=SHIFT),
            bind("/plain", data),
        ]
        script = "ls -ln /data/file /apart/file /again/file /plain/file; echo x >/data/new"
        result = await launch.run(["sh", "-c", script], mounts=mounts, user={"uid": 7008, "gid": 7009})
        assert owners(result.out) == [("7005", "7006"), ("7005", "9006"), ("7005", "7006"), ("5", "6")]
        made = (data / "new").stat()
        assert (made.st_uid, made.st_gid) == (8, 9) and (data / "file").stat().st_uid == 5
        refused = await launch.run(["sh", "-c", "echo x >/data/more"], mounts=mounts, user={"uid": 3, "gid": 3})
        assert "Value too large" in refused.err and not (data / "more").exists()
        assert not mounts_below(tmp_path)

    in_launch(tmp_path, body, cgroups=True)


def test_the_mappings_of_the_container(tmp_path: Path) -> None:
    """With `idmap` alone, or with the same ones; another mapping is what the mount has; without any it is as it is."""
    data = tree(tmp_path / "data")
    data.chmod(0o777)

    async def body(launch: Launch) -> None:
        mounts = [
            mapped("/alone", data),
            mapped("/same", data, uid=MAPPING),
            mapped("/implied", data, "rprivate", uid=MAPPING),
            mapped("/other", data, uid=[{"containerID": 0, "hostID": FIRST_ID + 50, "size": 100}]),
            bind("/plain", data),
        ]
        script = "for i in alone same implied other plain; do ls -ln /$i/file; done; echo x >/alone/new"
        result = await launch.run(["sh", "-c", script], mounts=mounts, linux=user_namespace(), capabilities=CAPS)
        mine = ("5", "6")
        assert owners(result.out) == [mine, mine, mine, ("55", "56"), ("65534", "65534")], result
        assert (data / "new").stat().st_uid == 0

    in_launch(tmp_path, body, cgroups=True)


@pytest.mark.parametrize("user", [False, True])
def test_recursively_or_not(tmp_path: Path, user: bool) -> None:
    with mounted_tmpfs(tmp_path / "data"), mounted_tmpfs(tmp_path / "data/below"):
        tree(tmp_path / "data")
        tree(tmp_path / "data/below")

        async def body(launch: Launch) -> None:
            mapping = MAPPING if user else SHIFT
            mounts = [
                mapped("/top", tmp_path / "data", "idmap", "rprivate", uid=mapping),
                mapped("/all", tmp_path / "data", "ridmap", "rprivate", uid=mapping),
            ]
            linux = user_namespace() if user else {"namespaces": namespaces()}
            script = "ls -ln /all/below/file /all/file /top/below/file /top/file"
            result = await launch.run(["sh", "-c", script], mounts=mounts, linux=linux)
            there = ("5", "6") if user else ("7005", "7006")
            not_there = ("65534", "65534") if user else ("5", "6")
            assert owners(result.out) == [there, there, not_there, there], result

        in_launch(tmp_path, body)


@pytest.mark.parametrize("user", [False, True])
def test_a_file_system_that_cannot_is_an_error_that_names_it(tmp_path: Path, user: bool) -> None:
    """Never shown as it is. Also where it is below, and where the mount is mapped already."""
    ram = tmp_path / "tree/ram"
    ram.mkdir(parents=True)
    subprocess.run(["mount", "-t", "ramfs", "ram", ram], check=True)
    linux = user_namespace() if user else {"namespaces": namespaces()}

    async def body(launch: Launch) -> None:
        for source, option, words in (
            ("/proc/sys", "idmap", "the file system (proc) cannot be idmapped: /proc/sys"),
            (ram, "idmap", f"the file system (of type 0x858458f6) cannot be idmapped: {ram}"),
            (ram.parent, "ridmap", f"or one below it cannot be idmapped: {ram.parent}"),
        ):
            with pytest.raises(StartFailed) as caught:
                await launch.start(["true"], mounts=[mapped("/x", Path(source), option, uid=SHIFT)], linux=linux)
            assert (caught.value.step, caught.value.errno) == ("mount /x", 22)
            assert words in str(caught.value)
        result = await launch.run(["true"], mounts=[mapped("/x", ram.parent, "idmap", uid=SHIFT)], linux=linux)
        assert result.code == 0
        launcher = launch.pid_of("launcher")
        await until(lambda: not [p for p in leaks.processes() if p.parent == launcher], "the end of the children")
        assert not list((launch.run_directory / "tasks").iterdir())

    try:
        in_launch(tmp_path, body)
    finally:
        subprocess.run(["umount", ram], check=True)


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        ({"options": ["bind", "idmap"]}, r"mounts\[6\].options: idmap without mappings"),
        ({"options": ["bind"], "uidMappings": SHIFT}, r"mounts\[6\].gidMappings"),
        ({"options": ["bind"], "gidMappings": SHIFT}, r"mounts\[6\].uidMappings"),
        ({"type": "tmpfs", "uidMappings": SHIFT, "gidMappings": SHIFT}, r"mounts\[6\].options: only bind mounts"),
        (
            {
                "options": ["bind"],
                "uidMappings": [{"containerID": 0, "hostID": 1 << 32, "size": 1}],
                "gidMappings": SHIFT,
            },
            r"mounts\[6\].uidMappings\[0\].hostID",
        ),
    ],
)
def test_mappings_that_cannot_be(tmp_path: Path, mount: dict[str, Any], words: str) -> None:
    async def body(launch: Launch) -> None:
        with pytest.raises(InvalidArgument, match=words):
            await launch.start(["true"], mounts=[{"destination": "/x", "source": str(tmp_path)} | mount])

    in_launch(tmp_path, body)


def test_with_a_pid_namespace_that_is_joined(tmp_path: Path) -> None:
    """The process in between does both; and the PIDs that /proc shows it are not those of where its child is."""
    data = tree(tmp_path / "data")

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        linux = {"namespaces": namespaces(pid=pod.pins["pid"])}
        result = await launch.run(["ls", "-ln", "/data"], mounts=[mapped("/data", data, uid=SHIFT)], linux=linux)
        assert owners(result.out) == [("7005", "7006")]

    in_launch(tmp_path, body)


def test_a_limit_of_one_process_is_enough(tmp_path: Path) -> None:
    """Whoever makes the mappings does not count as one of the container's."""
    data = tree(tmp_path / "data")

    async def body(launch: Launch) -> None:
        for linux in (user_namespace(), {"namespaces": namespaces()}):
            result = await launch.run(
                ["ls", "-ln", "/data"],
                mounts=[mapped("/data", data, uid=SHIFT)],
                linux=linux,
                resources={"pids": {"limit": 1}},
            )
            assert (result.code, len(owners(result.out))) == (0, 1), result

    in_launch(tmp_path, body, cgroups=True)
