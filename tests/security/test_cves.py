"""Each hole that was found in a container runtime before, tried against this one. The names are those of the CVE list."""

from __future__ import annotations

import ctypes
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tare.errors import InvalidArgument
from tare.handlers.builtin import Process, StartFailed
from tare.launch import linux, mounts
from tests.support.launch import (
    Box,
    Launch,
    bind,
    in_launch,
    line,
    namespaces,
    standard_mounts,
    status,
    until,
)
from tests.support.mounts import mount_table, mounts_below
from tests.support.trace import Call, Trace

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
SPEAK = ["sh", "-c", "echo up; sleep 1000"]


def image(tmp_path: Path, *directories: str) -> Path:
    """A layer to lay traps in."""
    root = tmp_path / "image"
    for name in ("", *directories):
        (root / name).mkdir(parents=True, exist_ok=True)
    return root


async def started_with(launch: Launch, spec: dict[str, Any], *lowers: Path) -> Process:
    """A container of a configuration made by hand."""
    identity, overlay, _ = launch.place(lowers=lowers)
    made = await launch.handler.start(identity, spec, overlay=overlay, cgroup=launch.cgroup(identity))
    launch.processes[made] = None
    return made


# CVE-2019-14271, and what else an image may have ready for a program that looks things up in it

BAIT = """
import os
os.close(os.open("/pwned", os.O_CREAT | os.O_WRONLY))
"""
BAITS = (
    "encodings.py",
    "os.py",
    "usr/lib/python3.11/encodings/__init__.py",
    "usr/lib/python3.11/linecache.py",
    "usr/lib/python311.zip",
    "usr/lib/python3.11/sitecustomize.py",
    "usr/lib/python3.11/usercustomize.py",
    "usr/lib/python3/dist-packages/sitecustomize.py",
    "usr/lib/python3.11/lib-dynload/_ctypes.cpython-311-x86_64-linux-gnu.so",
    "root/.local/lib/python3.11/site-packages/usercustomize.py",
    "work/encodings.py",
    "work/traceback.py",
    "work/json.py",
    "work/sitecustomize.py",
    "work/usercustomize.py",
    "work/_ctypes.cpython-311-x86_64-linux-gnu.so",
    "work/libc.so.6",
    "work/tare/launch/steps.py",
    "work/pyvenv.cfg",
    "etc/ld.so.preload",
    "etc/ld.so.cache",
    "etc/nsswitch.conf",
    "etc/localtime",
    "etc/group",
    "lib/x86_64-linux-gnu/libnss_files.so.2",
    "lib/x86_64-linux-gnu/libc.so.6",
    "lib/x86_64-linux-gnu/libgcc_s.so.1",
    "usr/lib/locale/locale-archive",
    "usr/lib/x86_64-linux-gnu/gconv/gconv-modules",
)


def before_execve(calls: list[Call]) -> list[Call]:
    """What a process does until it becomes the container's program."""
    ends = [index for index, call in enumerate(calls) if call.name == "execve" and call.result == "0"]
    return calls[: ends[0]] if ends else calls


def test_cve_2019_14271_nothing_of_the_image_is_loaded(tmp_path: Path) -> None:
    """No library, no module, no list of users (a million lines of it): not at a start, not at an exec, not at a failure."""
    root = image(tmp_path)
    for name in BAITS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(BAIT)
    with (root / "etc/passwd").open("w") as file:
        file.writelines(f"user{number}:x:{number}:{number}::/:/bin/sh\n" for number in range(1_000_000))

    async def body(launch: Launch) -> None:
        environment = ["PATH=/bin", "PYTHONPATH=/work", "PYTHONHOME=/usr", "PYTHONSTARTUP=/os.py", "LD_PRELOAD=/x.so"]
        environment += ["LD_LIBRARY_PATH=/work", "LD_AUDIT=/x.so", "PYTHONUSERBASE=/root/.local", "GCONV_PATH=/work"]
        changes: dict[str, Any] = {"cwd": "/work", "env": environment, "user": {"uid": 1000, "gid": 1000}}
        async with Trace(launch.pid_of("launcher"), tmp_path / "trace") as trace:
            box = await launch.start(SPEAK, lowers=[root], **changes)
            assert await line(box) == "up"
            assert (await launch.exec(box, ["true"], **changes)).code == 0
            for wrong in ({"args": ["/etc/passwd"]}, {"args": SLEEP, "cwd": "/etc/passwd"}):
                with pytest.raises(StartFailed):
                    await launch.start(**({"lowers": [root]} | changes | wrong))
        assert not (box.upper / "pwned").exists()
        baits = {Path(name).name for name in (*BAITS, "etc/passwd", "x.so")}
        for pid, calls in trace.calls().items():
            for call in before_execve(calls):
                opened = call.name in ("open", "openat", "openat2", "readlink", "newfstatat", "access") and call.words
                fine = not opened or Path(call.words[0]).name not in baits or call.words[0] == "etc/passwd"
                assert fine, f"process {pid}: {call}"

    in_launch(tmp_path, body)


