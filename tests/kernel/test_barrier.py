"""A process that waits before all else until somebody has put it into its cgroups: where systemd is the one who may."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tare.errors import Unavailable
from tare.handlers.builtin import Process, StartFailed
from tests.support.launch import FIRST_ID, Launch, in_launch, line, namespaces, until, user_namespace
from tests.support.mounts import mount_table

pytestmark = pytest.mark.root

SPEAK = ["sh", "-c", "echo up; sleep 1000"]


def groups(pid: int | str) -> str:
    """The cgroups that a process is in."""
    return Path(f"/proc/{pid}/cgroup").read_text()


async def gone(launch: Launch, process: Process) -> None:
    """The process has ended and is reaped, and nothing is known of it."""
    await until(lambda: not Path(f"/proc/{process.pid}").exists(), "the end")
    assert not list((launch.run_directory / "tasks").iterdir())
    assert not list((launch.run_directory / "exits").iterdir())


@pytest.mark.parametrize("shared", [False, True])
def test_the_process_waits_to_be_placed(tmp_path: Path, shared: bool) -> None:
    """Before anything is done: it has no root of its own yet. Where a process in between makes it that one waits, and has it where itself is."""

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        wanted = namespaces(pid=pod.pins["pid"]) if shared else namespaces()
        seen: list[Process] = []

        async def place(process: Process) -> None:
            seen.append(process)
            assert launch.handler.alive(process)
            mounts = mount_table(Path(f"/proc/{process.pid}/mountinfo").read_text())
            assert str(launch.run_directory / "rootfs") not in mounts and "/etc" not in groups(process.pid)
            assert groups(process.pid) == groups(launch.pid_of("launcher"))
            for file in launch.manager.create(f"{launch.parent}/c1", {}).join if launch.manager else ():
                Path(file).write_text(str(process.pid))

        box = await launch.start(SPEAK, place=place, linux={"namespaces": wanted})
        assert len(seen) == 1 and (seen == [box.process]) is not shared and await line(box) == "up"
        inside = groups(box.process.pid)
        assert inside.count(f"{launch.parent}/c1") == len(box.cgroup.join) > 0

    in_launch(tmp_path, body, cgroups=True)


def test_a_process_that_cannot_be_placed_is_given_up(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        seen: list[Process] = []

        async def place(process: Process) -> None:
            seen.append(process)
            raise Unavailable("start a scope", cause="systemd does not answer")

        with pytest.raises(Unavailable, match="systemd does not answer"):
            await launch.start(SPEAK, place=place)
        await gone(launch, seen[0])
        box = await launch.start(SPEAK)
        assert await line(box) == "up"

    in_launch(tmp_path, body)


def test_a_process_that_is_killed_while_it_waits(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        seen: list[Process] = []

        async def place(process: Process) -> None:
            seen.append(process)
            os.kill(process.pid, 9)
            await until(lambda: not Path(f"/proc/{process.pid}").exists(), "the reaping")

        with pytest.raises(StartFailed, match="is gone") as caught:
            await launch.start(SPEAK, place=place)
        assert (caught.value.step, caught.value.errno) == ("gate", 3)
        await gone(launch, seen[0])

    in_launch(tmp_path, body)


def test_a_launcher_that_is_lost_while_a_process_waits(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        seen: list[Process] = []

        async def place(process: Process) -> None:
            seen.append(process)
            await launch.kill_ours("launcher")
            await until(lambda: launch.pid_of("launcher") > 0, "another launcher")

        with pytest.raises((StartFailed, Unavailable)):
            await launch.start(SPEAK, place=place)
        await gone(launch, seen[0])

    in_launch(tmp_path, body)


def test_what_fails_after_the_barrier_is_told_as_ever(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        async def place(process: Process) -> None:
            assert launch.handler.alive(process)

        with pytest.raises(StartFailed) as caught:
            await launch.start(SPEAK, place=place, lowers=[tmp_path / "missing"])
        assert (caught.value.step, caught.value.errno) == ("make the root file system", 2)

    in_launch(tmp_path, body)


def test_a_process_with_a_user_namespace_waits_too(tmp_path: Path) -> None:
    """Placed from outside, and by itself where it is to join more: it has the node's root's ID until then."""

    async def body(launch: Launch) -> None:
        assert launch.manager is not None
        other = launch.manager.create(f"{launch.parent}/c9", {})

        async def place(process: Process) -> None:
            assert Path(f"/proc/{process.pid}/uid_map").read_text().split()[1] == str(FIRST_ID)
            for file in other.join:
                Path(file).write_text(str(process.pid))

        box = await launch.start(SPEAK, place=place, linux=user_namespace())
        assert await line(box) == "up"
        assert groups(box.process.pid).count(f"{launch.parent}/c1") == len(box.cgroup.join) > 0
        await launch.kill(box)
        await launch.manager.remove(f"{launch.parent}/c9")

    in_launch(tmp_path, body, cgroups=True)
