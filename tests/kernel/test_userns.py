"""Containers in a user namespace: who they are inside and outside, what is theirs, and what they cannot undo."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import resource
import select
import stat
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tare.handlers.builtin import StartFailed
from tare.handlers.plans import Mappings
from tare.launch import linux
from tests.kernel.test_container_mounts import by_mount
from tests.support import leaks
from tests.support.launch import (
    FIRST_ID,
    IDS,
    MAPPING,
    Box,
    Launch,
    bind,
    in_launch,
    layer,
    line,
    namespaces,
    process,
    standard_mounts,
    status,
    until,
    user_namespace,
)
from tests.support.mounts import MountLine, mount_table, mounted_tmpfs, mounts_below

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
NS_GET_USERNS = 0xB701
KINDS = ("cgroup", "ipc", "mnt", "net", "pid", "uts")
ALL = {
    kind: ["CAP_SYS_ADMIN", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_MKNOD", "CAP_SETUID", "CAP_SETGID"]
    for kind in ("bounding", "effective", "permitted")
}
POD = Mappings(((0, FIRST_ID, IDS),), ((0, FIRST_ID, IDS),))


def root(box: Box) -> Path:
    """A container's root, seen from the node."""
    return Path(f"/proc/{box.process.pid}/root")


def table(box: Box) -> dict[str, MountLine]:
    """A container's mounts."""
    return mount_table(Path(f"/proc/{box.process.pid}/mountinfo").read_text())


def inode(box: Box, kind: str) -> int:
    """What tells its namespace from others."""
    return os.stat(f"/proc/{box.process.pid}/ns/{kind}").st_ino


