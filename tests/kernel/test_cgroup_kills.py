"""OOM kills are known of groups that vanish: real groups and the kernel's own notices, with the number of processes for that of kills."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tare.cgroups import kills
from tare.cgroups.kills import Kills
from tare.cgroups.layout import detect
from tare.cgroups.manager import CgroupManager

pytestmark = pytest.mark.root
NUMBERS = itertools.count()


class Pod:
    """Groups a and b in one of their own; `above` is what the counter of that one says."""

    def __init__(self, kept: Path) -> None:
        self.kept = kept
        unified = detect().unified
        assert unified is not None
        self.groups = CgroupManager(unified.directory)
        self.path = f"/tare-kills-{os.getpid()}-{next(NUMBERS)}"
        self.directory = Path(unified.directory + self.path)
        self.above = 0
        self.groups.make_parent_now(self.path)
        self.processes: list[subprocess.Popen[bytes]] = []
        for name in "ab":
            self.groups.create(f"{self.path}/{name}", {})

    def kills(self) -> Kills:
        return Kills(
            lambda path, _, __: self.groups.open_file(path, "cgroup", "cgroup.events"), self.counted, self.kept
        )

    def counted(self, path: str) -> int:
        return self.above if path == self.path else 0

    def one_dies(self, name: str) -> None:
        """A process in the group: `populated` says 1, and goes on saying so until it has ended."""
        process = subprocess.Popen(["sleep", "1000"])
        self.processes.append(process)
        (self.directory / name / "cgroup.procs").write_text(str(process.pid))

    def vanish(self, name: str) -> None:
        """As systemd removes a scope once it is empty."""
        for process in self.processes:
            process.kill()
            process.wait(20)
        self.processes.clear()
        remove(self.groups, f"{self.path}/{name}")


def remove(groups: CgroupManager, path: str) -> None:
    """Until it is gone; the event loop is the test's."""
    while not groups.remove_now(path):
        continue


@pytest.fixture(name="pod")
def _pod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Pod]:
    monkeypatch.setattr(kills, "oom_count", lambda text: int("populated 1" in text))
    pod = Pod(tmp_path / "oom.json")
    yield pod
    for name in "ab":
        pod.vanish(name)
    assert pod.groups.remove_parent_now(pod.path)
    pod.groups.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


def test_a_kill_that_was_told_is_known_after_the_group_is_gone(pod: Pod) -> None:
    async def body() -> None:
        watching = pod.kills()
        watching.watch(f"{pod.path}/a")
        watching.watch(f"{pod.path}/a")
        pod.one_dies("a")
        await until(lambda: watching._watches[f"{pod.path}/a"].count == 1)
        pod.vanish("a")
        pod.above = 1
        assert watching.count(f"{pod.path}/a") == 1
        # The kernel says of a removed group that it changed, for ever: it must not be asked again.
        await until(lambda: not watching._by_file)
        assert watching.count(f"{pod.path}/a") == 1
        watching.forget(f"{pod.path}/a")
        assert watching.count(f"{pod.path}/a") == 0
        watching.close()

    asyncio.run(body())


def test_one_that_was_not_told_shows_above_and_belongs_to_the_group_that_is_gone(pod: Pod) -> None:
    async def body() -> None:
        pod.above = 4
        watching = pod.kills()
        for name in "ab":
            watching.watch(f"{pod.path}/{name}")
        pod.one_dies("b")
        pod.above = 6  # b's, which will be told, and one of a's
        await until(lambda: watching._watches[f"{pod.path}/b"].count == 1)
        assert watching.count(f"{pod.path}/a") == 0
        os.rmdir(pod.directory / "a")
        assert (watching.count(f"{pod.path}/a"), watching.count(f"{pod.path}/b")) == (1, 1)
        pod.vanish("b")
        assert (watching.count(f"{pod.path}/a"), watching.count(f"{pod.path}/b")) == (1, 1)
        watching.close()

    asyncio.run(body())


def test_a_group_that_goes_without_a_kill_has_none(pod: Pod) -> None:
    async def body() -> None:
        pod.above = 2
        watching = pod.kills()
        watching.watch(f"{pod.path}/a")
        pod.vanish("a")
        assert watching.count(f"{pod.path}/a") == 0
        watching.watch(f"{pod.path}/none")
        assert watching.count(f"{pod.path}/none") == 0
        watching.close()

    asyncio.run(body())


def test_what_was_counted_is_known_to_the_next_one_and_what_happened_meanwhile_is_told(pod: Pod) -> None:
    async def body() -> None:
        pod.above = 3
        first = pod.kills()
        for name in "ab":
            first.watch(f"{pod.path}/{name}")
        pod.one_dies("b")
        pod.above = 4
        await until(lambda: first._watches[f"{pod.path}/b"].count == 1)
        first.close()
        pod.above = 5  # one in a, which goes
        os.rmdir(pod.directory / "a")
        second = pod.kills()
        for name in "ab":
            second.watch(f"{pod.path}/{name}")
        assert (second.count(f"{pod.path}/a"), second.count(f"{pod.path}/b")) == (1, 1)
        for name in "ab":
            second.forget(f"{pod.path}/{name}")
        second.close()
        assert json.loads(pod.kept.read_text()) == {"groups": {}, "above": {}}

    asyncio.run(body())
