"""Namespaces that a container joins by path, and what is set in those that are its own: names, sysctls, the loopback device."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tare.errors import InvalidArgument
from tare.handlers.builtin import StartFailed
from tare.handlers.plans import Directory
from tests.support.launch import Box, Launch, in_launch, layer, line, namespaces, standard_mounts, user_namespace
from tests.support.mounts import mount_table

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
KINDS = {"network": "net", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup", "pid": "pid"}


def inode(pid: int | str, kind: str) -> int:
    """What tells a process's namespace from others."""
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino


@pytest.mark.parametrize("user", [False, True])
def test_all_of_them_of_another_container(tmp_path: Path, user: bool) -> None:
    async def body(launch: Launch) -> None:
        first = await launch.start(SLEEP, linux=user_namespace() if user else {"namespaces": namespaces()})
        entry = f"/proc/{first.process.pid}/ns"
        paths: dict[str, Any] = {kind: f"{entry}/{file}" for kind, file in KINDS.items()}
        linux = user_namespace(f"{entry}/user", **paths) if user else {"namespaces": namespaces(**paths)}
        box = await launch.start(["sh", "-c", "ps -o pid,args; hostname; sleep 1000"], linux=linux)
        said = await line(box, count=4)
        assert "1 sleep 1000" in said
        for kind in (*KINDS.values(), "user"):
            assert inode(box.process.pid, kind) == inode(first.process.pid, kind), kind
        assert inode(box.process.pid, "mnt") != inode(first.process.pid, "mnt")

    in_launch(tmp_path, body, cgroups=True)


@pytest.mark.parametrize("user", [False, True])
def test_names(tmp_path: Path, user: bool) -> None:
    """Of a new UTS namespace and of one that is joined; without one they would be the node's."""

    async def body(launch: Launch) -> None:
        linux = user_namespace() if user else {"namespaces": namespaces()}
        script = "hostname; cat /proc/sys/kernel/domainname; sleep 1000"
        box = await launch.start(["sh", "-c", script], linux=linux, hostname="bundle", domainname="example.org")
        assert (await line(box, count=2)).split() == ["bundle", "example.org"]
        if not user:
            joined = {"namespaces": namespaces(uts=f"/proc/{box.process.pid}/ns/uts")}
            other = await launch.start(["sh", "-c", "hostname"], linux=joined, hostname="again")
            assert (await launch.finish(other)).out == "again\n"
            assert (await launch.exec(box, ["hostname"])).out == "again\n"
        for key in ("hostname", "domainname"):
            name: dict[str, Any] = {key: "x"}
            with pytest.raises(InvalidArgument, match=f"{key}: there is no UTS namespace"):
                await launch.start(SLEEP, linux={"namespaces": namespaces(uts=None)}, **name)
        assert os.uname().nodename not in ("bundle", "again")

    in_launch(tmp_path, body)


@pytest.mark.parametrize("user", [False, True])
def test_the_loopback_device_of_a_new_network_namespace(tmp_path: Path, user: bool) -> None:
    async def body(launch: Launch) -> None:
        linux = user_namespace() if user else {"namespaces": namespaces()}
        result = await launch.run(
            ["sh", "-c", "ip addr show lo; ping -c 1 -w 2 127.0.0.1 >/dev/null; echo $?"], linux=linux
        )
        assert "LOOPBACK,UP" in result.out and "inet 127.0.0.1/8" in result.out

    in_launch(tmp_path, body)


@pytest.mark.parametrize("user", [False, True])
def test_sysctls(tmp_path: Path, user: bool) -> None:
    async def body(launch: Launch) -> None:
        wanted = {
            "net.ipv4.ip_forward": "1",
            "net/ipv4/ip_unprivileged_port_start": "77",
            "kernel.shmmni": "123",
            "fs.mqueue.msg_max": "17",
            "kernel.domainname": "by.sysctl",
        }
        linux = user_namespace() if user else {"namespaces": namespaces()}
        files = (
            "net/ipv4/ip_forward net/ipv4/ip_unprivileged_port_start kernel/shmmni fs/mqueue/msg_max kernel/domainname"
        )
        before = [Path(f"/proc/sys/{file}").read_text() for file in files.split()]
        result = await launch.run(["sh", "-c", f"cd /proc/sys; cat {files}"], linux=linux | {"sysctl": wanted})
        assert result.out.split() == ["1", "77", "123", "17", "by.sysctl"], result
        assert [Path(f"/proc/sys/{file}").read_text() for file in files.split()] == before

    in_launch(tmp_path, body)


