"""Every form of a mount that the specification has, with a user namespace and without: options, copying up, propagation, /proc and /dev."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tare.errors import InvalidArgument
from tare.handlers.builtin import StartFailed
from tare.launch import linux
from tests.support.launch import Box, Launch, bind, in_launch, line, namespaces, standard_mounts, user_namespace
from tests.support.mounts import MountLine, mount_table, mounted_tmpfs

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
FLAGS = ["nosuid", "nodev", "noexec", "nodiratime", "nosymfollow"]
BOTH = pytest.mark.parametrize("user", [False, True])


def parts(user: bool, **paths: Any) -> dict[str, Any]:
    """A linux object, with a user namespace or without."""
    return user_namespace(**paths) if user else {"namespaces": namespaces(**paths)}


def table(box: Box) -> dict[str, MountLine]:
    """A container's mounts."""
    return mount_table(Path(f"/proc/{box.process.pid}/mountinfo").read_text())


def tmpfs(target: str, *options: str, kind: str = "tmpfs") -> dict[str, Any]:
    """A new file system."""
    return {"destination": target, "type": kind, "source": "tmpfs", "options": list(options)}


async def with_mounts(launch: Launch, args: list[str], mounts: list[dict[str, Any]], **changes: Any) -> Box:
    """A container that has these mounts and no others."""
    spec = launch.spec(args, **changes) | {"mounts": mounts}
    identity, overlay, ends = launch.place()
    cgroup = launch.cgroup(identity)
    made = await launch.handler.start(identity, spec, overlay=overlay, cgroup=cgroup)
    launch.processes[made] = None
    return Box(id=identity, process=made, upper=overlay.upper, cgroup=cgroup, streams=ends)


@BOTH
def test_flags_of_binds_and_of_new_file_systems(tmp_path: Path, user: bool) -> None:
    """And those that take them back; the later of two that contradict holds."""
    with mounted_tmpfs(tmp_path / "data"), mounted_tmpfs(tmp_path / "data/below"):

        async def body(launch: Launch) -> None:
            mounts: list[dict[str, Any]] = []
            for option in [*FLAGS, "ro"]:
                mounts += [
                    bind(f"/bind-{option}", tmp_path / "data", option, "rprivate"),
                    bind(f"/all-{option}", tmp_path / "data", f"r{option}", "rprivate"),
                    tmpfs(f"/new-{option}", option, "mode=700"),
                ]
            mounts += [
                bind("/back", tmp_path / "data", "ro", "rro", "rrw", "rw", "nosuid", "suid"),
                tmpfs("/back2", *FLAGS, "suid", "dev", "exec", "diratime", "symfollow", "ro", "rw"),
                bind("/atime", tmp_path / "data", "noatime", "rnoatime"),
                bind("/strict", tmp_path / "data", "rstrictatime"),
                tmpfs("/sync", "sync", "dirsync", "lazytime", "silent", "loud", "iversion", "defaults", "size=1m"),
            ]
            found = table(await launch.start(SLEEP, mounts=mounts, linux=parts(user)))
            for option in [*FLAGS, "ro"]:
                assert option in found[f"/bind-{option}"].flags and option not in found[f"/bind-{option}/below"].flags
                assert option in found[f"/all-{option}"].flags and option in found[f"/all-{option}/below"].flags
                assert option in found[f"/new-{option}"].flags
            unwanted = {*FLAGS, "ro"}
            for point in ("/back", "/back/below", "/back2"):
                assert not unwanted & found[point].flags, point
            assert "noatime" in found["/atime/below"].flags
            assert not {"noatime", "relatime"} & found["/strict/below"].flags
            assert {"sync", "dirsync", "lazytime"} <= found["/sync"].super_options
            assert "size=1024k" in found["/sync"].super_options

        in_launch(tmp_path, body)