# CVE-2019-16884, CVE-2019-19921, CVE-2023-28642, CVE-2025-52881: a /proc that is not the kernel's


@pytest.mark.parametrize("destination", ["/proc", "/proc/", "//proc", "/x/../proc", "/proc/self/attr", "/proc/sys"])
def test_cve_2019_16884_a_volume_on_proc(tmp_path: Path, destination: str) -> None:
    """A directory of anything else, a part of a real one, and another file system."""

    async def body(launch: Launch) -> None:
        (tmp_path / "fake/self/attr").mkdir(parents=True)
        for source in (tmp_path / "fake", "/proc/tty", "/proc/self/attr"):
            with pytest.raises((InvalidArgument, StartFailed), match="/proc"):
                await launch.start(SLEEP, mounts=[bind(destination, source)])
        tmpfs = {"destination": destination, "type": "tmpfs", "source": "tmpfs"}
        with pytest.raises(InvalidArgument, match="/proc"):
            await launch.start(SLEEP, mounts=[tmpfs])

    in_launch(tmp_path, body)


@pytest.mark.parametrize("inner", ["", "/self", "/self/attr", "/1/attr", "/sys/kernel", "/sysvipc"])
def test_cve_2019_16884_a_volume_on_a_link_to_proc(tmp_path: Path, inner: str) -> None:
    """The image decides where a harmless destination leads to."""
    root = image(tmp_path, "srv")
    (root / "srv/data").symlink_to(f"/proc{inner}")
    (root / "srv/up").symlink_to(f"../../../proc{inner}")

    async def body(launch: Launch) -> None:
        (tmp_path / "fake").mkdir()
        for name in ("data", "up"):
            with pytest.raises(StartFailed) as caught:
                await launch.start(SLEEP, lowers=[root], mounts=[bind(f"/srv/{name}", tmp_path / "fake")])
            assert caught.value.step == f"mount /srv/{name}" and caught.value.errno in (1, 2, 40), caught.value

    in_launch(tmp_path, body)


@pytest.mark.parametrize("name", ["proc", "sys", "dev"])
@pytest.mark.parametrize("target", ["/tmp/fake", "tmp", "/", "/proc", "/dev"])
def test_cve_2019_19921_and_2023_28642_links_in_the_place_of_proc_sys_and_dev(
    tmp_path: Path, name: str, target: str
) -> None:
    root = image(tmp_path, "tmp/fake")

    async def body(launch: Launch) -> None:
        (launch.layer / name).rmdir()
        (launch.layer / name).symlink_to(target)
        with pytest.raises(StartFailed) as caught:
            await launch.start(SLEEP, lowers=[root])
        assert (caught.value.step, caught.value.errno) == (f"mount /{name}", 40)

    in_launch(tmp_path, body)


