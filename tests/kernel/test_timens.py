"""Time namespaces: clocks of a container's own, made with offsets or joined, beside whatever other namespaces it has."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from tare.errors import InvalidArgument
from tare.handlers.builtin import StartFailed
from tests.support.launch import Box, Launch, in_launch, line, namespaces, until, user_namespace

pytestmark = pytest.mark.root

OFFSETS = {"monotonic": {"secs": 86400, "nanosecs": 500}, "boottime": {"secs": 864000}}
SPEAK = ["sh", "-c", "cat /proc/self/timens_offsets; cut -d. -f1 /proc/uptime; sleep 1000"]


def with_time(linux: dict[str, Any], path: Path | str = "", offsets: dict[str, Any] | None = None) -> dict[str, Any]:
    """A linux object with a time namespace too."""
    own = {"type": "time", "path": str(path)} if path else {"type": "time"}
    changed = linux | {"namespaces": [*linux["namespaces"], own]}
    return changed | ({"timeOffsets": offsets} if offsets else {})


def parts(user: bool, **paths: Any) -> dict[str, Any]:
    """A linux object, with a user namespace or without."""
    return user_namespace(**paths) if user else {"namespaces": namespaces(**paths)}


def inode(box: Box, kind: str = "time") -> int:
    """What tells its namespace from others."""
    return os.stat(f"/proc/{box.process.pid}/ns/{kind}").st_ino


@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_offsets(tmp_path: Path, user: bool, shared: bool) -> None:
    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid") if shared and not user else None
        paths = {"pid": pod.pins["pid"]} if pod else {}
        box = await launch.start(SPEAK, linux=with_time(parts(user, **paths), offsets=OFFSETS))
        said = (await line(box, count=3)).splitlines()
        assert [entry.split() for entry in said[:2]] == [["monotonic", "86400", "500"], ["boottime", "864000", "0"]]
        assert 864000 <= int(said[2]) - time.clock_gettime(time.CLOCK_BOOTTIME) + 1 < 864030
        assert inode(box) != os.stat("/proc/self/ns/time").st_ino
        result = await launch.exec(box, ["sh", "-c", "cut -d. -f1 /proc/uptime"])
        assert int(result.out) >= 864000

    in_launch(tmp_path, body, cgroups=True)


@pytest.mark.parametrize("user", [False, True])
def test_one_without_offsets_and_one_that_is_joined(tmp_path: Path, user: bool) -> None:
    async def body(launch: Launch) -> None:
        first = await launch.start(SPEAK, linux=with_time(parts(False), offsets={"boottime": {"secs": 5000}}))
        path = f"/proc/{first.process.pid}/ns/time"
        second = await launch.start(SPEAK, linux=with_time(parts(user), path))
        said = (await line(second, count=3)).splitlines()
        assert said[1].split() == ["boottime", "5000", "0"] and inode(second) == inode(first)
        third = await launch.start(SPEAK, linux=with_time(parts(user)))
        assert inode(third) not in (inode(first), os.stat("/proc/self/ns/time").st_ino)

    in_launch(tmp_path, body)


@pytest.mark.parametrize(
    ("offsets", "path"),
    [
        ({"realtime": {"secs": 1}}, "linux.timeOffsets.realtime"),
        ({"boottime": {"secs": "x"}}, "linux.timeOffsets.boottime.secs"),
        ({"boottime": {"nanosecs": 1_000_000_000}}, "linux.timeOffsets.boottime.nanosecs"),
    ],
)
def test_offsets_that_cannot_be(tmp_path: Path, offsets: dict[str, Any], path: str) -> None:
    async def body(launch: Launch) -> None:
        with pytest.raises(InvalidArgument, match=path):
            await launch.start(SPEAK, linux=with_time(parts(False), offsets=offsets))

    in_launch(tmp_path, body)


def test_offsets_without_a_new_namespace_and_ones_that_the_kernel_refuses(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        for linux in (
            parts(False) | {"timeOffsets": OFFSETS},
            with_time(parts(False), "/proc/self/ns/time", OFFSETS),
        ):
            with pytest.raises(InvalidArgument, match=r"linux\.timeOffsets: there is no new time namespace"):
                await launch.start(SPEAK, linux=linux)
        with pytest.raises(StartFailed) as caught:
            past = {"monotonic": {"secs": -(10**9)}}
            await launch.start(SPEAK, linux=with_time(parts(False), offsets=past))
        assert (caught.value.step, caught.value.errno) == ("make a time namespace", 34)
        await until(lambda: not list((launch.run_directory / "tasks").iterdir()), "no marker")

    in_launch(tmp_path, body)
