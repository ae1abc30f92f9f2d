"""What does not answer, and what has no room: a lost file system, a stopped launcher, a full run directory. Each stalls itself alone."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from tare.errors import DeadlineExceeded
from tare.handlers import builtin, processes, starting
from tare.handlers.builtin import StartFailed
from tare.launch import linux
from tests.support import leaks
from tests.support.hang import hanging
from tests.support.launch import Launch, bind, in_launch, second_daemon, until

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
WAITS = ["sh", "-c", "read code; exit $code"]  # ends with the code that it is told


def children(parent: int) -> list[int]:
    """PIDs below a process."""
    return [process.pid for process in leaks.processes() if process.parent == parent]


async def replaced(launch: Launch, name: str, old: int) -> int:
    """The PID of the next keeper or launcher."""
    await until(lambda: launch.pid_of(name) not in (0, old), f"another {name}")
    return launch.pid_of(name)


def test_two_daemons_one_after_the_other_do_not_share_names(tmp_path: Path) -> None:
    """A look at a path that hangs is still under way when the next daemon looks at its first."""

    async def body(launch: Launch) -> None:
        with hanging(tmp_path / "far") as far:
            look = asyncio.ensure_future(launch.handler.check_sources([(str(far / "x"), False)]))
            await until(lambda: children(launch.pid_of("launcher")) != [], "the look")
            async with second_daemon(launch) as handler:
                assert (await handler.check_sources([("/etc", False)]))[0].directory
            look.cancel()
            with pytest.raises(asyncio.CancelledError):
                await look

    in_launch(tmp_path, body)


def test_a_path_that_hangs_is_given_up_and_hinders_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "CHECK_TIMEOUT", 1.0)

    async def body(launch: Launch) -> None:
        launcher = launch.pid_of("launcher")
        with hanging(tmp_path / "far") as far:
            look = asyncio.ensure_future(launch.handler.check_sources([(str(far / "x"), True)]))
            await until(lambda: children(launcher) != [], "the look")
            box = await launch.start(SLEEP)
            assert (await launch.exec(box, ["echo", "on"])).out == "on\n"
            infos = await launch.handler.check_sources([("/etc", False), ("/etc/hosts", False), ("/none", False)])
            assert [(info.directory, info.errno) for info in infos] == [(True, 0), (False, 0), (False, 2)]
            assert not look.done()
            with pytest.raises(DeadlineExceeded, match=f"look at mount sources {far}/x: the launcher has not answered"):
                await look
            await until(lambda: children(launcher) == [box.process.pid], "the end of the look")

    in_launch(tmp_path, body)


def test_a_bind_source_that_hangs_fails_the_start_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "SETUP_TIMEOUT", 1.0)

    async def body(launch: Launch) -> None:
        launcher = launch.pid_of("launcher")
        with hanging(tmp_path / "far") as far:
            start = asyncio.ensure_future(launch.start(SLEEP, mounts=[bind("/far", far / "sub")]))
            await until(lambda: children(launcher) != [], "the child")
            assert (await launch.run(["true"])).code == 0
            with pytest.raises(DeadlineExceeded):
                await start
            await until(lambda: children(launcher) == [], "the end of the child")
            assert not list((launch.run_directory / "tasks").iterdir())

    in_launch(tmp_path, body)


def test_directories_that_are_made_for_missing_sources(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        (tmp_path / "file").touch()
        wanted = [
            (tmp_path / "a/b/c", True),
            (tmp_path / "none", False),
            (tmp_path / "file", True),
            (tmp_path / "file/x", True),
        ]
        infos = await launch.handler.check_sources([(str(path), make) for path, make in wanted])
        assert [(info.directory, info.errno) for info in infos] == [(True, 0), (False, 2), (False, 0), (False, 20)]
        assert (tmp_path / "a/b/c").stat().st_mode & 0o7777 == 0o755 and not (tmp_path / "none").exists()

    in_launch(tmp_path, body)


def test_a_stopped_launcher_keeps_no_exit_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The zombie has the code, and is asked in the end."""
    monkeypatch.setattr(processes, "RECORD_WAIT", 0.2)

    async def body(launch: Launch) -> None:
        box = await launch.start(WAITS, stdin=True)
        launch.signal_ours("launcher", signal.SIGSTOP)
        try:
            os.write(box.streams["stdin"], b"17\n")
            end = await launch.wait(box.process)
            assert (end.code, end.known) == (17, True)
            assert not launch.handler.alive(box.process)
        finally:
            launch.signal_ours("launcher", signal.SIGCONT)
        await until(lambda: not Path(f"/proc/{box.process.pid}").exists(), "the reaping")
        for path in (launch.run_directory / "exits").iterdir():
            path.unlink()

    in_launch(tmp_path, body)


@pytest.mark.parametrize("who", ["launcher", "keeper"])
def test_exits_that_cannot_be_written_down_wait_for_room(tmp_path: Path, who: str) -> None:
    """A full run directory: the zombie keeps its code, and nobody crashes over it."""

    async def body(launch: Launch) -> None:
        box = await launch.start(WAITS, stdin=True)
        if who == "keeper":
            old = launch.pid_of("launcher")
            await launch.kill_ours("launcher")
            await replaced(launch, "launcher", old)
        pids = [launch.pid_of("keeper"), launch.pid_of("launcher")]
        exits = launch.run_directory / "exits"
        linux.mount(b"tmpfs", bytes(exits), b"tmpfs", 0, b"nr_inodes=1")
        try:
            os.write(box.streams["stdin"], b"18\n")
            log = launch.run_directory / "launch.log"
            await until(lambda: "record the exit" in log.read_text(), "the complaint")
            assert Path(f"/proc/{box.process.pid}").exists()
        finally:
            linux.umount(bytes(exits), linux.MNT_DETACH)
        assert (await launch.wait(box.process)).code == 18
        assert [launch.pid_of("keeper"), launch.pid_of("launcher")] == pids

    in_launch(tmp_path, body)


def test_a_run_directory_without_room_fails_starts_cleanly(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        tasks = launch.run_directory / "tasks"
        linux.mount(b"tmpfs", bytes(tasks), b"tmpfs", 0, b"nr_inodes=1")
        try:
            with pytest.raises(StartFailed) as caught:
                await launch.start(SLEEP)
            assert (caught.value.step, caught.value.errno) == ("write the marker", 28)
        finally:
            linux.umount(bytes(tasks), linux.MNT_DETACH)
        await until(lambda: children(launch.pid_of("launcher")) == [], "the end of the child")
        assert (await launch.run(["true"])).code == 0

    in_launch(tmp_path, body)