def test_cve_2025_52881_nothing_is_written_by_a_path_that_the_container_decides_on(tmp_path: Path) -> None:
    """What goes into /proc or /sys is written while they are the node's own: before the first thing of the container's is mounted."""
    root = image(tmp_path, "sys")

    async def body(launch: Launch) -> None:
        pod = await launch.pod("net", "uts", sysctls={"net.ipv4.ip_unprivileged_port_start": "0"})
        joined = {"namespaces": namespaces(network=pod.pins["net"], uts=pod.pins["uts"])}
        async with Trace(launch.pid_of("launcher"), tmp_path / "trace") as trace:
            box = await launch.start(SPEAK, lowers=[root], linux=joined, oomScoreAdj=5)
            assert await line(box) == "up"
            made = await launch.begin_exec(box, SLEEP, launch.descriptors[0], oomScoreAdj=6)
            await until(lambda: Path(f"/proc/{made.pid}/comm").read_text() == "sleep\n", "its execve")
        for pid, calls in trace.calls().items():
            if pid == launch.pid_of("launcher"):
                continue
            own = before_execve(calls)
            names = [call.name for call in own]
            entered = names.index("setns") if pid != box.process.pid and "setns" in names else len(own)
            cut = next((i for i, call in enumerate(own) if "MS_SLAVE" in call.arguments), entered)
            written = [call for call in own[cut:] if call.name in ("write", "pwrite64", "writev")]
            assert written == [], f"process {pid}: {written}"
            opened = [call for call in own[cut:] if call.name in ("open", "openat", "openat2")]
            assert not [call for call in opened if "O_WRONLY" in call.arguments and "O_EXCL" not in call.arguments]

    in_launch(tmp_path, body, cgroups=True)


# CVE-2021-30465, CVE-2024-45310: links exchanged while a target is looked for


@contextmanager
def exchanging(one: Path, other: Path) -> Iterator[list[int]]:
    """Two names swapped over and over by a thread; the number of times is the list's only entry."""
    count, stop = [0], threading.Event()
    libc = ctypes.CDLL(None)

    def swap() -> None:
        while not stop.is_set():
            libc.renameat2(-100, bytes(one), -100, bytes(other), 2)  # RENAME_EXCHANGE
            count[0] += 1

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield count
    finally:
        stop.set()
        thread.join()


def test_cve_2021_30465_and_2024_45310_targets_that_become_links_meanwhile(tmp_path: Path) -> None:
    """A volume that two containers share, in which one swaps the other's mount point for a link out of it."""
    outside, volume, data = tmp_path / "outside", tmp_path / "volume", tmp_path / "data"
    for directory in (outside, volume / "target", data):
        directory.mkdir(parents=True)
    (data / "mark").write_text("data\n")
    (volume / "link").symlink_to(outside)

    async def body(launch: Launch) -> None:
        outcomes = set()
        with exchanging(volume / "target", volume / "link") as count:
            for _ in range(25):
                mounts = [
                    bind("/volume", volume),
                    bind("/volume/target", data),
                    bind("/volume/target/made/file", data / "mark"),
                ]
                try:
                    box = await launch.start(SLEEP, mounts=mounts)
                except StartFailed as error:
                    outcomes.add(error.step)
                else:
                    outcomes.add("started")
                    await launch.kill(box)
        assert count[0] > 100 and "started" in outcomes, outcomes
        assert os.listdir(outside) == [] and mounts_below(tmp_path) == []
        assert set(os.listdir(data)) <= {"mark", "made"}

    in_launch(tmp_path, body)


def test_cve_2024_45310_nothing_is_made_outside(tmp_path: Path) -> None:
    """Links that lead up and out, in each part of a destination: files and directories are made beneath the root."""
    outside = tmp_path / "outside"
    outside.mkdir()
    root = image(tmp_path, "srv")
    ups = "../" * 40
    (root / "srv/absolute").symlink_to(outside)
    (root / "srv/relative").symlink_to(f"{ups}{str(outside)[1:]}")
    (root / "srv/last").symlink_to(f"{outside}/created")
    (root / "srv/chain").symlink_to("absolute")

    async def body(launch: Launch) -> None:
        (tmp_path / "file").write_text("x")
        destinations = ["/srv/absolute/a", "/srv/relative/b/c", "/srv/last", "/srv/chain/d", f"/srv/{ups}{outside}/e"]
        mounts = [bind(destination, tmp_path / "file") for destination in destinations]
        box = await launch.start(SLEEP, lowers=[root], mounts=mounts, cwd="/srv/absolute/cwd/made")
        assert os.listdir(outside) == []
        below = box.upper / str(outside)[1:]
        assert {entry.name for entry in below.iterdir()} == {"a", "b", "created", "d", "e", "cwd"}
        points = mount_table(Path(f"/proc/{box.process.pid}/mountinfo").read_text())
        assert {f"{outside}/{name}" for name in ("a", "b/c", "created", "d", "e")} <= set(points)

    in_launch(tmp_path, body)