def owner(box: Box, kind: str) -> int:
    """The user namespace that owns one of its namespaces."""
    fd = os.open(f"/proc/{box.process.pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        owning = fcntl.ioctl(fd, NS_GET_USERNS)
        try:
            return os.fstat(owning).st_ino
        finally:
            os.close(owning)
    finally:
        os.close(fd)


def joined(pins: dict[str, Path]) -> dict[str, Any]:
    """A pod's namespaces as the linux object of a container in it."""
    names = {"net": "network"}
    others: dict[str, Any] = {names.get(kind, kind): path for kind, path in pins.items() if kind != "user"}
    return user_namespace(pins["user"], **others)


async def nothing_stays(launch: Launch) -> None:
    """No process, no marker, no mount of a start that failed."""
    launcher = launch.pid_of("launcher")
    await until(lambda: not [p for p in leaks.processes() if p.parent == launcher], "the end of the children")
    assert not list((launch.run_directory / "tasks").iterdir())
    assert not list((launch.run_directory / "exits").iterdir())
    assert not mounts_below(launch.base / "run")


def test_a_new_user_namespace_owns_all_others(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(
            ["sh", "-c", "cat /proc/self/uid_map /proc/self/gid_map; id; sleep 1000"], linux=user_namespace()
        )
        lines = (await line(box, count=3)).splitlines()
        assert [entry.split() for entry in lines[:2]] == [["0", str(FIRST_ID), str(IDS)]] * 2
        assert lines[2] == "uid=0 gid=0"
        entry = Path(f"/proc/{box.process.pid}")
        facts = status((entry / "status").read_text())
        assert facts["Uid"].split() == facts["Gid"].split() == [str(FIRST_ID)] * 4 and facts["Groups"] == ""
        assert (entry / "setgroups").read_text() == "allow\n"
        own = inode(box, "user")
        assert own != os.stat("/proc/self/ns/user").st_ino
        for kind in KINDS:
            assert owner(box, kind) == own, kind
            assert inode(box, kind) != os.stat(f"/proc/self/ns/{kind}").st_ino, kind
        result = await launch.exec(box, ["ls", "-ld", "/dev/mqueue", "/dev/pts", "/tmp", "/etc"])
        assert [entry.split()[2:4] for entry in result.out.splitlines()] == [["0", "0"]] * 4

    in_launch(tmp_path, body, cgroups=True)


def test_several_mappings_and_a_user_in_the_second(tmp_path: Path) -> None:
    """Layers are shown by the same mappings, nothing in them changes; what is written has the node's IDs of the mapping."""
    maps = [
        {"containerID": 0, "hostID": 300000, "size": 10},
        {"containerID": 10, "hostID": 500000, "size": 1000},
        {"containerID": 2000, "hostID": 400000, "size": 1},
    ]
    groups = [{"containerID": 0, "hostID": 700000, "size": 3000}]
    image = tmp_path / "image"
    (image / "own").mkdir(parents=True, mode=0o755)
    for uid in (0, 9, 10, 2000, 1500):
        (image / f"own/{uid}").touch()
        os.chown(image / f"own/{uid}", uid, 5)
    os.chown(image / "own", 1000, 1000)

    async def body(launch: Launch) -> None:
        user = {"uid": 1000, "gid": 1000, "additionalGids": [5, 2999]}
        script = "id; ls -ln /own | tail -n +2; echo new >/own/new; cat /proc/self/status"
        box = await launch.start(
            ["sh", "-c", script + "; echo end; sleep 1000"],
            linux=user_namespace(uid=maps, gid=groups),
            user=user,
            lowers=[image],
        )
        said = (await line(box, count=60)).splitlines()
        assert said[0] == "uid=1000 gid=1000 groups=5,2999"
        owners = {words[-1]: words[2] for words in (entry.split() for entry in said[1:6])}
        assert owners == {"0": "0", "9": "9", "10": "10", "2000": "2000", "1500": "65534"}
        facts = (box.upper / "own/new").stat()
        assert (facts.st_uid, facts.st_gid) == (500000 + 990, 701000)
        assert (box.upper / "own").stat().st_uid == 500990  # copied up
        assert [(image / f"own/{uid}").stat().st_uid for uid in (0, 9, 10, 2000, 1500)] == [0, 9, 10, 2000, 1500]
        outside = status(Path(f"/proc/{box.process.pid}/status").read_text())
        assert outside["Uid"].split()[0] == "500990" and outside["Groups"].split() == ["700005", "702999"]
        assert (box.upper.stat().st_uid, box.upper.stat().st_gid) == (300000, 700000)

    in_launch(tmp_path, body)


def test_the_user_namespace_of_a_pod(tmp_path: Path) -> None:
    """Made once, owning the pod's others; containers and execs are in it, and so is the PID 1 that is shared."""

    async def body(launch: Launch) -> None:
        sysctls = {"net.ipv4.ip_unprivileged_port_start": "80"}
        pod = await launch.pod("user", "net", "ipc", "uts", "pid", mappings=POD, sysctls=sysctls, hostname="there")
        boxes = [await launch.start(SLEEP, linux=joined(pod.pins), user={"uid": 7, "gid": 8}) for _ in range(2)]
        for box in boxes:
            for kind in ("user", "net", "ipc", "uts", "pid"):
                assert inode(box, kind) == pod.pins[kind].stat().st_ino, kind
            for kind in KINDS:
                assert owner(box, kind) == inode(box, "user"), kind
        assert inode(boxes[0], "mnt") != inode(boxes[1], "mnt")
        assert pod.pause is not None
        facts = status(Path(f"/proc/{pod.pause.pid}/status").read_text())
        assert facts["Uid"].split() == facts["Gid"].split() == [str(FIRST_ID + IDS - 1)] * 4
        assert {facts[name] for name in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
        script = (
            "id; hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; cat /proc/self/uid_map; ps -o pid,user"
        )
        result = await launch.exec(boxes[1], ["sh", "-c", script], user={"uid": 9, "gid": 3, "additionalGids": [4]})
        said = result.out.splitlines()
        assert said[:3] == ["uid=9 gid=3 groups=4", "there", "80"] and said[3].split() == ["0", str(FIRST_ID), str(IDS)]
        assert [entry.split()[:2] for entry in said[5:8]] == [["1", str(IDS - 1)], ["2", "7"], ["3", "7"]]
        await launch.remove_pod(pod)
        assert not mounts_below(launch.run_directory)
        for box in boxes:
            assert (await launch.wait(box.process)).code == 137

    in_launch(tmp_path, body, cgroups=True)


def test_the_mappings_of_a_joined_namespace_are_the_kernels(tmp_path: Path) -> None:
    """podman tells a container that joins another's user namespace of a mapping that is not that one's."""
    image = tmp_path / "image"
    image.mkdir()
    (image / "mine").touch()
    data = {"source": str(image), "options": ["rbind", "idmap"]}
    dummy = [{"containerID": 0, "hostID": 0, "size": 1}]

    async def body(launch: Launch) -> None:
        first = await launch.start(SLEEP, linux=user_namespace())
        wanted = user_namespace(f"/proc/{first.process.pid}/ns/user", uid=dummy, gid=dummy)
        box = await launch.start(
            ["sh", "-c", "ls -ln /mine /volume/mine /plain/mine; echo x >/new; echo done >&2; sleep 1000"],
            linux=wanted,
            lowers=[image],
            mounts=[
                data | {"destination": "/volume"},
                data | {"destination": "/plain", "uidMappings": dummy, "gidMappings": dummy},
            ],
            user={"uid": 0, "gid": 0},
        )
        assert await line(box, "stderr") == "done"
        owners = {row.split()[-1]: row.split()[2] for row in box.read().splitlines()}
        assert owners == {"/mine": "0", "/volume/mine": "0", "/plain/mine": "65534"}
        assert inode(box, "user") == inode(first, "user") and (box.upper / "new").stat().st_uid == FIRST_ID

    in_launch(tmp_path, body)


def test_devices(tmp_path: Path) -> None:
    """They are the container's own nodes: with its owners, and of a mode that is nobody else's."""

    async def body(launch: Launch) -> None:
        wanted = [
            {"path": "/dev/deep/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 3, "gid": 4},
            {"path": "/dev/fifo", "type": "p", "fileMode": 0o600, "uid": 5, "gid": 6},
        ]
        script = "chmod 600 /dev/null; mknod /tmp/null c 1 3; echo x >/dev/null && echo null; head -c 4 /dev/zero | od -An -tx1"
        box = await launch.start(
            ["sh", "-c", script + "; sleep 1000"], linux=user_namespace() | {"devices": wanted}, capabilities=ALL
        )
        assert (await line(box, count=2)).split() == ["null", "00", "00", "00", "00"]
        assert "Operation not permitted" in await line(box, "stderr")
        numbers = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
        for name, (major, minor) in numbers.items():
            facts = (root(box) / "dev" / name).stat()
            assert stat.S_ISCHR(facts.st_mode) and facts.st_rdev == os.makedev(major, minor), name
            assert (facts.st_uid, facts.st_gid) == (FIRST_ID, FIRST_ID), name
        assert stat.S_IMODE(os.stat("/dev/null").st_mode) == 0o666 and os.stat("/dev/null").st_uid == 0
        facts = (root(box) / "dev/deep/fuse").stat()
        assert (facts.st_rdev, stat.S_IMODE(facts.st_mode)) == (os.makedev(10, 229), 0o640)
        assert (facts.st_uid, facts.st_gid) == (FIRST_ID + 3, FIRST_ID + 4)
        facts = (root(box) / "dev/fifo").stat()
        assert stat.S_ISFIFO(facts.st_mode) and (facts.st_uid, facts.st_gid) == (FIRST_ID + 5, FIRST_ID + 6)

    in_launch(tmp_path, body)


def test_what_is_read_only_stays_so(tmp_path: Path) -> None:
    """With all capabilities in its user namespace: no flag that a mount had before can be cleared, of those that the node gave it either."""
    with mounted_tmpfs(tmp_path / "node"), mounted_tmpfs(tmp_path / "node/below"):
        subprocess.run(["mount", "-o", "remount,ro,nosuid,nodev", tmp_path / "node"], check=True)
        (tmp_path / "data").mkdir()

        async def body(launch: Launch) -> None:
            mounts = [bind("/ours", tmp_path / "data", "ro", "noexec", "rprivate"), bind("/nodes", tmp_path / "node")]
            box = await launch.start(SLEEP, mounts=mounts, linux=user_namespace(), capabilities=ALL)
            for options in ("rw", "rw,exec", "ro,exec", "ro,noexec,atime,strictatime"):
                tried = await launch.exec(box, ["mount", "-o", f"remount,bind,{options}", "/ours"], capabilities=ALL)
                assert tried.code and "permi" in tried.out, (options, tried)
            for options in ("rw,nosuid,nodev", "ro,suid,nodev", "ro,nosuid,dev"):
                tried = await launch.exec(box, ["mount", "-o", f"remount,bind,{options}", "/nodes"], capabilities=ALL)
                assert tried.code and "permi" in tried.out, (options, tried)
            # What is mounted below cannot be taken away from over what it hides.
            assert (await launch.exec(box, ["umount", "/nodes/below"], capabilities=ALL)).code
            found = table(box)
            assert {"ro", "noexec"} <= found["/ours"].flags and {"ro", "nosuid", "nodev"} <= found["/nodes"].flags
            # Mounts of its own it may make.
            assert (await launch.exec(box, ["mount", "-t", "tmpfs", "x", "/tmp"], capabilities=ALL)).code == 0

        in_launch(tmp_path, body)


def test_masks_and_read_only_paths(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        script = (
            "cat /proc/keys /proc/timer_list; ls /sys/firmware; echo 1 >/proc/sys/kernel/domainname; chmod 0 /proc/keys"
        )
        result = await launch.run(
            ["sh", "-c", script],
            linux=user_namespace()
            | {"maskedPaths": ["/proc/keys", "/proc/timer_list", "/sys/firmware"], "readonlyPaths": ["/proc/sys"]},
            capabilities=ALL,
        )
        assert result.out == "" and result.err.count("Read-only file system") == 2, result

    in_launch(tmp_path, body)


def test_streams_and_terminals_belong_to_the_user(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        user = {"uid": 1000, "gid": 1000}
        box = await launch.start(
            ["sh", "-c", "echo again >/dev/stdout; echo err >/dev/stderr; read x </dev/stdin; sleep 1000"],
            linux=user_namespace(),
            user=user,
            stdin=True,
        )
        assert await line(box) == "again" and await line(box, "stderr") == "err"
        streams = launch.run_directory / "containers" / box.id
        assert {(streams / name).stat().st_uid for name in ("stdin", "stdout", "stderr")} == {FIRST_ID + 1000}
        result = await launch.exec(box, ["sh", "-c", "echo mine >/dev/stdout"], user={"uid": 12, "gid": 0})
        assert result.out == "mine\n"
        held = await launch.start(
            ["sh", "-c", "tty; stat -c '%u %a' /dev/console $(tty); sleep 1000"],
            linux=user_namespace(),
            user=user,
            terminal=True,
        )
        said = b""
        while said.count(b"\n") < 3:
            await until(lambda: bool(select_readable(held.terminal)), "output")
            said += os.read(held.terminal, 4096)
        assert said.split() == [b"/dev/pts/0", b"1000", b"620", b"1000", b"620"]

    in_launch(tmp_path, body)


def select_readable(fd: int) -> list[int]:
    """The descriptor, if it can be read from."""
    return select.select([fd], [], [], 0)[0]


def test_image_volumes_are_mapped_too(tmp_path: Path) -> None:
    for name in ("low", "top"):
        (tmp_path / name / "part").mkdir(parents=True)
        (tmp_path / name / "part" / name).write_text(name)
        os.chown(tmp_path / name / "part" / name, 5, 6)

    async def body(launch: Launch) -> None:
        both = f"lowerdir={tmp_path}/top:{tmp_path}/low"
        volume = {"type": "overlay", "source": "overlay"}
        mounts = [
            volume | {"destination": "/one", "options": ["ro", f"lowerdir={tmp_path}/top"]},
            volume | {"destination": "/two", "options": ["ro", both]},
            volume | {"destination": "/sub", "options": ["ro", both], "subPath": "part"},
        ]
        script = "ls -ln /one/part/top /two/part/top /two/part/low /sub/low; echo x >/two/part/top"
        result = await launch.run(["sh", "-c", script], linux=user_namespace(), mounts=mounts)
        assert [entry.split()[2:4] for entry in result.out.splitlines()] == [["5", "6"]] * 4
        assert "Read-only file system" in result.err and (tmp_path / "top/part/top").stat().st_uid == 5
        assert not mounts_below(launch.run_directory)

    in_launch(tmp_path, body)


def test_a_directory_as_root_is_not_mapped(tmp_path: Path) -> None:
    """The specification has no mapping for it: who gives a bundle has prepared it. It stays a slave of the node's mount, as ever."""
    with mounted_tmpfs(tmp_path / "disk", linux.MS_SHARED):
        bundle = layer(tmp_path / "disk/rootfs")
        (bundle / "late").mkdir()
        for name in ("tmp", "etc", "late"):
            os.chown(bundle / name, FIRST_ID, FIRST_ID)

        async def body(launch: Launch) -> None:
            box = await launch.start(
                ["sh", "-c", "ls -ldn /bin /etc; echo x >/etc/new; echo done >&2; sleep 1000"],
                bundle=bundle,
                linux=user_namespace(),
                capabilities=ALL,
            )
            assert await line(box, "stderr") == "done"
            assert [entry.split()[2] for entry in box.read().splitlines()] == ["65534", "0"]
            assert (bundle / "etc/new").stat().st_uid == FIRST_ID
            subprocess.run(["mount", "-t", "tmpfs", "late", bundle / "late"], check=True)
            try:
                assert "/late" in table(box)
            finally:
                subprocess.run(["umount", bundle / "late"], check=True)

        in_launch(tmp_path, body)


def test_without_its_own_network_there_is_no_sysfs_but_the_nodes(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        host = user_namespace(network=None)
        with pytest.raises(StartFailed, match="does not own the network namespace") as caught:
            await launch.start(SLEEP, linux=host)
        assert (caught.value.step, caught.value.errno) == ("mount /sys", 1)
        kept = [mount for mount in standard_mounts() if mount["destination"] not in ("/sys", "/sys/fs/cgroup")]
        sys = bind("/sys", "/sys", "rro", "rslave")
        spec = launch.spec(["sh", "-c", "ls /sys/class/net; touch /sys/x; sleep 1000"], linux=host)
        spec["mounts"] = [*kept, sys]
        identity, overlay, ends = launch.place()
        made = await launch.handler.start(identity, spec, overlay=overlay, cgroup=launch.cgroup(identity))
        launch.processes[made] = None
        box = Box(id=identity, process=made, upper=overlay.upper, cgroup=launch.cgroup(identity), streams=ends)
        assert set(os.listdir("/sys/class/net")) == set((await line(box)).split())
        assert "Read-only file system" in await line(box, "stderr")
        assert os.stat(f"/proc/{made.pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino
        assert all("ro" in entry.flags for point, entry in table(box).items() if point.startswith("/sys"))

    in_launch(tmp_path, body)


def test_without_its_own_pids_there_is_no_new_proc(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        with pytest.raises(StartFailed, match="does not own the PID namespace") as caught:
            await launch.start(SLEEP, linux=user_namespace(pid=None))
        assert (caught.value.step, caught.value.errno) == ("mount /proc", 1)
        await nothing_stays(launch)

    in_launch(tmp_path, body)


if os.path.ismount("/sys/fs/cgroup/memory"):  # cgroup v1

    def test_without_its_own_cgroup_namespace_the_nodes_groups_are_shown(tmp_path: Path) -> None:
        async def body(launch: Launch) -> None:
            box = await launch.start(SLEEP, linux=user_namespace(cgroup=None))
            found = table(box)
            inside = {point.removeprefix("/sys/fs/cgroup") for point in found if point.startswith("/sys/fs/cgroup")}
            assert {Path(path).name for path in inside if path} == set(os.listdir("/sys/fs/cgroup")) - links(
                "/sys/fs/cgroup"
            )
            assert all("ro" in entry.flags for point, entry in found.items() if point.startswith("/sys/fs/cgroup"))

        in_launch(tmp_path, body, cgroups=True)


def links(directory: str) -> set[str]:
    """Names of symbolic links."""
    return {entry.name for entry in os.scandir(directory) if entry.is_symlink()}


def test_groups_and_score_are_set_before_it_is_too_late(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        score = int(Path("/proc/self/oom_score_adj").read_text()) + 7
        box = await launch.start(SLEEP, linux=user_namespace(), oomScoreAdj=score)
        entry = Path(f"/proc/{box.process.pid}")
        assert int((entry / "oom_score_adj").read_text()) == score
        groups = (entry / "cgroup").read_text()
        assert groups.count(f"{launch.parent}/{box.id}") >= len(box.cgroup.join)

    in_launch(tmp_path, body, cgroups=True)


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"uidMappings": []}, "linux.uidMappings"),
        ({"uidMappings": [], "gidMappings": []}, "linux.uidMappings"),
        ({"uidMappings": [{"containerID": 1, "hostID": 5, "size": 9}]}, "linux.uidMappings"),
        ({"gidMappings": [*MAPPING, {"containerID": 5, "hostID": 1, "size": 2}]}, "linux.gidMappings"),
        ({"gidMappings": [{"containerID": 0, "hostID": -1, "size": 2}]}, r"linux.gidMappings\[0\].hostID"),
        ({"gidMappings": [{"containerID": 0, "hostID": 1, "size": 0}]}, r"linux.gidMappings\[0\].size"),
        ({"namespaces": namespaces()}, "linux.uidMappings"),
    ],
)
def test_mappings_that_cannot_be(tmp_path: Path, change: dict[str, Any], path: str) -> None:
    async def body(launch: Launch) -> None:
        with pytest.raises(Exception, match=path):
            await launch.start(SLEEP, linux=user_namespace() | change)
        assert not [p for p in leaks.processes() if p.parent == launch.pid_of("launcher")]

    in_launch(tmp_path, body)


def test_failures_undo_what_was_made(tmp_path: Path) -> None:
    """A layer that cannot be mapped, a namespace that is none, or the node's own, a user that has no ID outside."""
    (tmp_path / "file").touch()
    ram = tmp_path / "ram"
    ram.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "ram", ram], check=True)

    async def body(launch: Launch) -> None:
        with pytest.raises(StartFailed, match="cannot be idmapped") as caught:
            await launch.start(SLEEP, linux=user_namespace(), lowers=[ram])
        assert caught.value.step == "make the root file system" and str(ram) in str(caught.value)
        for path, number, words in (
            (tmp_path / "file", 22, "Invalid argument"),
            (tmp_path / "none", 2, "No such file"),
            (Path("/proc/self/ns/user"), 22, "not one of a container"),
        ):
            with pytest.raises(StartFailed, match=words) as caught:
                await launch.start(SLEEP, linux=user_namespace(path))
            assert (caught.value.step, caught.value.errno) == (f"open user namespace {path}", number)
        first = await launch.start(SLEEP, linux=user_namespace())
        wanted = user_namespace(f"/proc/{first.process.pid}/ns/user")
        with pytest.raises(StartFailed, match="ID 70000 has no mapping"):
            await launch.start(SLEEP, linux=wanted, user={"uid": 70000, "gid": 0})
        with pytest.raises(StartFailed, match="ID 70000 has no mapping"):
            await launch.handler.exec(
                "e",
                first.process,
                process(["true"], user={"uid": 70000, "gid": 0}),
                cgroup=first.cgroup,
                stdin=0,
                stdout=1,
                stderr=2,
            )
        await launch.kill(first)
        await nothing_stays(launch)
        with pytest.raises(Exception, match=r"make the pod's namespaces: Invalid argument"):
            await launch.pod("user", "net", mappings=Mappings(((0, 5, 5), (3, 50, 5)), ((0, 5, 5),)))
        await nothing_stays(launch)

    try:
        in_launch(tmp_path, body)
    finally:
        subprocess.run(["umount", ram], check=True)


def test_a_pod_whose_sysctl_fails(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        with pytest.raises(Exception, match=r"set sysctl net\.ipv4\.no_such_thing"):
            await launch.pod("user", "net", "ipc", mappings=POD, sysctls={"net.ipv4.no_such_thing": "1"})
        await launch.handler.remove_pod_namespaces("p0", None)
        await nothing_stays(launch)

    in_launch(tmp_path, body)


def test_a_terminal_of_an_exec(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, linux=user_namespace())
        masters: list[int] = []

        async def sink(master: int) -> None:
            masters.append(os.dup(master))
            launch.descriptors.append(masters[0])

        made = await launch.handler.exec(
            "e1",
            box.process,
            process(["sh", "-c", "stat -c %u $(tty)"], user={"uid": 44, "gid": 5}, terminal=True),
            cgroup=box.cgroup,
            stdin=0,
            stdout=1,
            stderr=2,
            tty_sink=sink,
        )
        launch.processes[made] = None
        await until(lambda: bool(select_readable(masters[0])), "output")
        assert os.read(masters[0], 100).split() == [b"44"]
        await launch.wait(made)

    in_launch(tmp_path, body)


def test_on_older_kernels_the_root_is_mounted_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mount(2), on idmapped layers: the same inside."""
    by_mount(monkeypatch)
    image = tmp_path / "a,b:c"
    image.mkdir()
    (image / "mine").touch()
    os.chown(image / "mine", 5, 5)

    async def body(launch: Launch) -> None:
        box = await launch.start(
            ["sh", "-c", "ls -ln /mine; echo x >/new; echo done >&2; sleep 1000"],
            linux=user_namespace(),
            lowers=[image],
        )
        assert await line(box, "stderr") == "done" and box.read().split()[2] == "5"
        assert (box.upper / "new").stat().st_uid == FIRST_ID
        lines = Path(f"/proc/{box.process.pid}/mountinfo").read_text().splitlines()
        assert [entry.split()[4] for entry in lines].count("/") == 1
        assert "lowerdir=l0:l1" in lines[0]

    in_launch(tmp_path, body)


def test_the_process_in_between_is_killed(tmp_path: Path) -> None:
    """While it hangs over a FIFO of which nobody has the other end: the start fails, and nothing stays."""

    async def body(launch: Launch) -> None:
        identity, overlay, _ = launch.place(stdin=True)
        fifo = launch.run_directory / "containers" / identity / "stdin"
        fifo.unlink()
        os.mkfifo(fifo)
        spec = launch.spec(SLEEP, linux=user_namespace(), stdin=True)
        starting = asyncio.ensure_future(
            launch.handler.start(identity, spec, overlay=overlay, cgroup=launch.cgroup(identity))
        )
        launcher = launch.pid_of("launcher")

        def hanging() -> list[int]:
            found = [process.pid for process in leaks.processes() if process.parent == launcher]
            return [pid for pid in found if Path(f"/proc/{pid}/wchan").read_text() == "wait_for_partner"]

        await until(lambda: hanging() != [], "its opening of the FIFO")
        os.kill(hanging()[0], 9)
        with pytest.raises(StartFailed, match="killed before it could start"):
            await starting
        await nothing_stays(launch)

    in_launch(tmp_path, body)


def test_a_launcher_that_dies_leaves_a_container_running(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(["sh", "-c", "sleep 1; exit 3"], linux=user_namespace())
        await launch.kill_ours("launcher")
        end = await launch.wait(box.process)
        assert (end.code, end.known) == (3, True)

    in_launch(tmp_path, body)


def test_limits_that_are_higher_than_ones_own(tmp_path: Path) -> None:
    """Where Tare may raise them they are raised before its privileges go; where not, that is a warning, as ever."""

    async def body(launch: Launch) -> None:
        own = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
        wanted = own + 4096 if own != resource.RLIM_INFINITY else 8192
        limits = [{"type": "RLIMIT_MEMLOCK", "soft": wanted, "hard": wanted}]
        box = await launch.start(SLEEP, linux=user_namespace(), rlimits=limits)
        text = Path(f"/proc/{box.process.pid}/limits").read_text()
        [row] = [row for row in text.splitlines() if row.startswith("Max locked memory")]
        expected = wanted if linux.capget() >> 24 & 1 or own == resource.RLIM_INFINITY else own
        assert row.split()[3:5] == [str(expected)] * 2

    in_launch(tmp_path, body)


def test_the_socket_of_a_pods_network(tmp_path: Path) -> None:
    """It was opened by root of the user namespace that owns the network: by it the node sets that up, and nothing else."""

    async def body(launch: Launch) -> None:
        (launch.run_directory / "pods/n").mkdir()
        made = await launch.handler.pod_namespaces(
            "n", kinds=frozenset({"user", "net"}), hostname="", sysctls={}, mappings=POD
        )
        try:
            assert made.netlink is not None
            with made.netlink as netlink:
                up = struct.pack(
                    "=IHHIIBxHiII", 32, 16, 5, 1, 0, 0, 0, 1, 1, 1
                )  # RTM_NEWLINK, request and ack: index 1 is up
                netlink.send(up)
                answer = netlink.recv(1 << 16)
            assert struct.unpack_from("=i", answer, 16) == (0,)
            box = await launch.start(SLEEP, linux=joined(made.pins))
            assert "LOOPBACK,UP" in (await launch.exec(box, ["ip", "link", "show", "lo"])).out
        finally:
            await launch.handler.remove_pod_namespaces("n", None)

    in_launch(tmp_path, body)


def test_hooks_see_the_child_by_the_nodes_pid(tmp_path: Path) -> None:
    """Those outside are in the node's namespaces; that of the container is root of the user namespace."""
    hook = tmp_path / "hook"
    hook.write_text("#!/bin/sh\n{ readlink /proc/self/ns/user; id -u; cat; } >$1/said-$2\n")
    hook.chmod(0o755)
    said = tmp_path / "said"
    said.mkdir()
    said.chmod(0o777)
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)

    async def body(launch: Launch) -> None:
        hooks = {
            point: [{"path": str(hook), "args": ["hook", str(said), point], "env": ["PATH=/usr/bin:/bin"]}]
            for point in ("createRuntime", "createContainer")
        }
        box = await launch.start(SLEEP, linux=user_namespace(), hooks=hooks)
        outside = (said / "said-createRuntime").read_text().splitlines()
        inside = (said / "said-createContainer").read_text().splitlines()
        assert outside[:2] == [os.readlink("/proc/self/ns/user"), "0"]
        assert json.loads(outside[2])["pid"] == box.process.pid
        assert (
            inside[:2] == [os.readlink(f"/proc/{box.process.pid}/ns/user"), "0"] and json.loads(inside[2])["pid"] == 1
        )

    in_launch(tmp_path, body)


@pytest.mark.parametrize("wanted", ["private", "shared", "rshared", "slave", "unbindable"])
def test_propagation_of_the_root(tmp_path: Path, wanted: str) -> None:
    """Shared is a group of its own, as without a user namespace; a mount made inside never comes out."""
    with mounted_tmpfs(tmp_path / "disk", linux.MS_SHARED):
        bundle = layer(tmp_path / "disk/rootfs")
        os.chown(bundle / "tmp", FIRST_ID, FIRST_ID)

        async def body(launch: Launch) -> None:
            box = await launch.start(
                SLEEP, bundle=bundle, linux=user_namespace() | {"rootfsPropagation": wanted}, capabilities=ALL
            )
            words = table(box)["/"].propagation
            assert any(word.startswith("shared:") for word in words) == (wanted in ("shared", "rshared"))
            assert any(word.startswith("master:") for word in words) == (wanted == "slave")
            assert ("unbindable" in words) == (wanted == "unbindable")
            tried = await launch.exec(box, ["mount", "-t", "tmpfs", "x", "/tmp"], capabilities=ALL)
            assert tried.code == 0 and "/tmp" in table(box) and mounts_below(tmp_path) == [str(tmp_path / "disk")]

        in_launch(tmp_path, body)
