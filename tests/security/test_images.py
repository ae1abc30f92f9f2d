"""Images laid out to mislead: links and devices where a runtime expects directories and files, and files that have no end."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tare.errors import InvalidArgument
from tare.handlers.builtin import Process, StartFailed
from tare.runtime.users import FILE_LIMIT, resolve_user
from tare.storage import union
from tests.support.launch import Launch, bind, in_launch, standard_mounts
from tests.support.mounts import mount_table, mounts_below

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
OF_THE_POD = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/termination-log")


def outside_of(tmp_path: Path) -> Path:
    """A directory of the node that no container has a mount of, with what an image would like to reach."""
    outside = tmp_path / "outside"
    for name in ("hosts", "hostname", "resolv.conf", "termination-log", "null", "console"):
        (outside / name).parent.mkdir(exist_ok=True)
        (outside / name).write_text("of the node\n")
    for name in ("shm", "pts", "mqueue"):
        (outside / name).mkdir()
    return outside


def assert_untouched(outside: Path) -> None:
    """Nothing was made, written, given away or mounted there."""
    files = {entry.name: entry for entry in outside.iterdir()}
    assert len(files) == 9 and mounts_below(outside) == []
    for entry in files.values():
        status = entry.stat()
        assert (status.st_uid, stat.S_IMODE(status.st_mode)) in ((0, 0o644), (0, 0o755)), entry
        assert list(entry.iterdir()) == [] if entry.is_dir() else entry.read_text() == "of the node\n"


@pytest.mark.parametrize("kind", ["directory", "files", "up", "dangling"])
def test_the_files_of_a_pod_stay_in_the_container(tmp_path: Path, kind: str) -> None:
    """/etc, or a file in it, is a link to the node's: what is mounted there is mounted in the root file system, or nowhere."""
    outside = outside_of(tmp_path)
    image = tmp_path / "image"
    (image / "dev").mkdir(parents=True)
    if kind == "directory":
        (image / "etc").symlink_to(outside)
    else:
        (image / "etc").mkdir()
        above = {"files": "", "up": "/../../../../../..", "dangling": "/not/there/.."}[kind]
        for name in OF_THE_POD[:3]:
            (image / name[1:]).symlink_to(f"{above}{outside}/{Path(name).name}")

    async def body(launch: Launch) -> None:
        (launch.layer / "etc").rmdir()
        (tmp_path / "file").write_text("of the pod\n")
        mounts = [bind(path, tmp_path / "file") for path in OF_THE_POD]
        box = await launch.start(SLEEP, lowers=[image], mounts=mounts)
        reads = await launch.exec(
            box, ["sh", "-c", "cat /etc/hosts /etc/hostname /etc/resolv.conf; echo more >>/etc/hosts"]
        )
        assert reads.out == "of the pod\n" * 3
        assert (tmp_path / "file").read_text() == "of the pod\nmore\n"

    in_launch(tmp_path, body)
    assert_untouched(outside)


@pytest.mark.parametrize("name", ["shm", "pts", "mqueue", "null", "console", "termination-log", "fd", "ptmx", "stdout"])
def test_a_dev_of_the_images_own_leads_nowhere(tmp_path: Path, name: str) -> None:
    """Without a new /dev the image's is used, and each of its names may be a link."""
    outside = outside_of(tmp_path)
    image = tmp_path / "image"
    (image / "dev").mkdir(parents=True)
    (image / "dev" / name).symlink_to(outside / name)

    async def body(launch: Launch) -> None:
        (tmp_path / "file").write_text("")
        own = [mount for mount in standard_mounts() if mount["destination"] != "/dev"]
        shm = {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["mode=1777", "size=65536"]}
        for terminal in (False, True):
            spec = launch.spec(SLEEP, terminal=terminal)
            spec["mounts"] = [*own, shm, bind("/dev/termination-log", tmp_path / "file")]
            spec["linux"]["devices"] = [{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}]
            made = await started(launch, spec, image)
            if made is not None:
                points = mount_table(Path(f"/proc/{made.pid}/mountinfo").read_text())
                assert {f"/dev/{point}" for point in ("shm", "mqueue")} <= {*points, f"/dev/{name}"}
                assert not os.path.samefile(f"/proc/{made.pid}/root/", "/")

    in_launch(tmp_path, body)
    assert_untouched(outside)


async def started(launch: Launch, spec: dict[str, Any], *lowers: Path) -> Process | None:
    """A container of a configuration made by hand; None where it is refused, at a step that says what it was about."""
    identity, overlay, _ = launch.place(lowers=lowers)
    try:
        made = await launch.handler.start(identity, spec, overlay=overlay, cgroup=launch.cgroup(identity))
    except StartFailed as error:
        assert str(error.step).startswith(("mount /dev", "open a terminal", "connect the streams", "open the null")), (
            error
        )
        return None
    launch.processes[made] = None
    return made


# What the daemon itself reads of an image, without a process that could be given up


def device(major: int, minor: int) -> Callable[[Path], None]:
    return lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))


def endless(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"a:x:")
        file.truncate(1 << 40)


def huge(path: Path) -> None:
    with path.open("w") as file:
        file.writelines(f"user{number}:x:{number}:{number}::/:/bin/sh\n" for number in range(1_000_000))


STRANGE: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "zeros": device(1, 5),
    "random numbers": device(1, 8),
    "a terminal": device(5, 0),
    "no device": device(4095, 77),
    "a directory": os.mkdir,
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to this process": lambda path: path.symlink_to("/proc/self/environ"),
    "a link to a descriptor": lambda path: path.symlink_to("/proc/self/fd/0"),
    "a link to itself": lambda path: path.symlink_to("passwd"),
    "a link to the node's": lambda path: path.symlink_to("../../../../../../../../etc/shadow"),
    "a line of a terabyte": endless,
    "a million lines": huge,
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_list_of_users_that_is_none(tmp_path: Path, kind: str) -> None:
    """It is read to a bound, or not at all; numbers need no list, a name is not found."""
    for name in ("passwd", "group"):
        (tmp_path / "etc").mkdir(exist_ok=True)
        STRANGE[kind](tmp_path / "etc" / name)
    if kind == "a link to itself":
        with pytest.raises(OSError, match="symbolic links"):
            union.read([tmp_path], "/etc/passwd", FILE_LIMIT)
        return
    start = time.process_time()
    passwd, group = (union.read([tmp_path], f"/etc/{name}", FILE_LIMIT) for name in ("passwd", "group"))
    assert (passwd is None) == (kind not in ("a line of a terabyte", "a million lines"))
    assert resolve_user(passwd=passwd, group=group, image_user="4711:4712").user.uid == 4711
    with pytest.raises(InvalidArgument, match="there is no user 'web'"):
        resolve_user(passwd=passwd, group=group, image_user="web")
    assert time.process_time() - start < 1