def test_a_target_that_leads_to_the_root(tmp_path: Path) -> None:
    root = image(tmp_path)
    (root / "self").symlink_to("/")

    async def body(launch: Launch) -> None:
        for destination in ("/self", "/self/self"):
            with pytest.raises(StartFailed, match="leads to the root"):
                await launch.start(SLEEP, lowers=[root], mounts=[bind(destination, tmp_path)])

    in_launch(tmp_path, body)


# CVE-2022-29162: capabilities that come back through inheritable file capabilities


def test_cve_2022_29162_inheritable_capabilities_are_empty(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        for user in ({"uid": 0, "gid": 0}, {"uid": 1000, "gid": 1000}):
            box = await launch.start(SLEEP, user=user)
            facts = status(Path(f"/proc/{box.process.pid}/status").read_text())
            assert facts["CapInh"] == facts["CapAmb"] == "0" * 16
            result = await launch.exec(box, ["grep", "CapInh", "/proc/self/status"], user=user)
            assert result.out.split() == ["CapInh:", "0" * 16]

    in_launch(tmp_path, body)


# CVE-2024-21626: a working directory that is a descriptor of the node's


def test_cve_2024_21626_working_directories_through_descriptors(tmp_path: Path) -> None:
    root = image(tmp_path)
    for number in range(3, 16):
        (root / f"fd{number}").symlink_to(f"/proc/self/fd/{number}")
    magic = [f"/proc/self/fd/{number}" for number in range(3, 16)]
    magic += [f"{path}/../.." for path in magic[:6]] + ["/proc/self/cwd", "/proc/self/root", "/proc/1/root/etc"]
    magic += [f"/fd{number}" for number in range(3, 16)]

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, lowers=[root])
        for path in magic:
            with pytest.raises(StartFailed) as caught:
                await launch.start(SLEEP, lowers=[root], cwd=path)
            errors = [caught.value]
            with pytest.raises(StartFailed) as caught:
                await launch.exec(box, ["pwd"], cwd=path)
            errors.append(caught.value)
            for error in errors:
                assert error.step == "change to the working directory" and error.errno in (1, 2, 13, 20, 40), (
                    path,
                    error,
                )
        # And there is nothing that it could have led to: what is open is closed before the program runs.
        result = await launch.exec(box, ["sh", "-c", "ls /proc/self/fd; cd /proc/self/fd/7"])
        assert result.out.startswith("0\n1\n2\n3\nsh:") and result.code != 0

    in_launch(tmp_path, body)


# CVE-2025-31133, CVE-2025-52565: devices of the image in the place of ours


def without(*destinations: str) -> list[dict[str, Any]]:
    """A container's mounts but for some."""
    return [mount for mount in standard_mounts() if mount["destination"] not in destinations]


def test_cve_2025_31133_a_null_device_of_the_images_making(tmp_path: Path) -> None:
    """It would be bound over masked paths, or it would be what stdin is."""
    target = tmp_path / "target"
    target.write_text("of the node\n")
    root = image(tmp_path, "dev")
    (root / "dev/null").symlink_to("/proc/sys/kernel/core_pattern")

    async def body(launch: Launch) -> None:
        fine = await launch.start(SLEEP, lowers=[root])  # a /dev of our making hides it
        assert stat.S_ISCHR(Path(f"/proc/{fine.process.pid}/root/dev/null").lstat().st_mode)
        no_dev = launch.spec(SLEEP) | {"mounts": without("/dev", "/dev/pts", "/dev/mqueue")}
        with pytest.raises(StartFailed) as caught:
            await started_with(launch, no_dev, root)
        assert caught.value.step == "connect the streams" and "is not the device 1:3" in str(caught.value)
        with pytest.raises(StartFailed) as caught:  # a volume over the device that masks are made of
            await launch.start(SLEEP, mounts=[bind("/dev/null", target)])
        assert caught.value.step == "open the null device" and "is not the device 1:3" in str(caught.value)
        assert target.read_text() == "of the node\n" and target.stat().st_uid == 0
        wanted = await launch.start(SLEEP, mounts=[bind("/dev/random", "/dev/urandom")])  # but devices may be exchanged
        assert Path(f"/proc/{wanted.process.pid}/root/dev/random").stat().st_rdev == os.makedev(1, 9)

    in_launch(tmp_path, body)


