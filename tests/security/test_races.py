"""What a neighbour exchanges, and who dies, while a container or an exec is being made: each of many rounds ends well or with a clear error."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tare.errors import FailedPrecondition, TareError
from tare.handlers.builtin import StartFailed
from tests.support.launch import Box, Launch, bind, in_launch, namespaces, until
from tests.support.mounts import mounts_below

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
ROUNDS = 40
STEPS = ("mount /volume/", "mask /volume/", "make /volume/", "change to the working directory")


@contextmanager
def exchanging(*pairs: tuple[Path, Path]) -> Iterator[list[int]]:
    """Pairs of names swapped over and over, each by a thread; the number of times is the list's only entry."""
    count, stop = [0], threading.Event()
    libc = ctypes.CDLL(None)

    def swap(one: bytes, other: bytes) -> None:
        while not stop.is_set():
            libc.renameat2(-100, one, -100, other, 2)  # RENAME_EXCHANGE
            count[0] += 1

    threads = [threading.Thread(target=swap, args=tuple(map(bytes, pair))) for pair in pairs]
    for thread in threads:
        thread.start()
    try:
        yield count
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def shared_volume(tmp_path: Path) -> tuple[Path, Path]:
    """A volume with a directory and a link to swap for it, twice; and a directory of the node that the links lead to."""
    volume, outside = tmp_path / "volume", tmp_path / "outside"
    for base in (volume / "target", volume / "deep/er/target", outside):
        for name in ("", "ro", "hidden"):
            (base / name).mkdir(parents=True, exist_ok=True)
        (base / "masked").write_text("seen\n")
    (volume / "link").symlink_to(outside)
    (volume / "deep/link").symlink_to(outside.parent)
    (volume / "up").symlink_to("../" * 20 + str(outside)[1:])
    return volume, outside


def contents(directory: Path) -> dict[str, tuple[int, int]]:
    """Names, modes and owners of all that is below."""
    found = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        found[str(path.relative_to(directory))] = (stat.S_IMODE(status.st_mode), status.st_uid)
    return found


def test_targets_that_a_neighbour_swaps_for_links(tmp_path: Path) -> None:
    """CVE-2021-30465, CVE-2024-45310, CVE-2025-31133: whatever is made, mounted, masked or entered by way of a volume is beneath the root."""
    volume, outside = shared_volume(tmp_path)
    before = contents(outside)
    data = tmp_path / "data"
    data.mkdir()

    async def body(launch: Launch) -> None:
        places = ("target", "deep/er/target")
        spots = [(f"/volume/{place}/data", f"/volume/{place}/made/here") for place in places]
        mounts = [bind("/volume", volume), *(bind(spot, data) for pair in spots for spot in pair)]
        protected = {
            "maskedPaths": [f"/volume/{place}/{name}" for place in places for name in ("hidden", "masked")],
            "readonlyPaths": [f"/volume/{place}/ro" for place in places],
            "devices": [{"path": f"/volume/{place}/dev/null", "type": "c", "major": 1, "minor": 3} for place in places],
        }
        outcomes: set[str] = set()
        swapped = [("target", "link"), ("deep/er", "deep/link"), ("deep", "up")]
        with exchanging(*((volume / one, volume / other) for one, other in swapped)) as count:
            for number in range(ROUNDS):
                cwd = f"/volume/{places[number % 2]}/work"
                try:
                    box = await launch.start(SLEEP, mounts=mounts, linux=protected, cwd=cwd, user={"uid": 7, "gid": 7})
                except StartFailed as error:
                    assert error.step is not None and error.step.startswith(STEPS), error
                    outcomes.add(error.step)
                    continue
                outcomes.add("started")
                assert not below(outside, box)
                await launch.kill(box)
        assert count[0] > 1000 and len(outcomes) > 1 and "started" in outcomes, outcomes

    in_launch(tmp_path, body)
    assert contents(outside) == before and mounts_below(tmp_path) == []
    assert contents(data) == {}


def below(outside: Path, box: Box) -> bool:
    """Whether a container has the node's directory as its working directory or among its mounts."""
    entry = Path(f"/proc/{box.process.pid}")
    here = os.stat(entry / "cwd")
    inodes = {(status.st_dev, status.st_ino) for path in (outside, *outside.rglob("*")) for status in [path.stat()]}
    roots = [line.split()[3] for line in (entry / "mountinfo").read_text().splitlines()]
    return (here.st_dev, here.st_ino) in inodes or any(str(outside) in root for root in roots)


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize("shared", [False, True])
def test_execs_into_containers_that_are_dying(tmp_path: Path, shared: bool) -> None:
    """It runs and is killed with the container, or fails with a step; nothing is left of it anywhere."""
    chance = random.Random(3)

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        kinds = {"namespaces": namespaces(**({"pid": pod.pins["pid"]} if shared else {}))}
        assert (await launch.run(["true"], linux=kinds)).code == 0
        pids = [os.getpid(), launch.pid_of("launcher"), launch.pid_of("keeper")]
        before, was = [descriptors(pid) for pid in pids], children(pids[1])
        outcomes: set[str] = set()

        async def one(box: Box) -> None:
            await asyncio.sleep(chance.random() * 0.01)
            try:
                result = await launch.exec(box, ["sh", "-c", "sleep 0.02"])
            except FailedPrecondition:  # it has ended by now
                outcomes.add("ended")
            except TareError as error:
                assert isinstance(error, StartFailed), error
                outcomes.add(str(error.step))
            else:
                assert result.code in (0, 137), result
                outcomes.add("ran" if result.code == 0 else "killed")

        for _ in range(ROUNDS // 2):
            box = await launch.start(["sleep", "0.01"], linux=kinds)
            end = asyncio.ensure_future(launch.wait(box.process))
            await asyncio.gather(*(one(box) for _ in range(3)))
            if chance.random() < 0.5:
                launch.handler.signal(box.process, 9)
            await end
            for fd in box.streams.values():
                os.close(fd)
                launch.descriptors.remove(fd)
        assert outcomes - {"ran"}, outcomes
        assert outcomes <= {"ran", "ended", "killed", "find the container", "join the container", "setup", "exec"}, (
            outcomes
        )
        await until(lambda: children(pids[1]) == was, "the end of all of them")
        await until(lambda: not list((launch.run_directory / "exits").iterdir()), "the records' removal")
        assert [descriptors(pid) for pid in pids] == before
        assert len(list((launch.run_directory / "tasks").iterdir())) == 1  # the pod's PID 1
        assert (await launch.run(["echo", "fine"], linux=kinds)).out == "fine\n"

    in_launch(tmp_path, body, cgroups=True)