@BOTH
def test_what_a_tmpfs_hides_can_be_copied_up(tmp_path: Path, user: bool) -> None:
    image = tmp_path / "image"
    (image / "data/deep/er").mkdir(parents=True)
    (image / "data/deep/file").write_text("text" * 5000)
    os.chown(image / "data/deep/file", 5, 6)
    (image / "data/deep/file").chmod(0o4751)
    os.setxattr(image / "data/deep/file", "user.tare", b"yes")
    os.utime(image / "data/deep/file", (1000, 2000))
    (image / "data/link").symlink_to("deep/file")
    (image / "data/out").symlink_to("/etc")
    os.mkfifo(image / "data/fifo")
    (image / "data/deep/er").chmod(0o1700)
    (image / "data").chmod(0o751)
    os.utime(image / "data", (3000, 4000))
    (image / "to").symlink_to("data")

    async def body(launch: Launch) -> None:
        mounts = [
            tmpfs("/data", "tmpcopyup", "nodev"),
            tmpfs("/to/deep/er/x", "tmpcopyup"),
            tmpfs("/absent", "tmpcopyup"),
        ]
        box = await launch.start(
            ["sh", "-c", "echo more >>/data/deep/er/own; echo up; sleep 1000"],
            mounts=mounts,
            lowers=[image],
            linux=parts(user),
        )
        assert await line(box) == "up"
        root = Path(f"/proc/{box.process.pid}/root")
        assert table(box)["/data"].kind == "tmpfs"
        facts = (root / "data/deep/file").stat()
        base = 100000 if user else 0
        assert (facts.st_uid, facts.st_gid, stat.S_IMODE(facts.st_mode)) == (base + 5, base + 6, 0o4751)
        assert (facts.st_size, facts.st_mtime) == (20000, 2000)
        assert os.getxattr(root / "data/deep/file", "user.tare") == b"yes"
        assert os.readlink(root / "data/link") == "deep/file" and os.readlink(root / "data/out") == "/etc"
        assert not (root / "data/fifo").exists()
        assert stat.S_IMODE((root / "data/deep/er").stat().st_mode) == 0o1700
        facts = (root / "data").stat()
        assert (stat.S_IMODE(facts.st_mode), facts.st_mtime) == (0o751, 4000)
        assert list((root / "absent").iterdir()) == []
        assert not (image / "data/deep/er/own").exists()

    in_launch(tmp_path, body)


@BOTH
def test_a_tmpfs_has_the_mode_of_what_it_hides(tmp_path: Path, user: bool) -> None:
    """Unless it is given one; where nothing is, the kernel's own."""
    image = tmp_path / "image"
    (image / "private").mkdir(parents=True)
    (image / "private").chmod(0o2750)

    async def body(launch: Launch) -> None:
        mounts = [tmpfs("/private"), tmpfs("/nothing"), tmpfs("/tmp", "mode=711")]
        box = await launch.start(SLEEP, mounts=mounts, lowers=[image], linux=parts(user))
        root = Path(f"/proc/{box.process.pid}/root")
        modes = [stat.S_IMODE((root / name).stat().st_mode) for name in ("private", "nothing", "tmp")]
        assert modes == [0o2750, 0o1777, 0o711]

    in_launch(tmp_path, body)


@BOTH
@pytest.mark.parametrize("option", ["private", "rprivate", "slave", "shared", "rshared", "unbindable"])
def test_propagation_of_new_file_systems_and_binds(tmp_path: Path, user: bool, option: str) -> None:
    """A mount of the node that is shared into a user namespace is a group of its own there, and the node's slave: so the kernel has it."""
    with mounted_tmpfs(tmp_path / "data", linux.MS_SHARED):
        (tmp_path / "data/in").mkdir()

        async def body(launch: Launch) -> None:
            mounts = [tmpfs("/new", option), bind("/bound", tmp_path / "data", option)]
            box = await launch.start(SLEEP, mounts=mounts, linux=parts(user))
            found = table(box)
            shared = option in ("shared", "rshared")
            for point in ("/new", "/bound"):
                words = found[point].propagation
                assert any(word.startswith("shared:") for word in words) == shared, (point, words)
                assert ("unbindable" in words) == (option == "unbindable")
            subprocess.run(["mount", "-t", "tmpfs", "late", tmp_path / "data/in"], check=True)
            try:
                assert ("/bound/in" in table(box)) == (shared or option == "slave")
            finally:
                subprocess.run(["umount", tmp_path / "data/in"], check=True)
            caps = {kind: ["CAP_SYS_ADMIN"] for kind in ("bounding", "effective", "permitted")}
            assert (await launch.exec(box, ["mount", "-t", "tmpfs", "x", "/bound/in"], capabilities=caps)).code == 0
            out = str(tmp_path / "data/in") in mount_table(Path("/proc/self/mountinfo").read_text())
            if out:
                subprocess.run(["umount", tmp_path / "data/in"], check=True)
            assert out == (shared and not user)

        in_launch(tmp_path, body)


@BOTH
def test_views_of_proc_files(tmp_path: Path, user: bool) -> None:
    """As lxcfs gives them; never the files by which the kernel takes orders."""
    (tmp_path / "uptime").write_text("1.00 2.00\n")

    async def body(launch: Launch) -> None:
        mounts = [bind("/proc/uptime", tmp_path / "uptime", "ro"), bind("/proc/meminfo", tmp_path / "uptime")]
        result = await launch.run(["cat", "/proc/uptime", "/proc/meminfo"], mounts=mounts, linux=parts(user))
        assert result.out == "1.00 2.00\n" * 2
        for target in ("/proc/sys/kernel/core_pattern", "/proc/self/attr/exec", "/proc/1", "/proc/x"):
            with pytest.raises(InvalidArgument, match="within /proc"):
                await launch.start(SLEEP, mounts=[bind(target, tmp_path / "uptime")], linux=parts(user))

    in_launch(tmp_path, body)