def test_cve_2025_31133_masks_reach_what_they_hide_by_no_link(tmp_path: Path) -> None:
    """A masked path that is a link in the image hides what it leads to in the image, and nothing else."""
    root = image(tmp_path, "srv")
    outside = tmp_path / "outside"
    outside.write_text("seen\n")
    (root / "srv/hidden").symlink_to(outside)
    (root / "srv/magic").symlink_to("/proc/self/root")

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, lowers=[root], linux={"maskedPaths": ["/srv/hidden"]})
        assert outside.read_text() == "seen\n" and launch.handler.alive(box.process)
        with pytest.raises(StartFailed) as caught:
            await launch.start(SLEEP, lowers=[root], linux={"maskedPaths": ["/srv/magic/etc"]})
        assert caught.value.step == "mask /srv/magic/etc"
        with pytest.raises(StartFailed) as caught:
            await launch.start(SLEEP, lowers=[root], linux={"readonlyPaths": ["/srv/magic/etc"]})
        assert caught.value.step == "make /srv/magic/etc read-only"

    in_launch(tmp_path, body)


@pytest.mark.parametrize("name", ["console", "pts/ptmx", "pts"])
def test_cve_2025_52565_a_console_or_multiplexer_that_is_a_link(tmp_path: Path, name: str) -> None:
    """The terminal would be bound where the link leads, or a file of the image taken for a terminal."""
    root = image(tmp_path, "dev/pts", "srv/pts")
    (root / "srv/pts/ptmx").write_text("")
    if name == "pts":
        (root / "dev/pts").rmdir()
    (root / "dev" / name).symlink_to("/srv/pts" if name == "pts" else "/proc/sysrq-trigger")

    async def body(launch: Launch) -> None:
        mounts = without("/dev", "/dev/mqueue") if name == "console" else without("/dev", "/dev/mqueue", "/dev/pts")
        with pytest.raises(StartFailed) as caught:
            await started_with(launch, launch.spec(SLEEP, terminal=True) | {"mounts": mounts}, root)
        assert caught.value.step == "open a terminal" and caught.value.errno in (19, 20, 40), caught.value
        if name == "console":
            return  # which an exec has none of
        null = {"path": "/dev/null", "type": "c", "major": 1, "minor": 3}
        spec = launch.spec(SLEEP, linux={"devices": [null]}) | {"mounts": mounts}
        made = await started_with(launch, spec, root)
        box = Box(id="c", process=made, upper=root, cgroup=launch.cgroup("c"))
        with pytest.raises(StartFailed) as caught:
            await launch.exec(box, ["true"], terminal=True)
        assert caught.value.step == "open a terminal" and caught.value.errno in (19, 20, 40), caught.value

    in_launch(tmp_path, body)


def test_cve_2025_52565_a_device_exchanged_between_the_look_and_the_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a container that runs can do it, while a terminal for an exec in it is opened."""
    for name, number in (("ptmx", 3), ("other", 5)):
        os.mknod(tmp_path / name, stat.S_IFCHR | 0o666, os.makedev(1, number))
    openat2, flags = linux.openat2, os.O_RDWR | os.O_NOCTTY

    def exchanged(*arguments: Any) -> int:
        found = openat2(*arguments)
        (tmp_path / "other").rename(tmp_path / "ptmx")
        monkeypatch.setattr(linux, "openat2", openat2)
        return found

    os.close(mounts.open_device(-100, bytes(tmp_path / "ptmx"), mounts.NULL_DEVICE, flags, 0))
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(linux, "openat2", exchanged)
    with pytest.raises(OSError, match="is not the device 1:3"):
        mounts.open_device(-100, bytes(tmp_path / "ptmx"), mounts.NULL_DEVICE, flags, 0)
    assert os.listdir("/proc/self/fd") == before