@pytest.mark.parametrize(
    ("name", "value", "without", "words"),
    [
        ("vm.swappiness", "1", "", "is not of a namespace"),
        ("kernel.panic", "1", "", "is not of a namespace"),
        ("kernel.hostname", "x", "", "is set by `hostname`"),
        ("kernel.domainname", "x", "uts", "is not of a namespace"),
        ("net.ipv4.ip_forward", "1", "network", "the node's own network namespace"),
        ("kernel.shmmax", "1", "ipc", "the node's own ipc namespace"),
        ("fs.mqueue.msg_max", "1", "ipc", "the node's own ipc namespace"),
        ("fs.file-max", "1", "", "is not of a namespace"),
        ("net.ipv4.ip_forward", 1, "", "is not a string"),
        ("net.ipv4/../../../kernel.panic", "1", "", "is no name of a sysctl"),
        ("net..ipv4", "1", "", "is no name of a sysctl"),
    ],
)
def test_sysctls_that_are_refused(tmp_path: Path, name: str, value: Any, without: str, words: str) -> None:
    async def body(launch: Launch) -> None:
        linux = {"namespaces": namespaces(**{without: None} if without else {}), "sysctl": {name: value}}
        with pytest.raises(InvalidArgument) as caught:
            await launch.start(SLEEP, linux=linux)
        assert words in str(caught.value) and f'linux.sysctl["{name}"]' in str(caught.value)

    in_launch(tmp_path, body)


@asynccontextmanager
async def elsewhere(directory: Path) -> AsyncIterator[int]:
    """A process in a mount namespace of its own, which has a tmpfs at a directory, with a root file system in it."""
    script = f"mount -t tmpfs own {directory} && echo ready && exec sleep 1000"
    with subprocess.Popen(["unshare", "-m", "sh", "-c", script], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            root = layer(Path(f"/proc/{process.pid}/root{directory}/rootfs"))
            os.mknod(root / "dev/null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            yield process.pid
        finally:
            process.kill()


def test_a_mount_namespace_that_is_joined_stays_as_it_is(tmp_path: Path) -> None:
    """The root is a directory of it; nothing is mounted, and who lives there sees no change."""
    place = tmp_path / "place"
    place.mkdir()

    async def body(launch: Launch) -> None:
        async with elsewhere(place) as pid:
            before = mount_table(Path(f"/proc/{pid}/mountinfo").read_text())
            spec = launch.spec(
                ["sh", "-c", "echo x >/etc/made; ls /; sleep 1000"],
                linux={"namespaces": namespaces(mount=f"/proc/{pid}/ns/mnt"), "maskedPaths": [], "readonlyPaths": []},
            )
            spec["mounts"] = []
            identity, overlay, _ = launch.place()
            with pytest.raises(InvalidArgument, match="layers cannot be mounted"):
                await launch.handler.start(identity, spec, overlay=overlay, cgroup=launch.cgroup(identity))
            box = await started(launch, spec, place / "rootfs")
            assert set((await line(box, count=7)).split()) == {"bin", "dev", "etc", "proc", "root", "sys", "tmp"}
            assert inode(box.process.pid, "mnt") == inode(pid, "mnt")
            assert Path(f"/proc/{pid}/root{place}/rootfs/etc/made").read_text() == "x\n"
            assert os.readlink(f"/proc/{box.process.pid}/root") == str(place / "rootfs")
            assert mount_table(Path(f"/proc/{pid}/mountinfo").read_text()) == before
            assert not (place / "rootfs").exists()
            for change, path in (
                ({"mounts": standard_mounts()}, "mounts"),
                ({"root": {"readonly": True}}, r"root\.readonly"),
                ({"linux": spec["linux"] | {"maskedPaths": ["/x"]}}, r"linux\.maskedPaths"),
            ):
                with pytest.raises(InvalidArgument, match=f"read {path}: the mount namespace is joined"):
                    await started(launch, spec | change, place / "rootfs")
            with pytest.raises(StartFailed, match="open the root file system"):
                await started(launch, spec, place / "none")

    in_launch(tmp_path, body, cgroups=True)


async def started(launch: Launch, spec: dict[str, Any], root: Path) -> Box:
    """A container from a whole specification."""
    identity, overlay, ends = launch.place()
    cgroup = launch.cgroup(identity)
    made = await launch.handler.start(identity, spec, overlay=Directory(str(root)), cgroup=cgroup)
    launch.processes[made] = None
    return Box(id=identity, process=made, upper=overlay.upper, cgroup=cgroup, streams=ends)