@BOTH
def test_the_nodes_proc_with_the_nodes_pids(tmp_path: Path, user: bool) -> None:
    async def body(launch: Launch) -> None:
        kept = [mount for mount in standard_mounts() if mount["destination"] != "/proc"]
        wanted = parts(user, pid=None) | {"maskedPaths": [], "readonlyPaths": []}
        box = await with_mounts(
            launch,
            ["sh", "-c", "ls -d /proc/[0-9]* | wc -l; sleep 1000"],
            [bind("/proc", "/proc", "rslave"), *kept],
            linux=wanted,
        )
        assert int(await line(box)) > 5 and table(box)["/proc"].kind == "proc"
        with pytest.raises(StartFailed, match="nothing but a proc file system") as caught:
            await with_mounts(launch, SLEEP, [bind("/proc", tmp_path), *kept], linux=wanted)
        assert (caught.value.step, caught.value.errno) == ("mount /proc", 22)

    in_launch(tmp_path, body)


@BOTH
def test_a_dev_that_is_the_nodes(tmp_path: Path, user: bool) -> None:
    """Nothing is made in it: neither nodes nor links."""
    before = sorted(os.listdir("/dev"))

    async def body(launch: Launch) -> None:
        kept = [mount for mount in standard_mounts() if not mount["destination"].startswith("/dev")]
        script = "ls /dev | wc -l; echo x >/dev/null && echo null; cat /proc/keys; sleep 1000"
        box = await with_mounts(launch, ["sh", "-c", script], [*kept, bind("/dev", "/dev")], linux=parts(user))
        assert (await line(box, count=2)).split() == [str(len(before)), "null"]
        assert sorted(os.listdir("/dev")) == before and stat.S_IMODE(os.stat("/dev/null").st_mode) == 0o666

    in_launch(tmp_path, body)


@BOTH
def test_mounts_of_kinds_that_are_not_ours_to_know(tmp_path: Path, user: bool) -> None:
    """What the kernel has and allows is mounted; what it has not, or refuses, is an error in its words."""
    for name in ("low", "up", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "low/file").write_text("below")

    async def body(launch: Launch) -> None:
        data = [f"lowerdir={tmp_path}/low", f"upperdir={tmp_path}/up", f"workdir={tmp_path}/work"]
        with pytest.raises(StartFailed, match=r"fsopen no-such-fs|No such device") as caught:
            await launch.start(SLEEP, mounts=[tmpfs("/x", kind="no-such-fs")], linux=parts(user))
        assert (caught.value.step, caught.value.errno) == ("mount /x", 19)
        with pytest.raises(StartFailed, match="colour") as caught:
            await launch.start(SLEEP, mounts=[tmpfs("/x", "colour=blue")], linux=parts(user))
        assert caught.value.errno == 22
        if not user:  # in a user namespace layers have to be reachable for its root
            box = await launch.start(
                ["sh", "-c", "cat /merged/file; echo new >/merged/file; sleep 1000"],
                mounts=[{"destination": "/merged", "type": "overlay", "source": "overlay", "options": data}],
                linux=parts(user),
            )
            assert table(box)["/merged"].kind == "overlay"
            assert (tmp_path / "low/file").read_text() == "below"

    in_launch(tmp_path, body)


def test_a_file_system_on_a_device(tmp_path: Path) -> None:
    """Its source is what it is made of, not only a name."""
    if not Path("/dev/loop-control").exists() or shutil.which("mkfs.ext4") is None:
        pytest.skip("this machine has no loop devices, or no mkfs.ext4")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(1 << 23)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    device = subprocess.run(
        ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
    ).stdout.strip()

    async def body(launch: Launch) -> None:
        mount = {"destination": "/disk", "type": "ext4", "source": device, "options": ["ro", "noatime"]}
        box = await launch.start(SLEEP, mounts=[mount])
        assert table(box)["/disk"].kind == "ext4" and {"ro", "noatime"} <= table(box)["/disk"].flags
        with pytest.raises(StartFailed) as caught:
            await launch.start(SLEEP, mounts=[mount], linux=parts(True))
        assert (caught.value.step, caught.value.errno) == ("mount /disk", 1)

    try:
        in_launch(tmp_path, body)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
