"""Daemon, keeper and launcher killed at any moment: what runs goes on, and exit codes are right or said to be unknown."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from tare.errors import Unavailable
from tare.handlers import processes
from tare.handlers.builtin import Process, StartFailed
from tare.handlers.interpreter import start_keeper
from tests.support import leaks
from tests.support.launch import NO_CGROUP, Launch, drain, ended_by, in_launch, second_daemon, until
from tests.support.mounts import mounted_tmpfs, mounts_below

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


# The launcher


def test_containers_outlive_the_launcher(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        old = launch.pid_of("launcher")
        boxes = [await launch.start(WAITS, stdin=True) for _ in range(4)]
        waiting = asyncio.ensure_future(launch.wait(boxes[0].process))
        await launch.kill_ours("launcher")
        os.write(boxes[0].streams["stdin"], b"40\n")
        assert (await waiting).code == 40
        await replaced(launch, "launcher", old)
        keeper = launch.pid_of("keeper")
        assert set(children(keeper)) >= {box.process.pid for box in boxes[1:]}
        assert (await launch.exec(boxes[1], ["echo", "in"])).out == "in\n"
        assert (await launch.run(["sh", "-c", "exit 6"])).code == 6
        for code, box in enumerate(boxes[1:], 41):
            os.write(box.streams["stdin"], b"%d\n" % code)
            end = await launch.wait(box.process)
            assert (end.code, end.known) == (code, True)
        assert not list((launch.run_directory / "tasks").iterdir())

    in_launch(tmp_path, body)


def test_an_exit_while_there_is_no_launcher(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        await launch.kill_ours("launcher")
        launch.handler.signal(box.process, 9)
        end = await launch.wait(box.process)
        assert (end.code, end.signal, end.known) == (137, 9, True)

    in_launch(tmp_path, body)


def test_launchers_that_die_one_after_the_other(tmp_path: Path) -> None:
    """Each is replaced, the hasty ones after a pause in which the keeper still reaps; there is never more than one."""

    async def body(launch: Launch) -> None:
        boxes = []
        for _ in range(3):
            boxes.append(await launch.start(WAITS, stdin=True))
            old = launch.pid_of("launcher")
            await launch.kill_ours("launcher")
            os.write(boxes[-1].streams["stdin"], b"9\n")
            assert (await launch.wait(boxes[-1].process)).code == 9
            await replaced(launch, "launcher", old)
        assert [p.name for p in leaks.processes() if p.parent == launch.pid_of("keeper")] == ["tare-launcher"]

    in_launch(tmp_path, body)


def test_calls_under_way_when_the_launcher_dies(tmp_path: Path) -> None:
    """They fail at once as Unavailable, or succeed; whatever they had begun is gone in the end."""

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        for pause in (0.0, 0.001, 0.002, 0.004):
            old = launch.pid_of("launcher")
            calls = [asyncio.ensure_future(launch.start(SLEEP)) for _ in range(3)]
            calls_of_exec = [asyncio.ensure_future(launch.exec(box, ["true"])) for _ in range(3)]
            await asyncio.sleep(pause)
            assert launch.signal_ours("launcher", signal.SIGKILL) == old
            for result in await asyncio.gather(*calls, *calls_of_exec, return_exceptions=True):
                if isinstance(result, BaseException):
                    assert isinstance(result, Unavailable | StartFailed), result
            await replaced(launch, "launcher", old)
            for made in [made for made in launch.processes if made != box.process]:
                launch.handler.signal(made, 9)
                await launch.wait(made)
        await until(lambda: not launch.handler._errands, "the end of the errands")
        known = f"{box.process.pid}.{box.process.start_time}"
        assert [path.name for path in (launch.run_directory / "tasks").iterdir()] == [known]
        for path in (launch.run_directory / "exits").iterdir():  # execs past their gate whose caller was not told
            path.unlink()
        assert not mounts_below(launch.run_directory)

    in_launch(tmp_path, body)


def test_a_child_at_its_gate_ends_with_its_launcher(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        made = await create(launch)
        await launch.kill_ours("launcher")
        await until(lambda: not Path(f"/proc/{made.pid}").exists(), "the end of the child")
        assert not list((launch.run_directory / "tasks").iterdir())
        launch.handler.forget(made)

    in_launch(tmp_path, body)


def test_a_launcher_that_dies_between_creation_and_start(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        def kill(process: Process) -> None:
            launch.signal_ours("launcher", signal.SIGKILL)

        with pytest.raises((Unavailable, StartFailed)):
            await launch.start(SLEEP, on_created=kill)
        await until(lambda: not launch.handler._errands, "the end of the errand")
        assert not list((launch.run_directory / "tasks").iterdir())
        assert not list((launch.run_directory / "exits").iterdir())
        assert (await launch.run(["true"])).code == 0

    in_launch(tmp_path, body)


async def create(launch: Launch) -> Process:
    """A container that waits at its gate."""
    identity, overlay, _ = launch.place()
    return await launch.handler.create(identity, launch.spec(SLEEP), overlay=overlay, cgroup=NO_CGROUP)


# The keeper


def test_the_keeper_is_replaced_and_finds_the_launcher(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        launcher, keeper = launch.pid_of("launcher"), launch.pid_of("keeper")
        before = await launch.start(WAITS, stdin=True)
        await launch.kill_ours("keeper")
        during = await launch.start(WAITS, stdin=True)
        os.write(before.streams["stdin"], b"21\n")
        assert (await launch.wait(before.process)).code == 21
        await launch.handler.connect()
        second = await replaced(launch, "keeper", keeper)
        assert launchers(launch) == [launcher]
        os.write(during.streams["stdin"], b"22\n")
        assert (await launch.wait(during.process)).code == 22
        assert (await launch.run(["sh", "-c", "exit 23"])).code == 23
        # The launcher's later death is the new keeper's business, though it is not its parent.
        await launch.kill_ours("launcher")
        await replaced(launch, "launcher", launcher)
        assert (await launch.run(["sh", "-c", "exit 24"])).code == 24
        assert len(launchers(launch)) == 1
        assert launch.pid_of("keeper") == second
        assert [p.name for p in leaks.processes() if p.parent == second] == ["tare-launcher"]

    in_launch(tmp_path, body)


def launchers(launch: Launch) -> list[int]:
    """All of this run directory."""
    found = [p for p in leaks.processes() if str(launch.run_directory) in p.command.split(" ")]
    return [process.pid for process in found if process.name == "tare-launcher"]


def test_the_keeper_is_replaced_unasked(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        for _ in range(2):
            keeper = launch.pid_of("keeper")
            await launch.kill_ours("keeper")
            await replaced(launch, "keeper", keeper)
        assert (await launch.run(["true"])).code == 0

    in_launch(tmp_path, body)


def test_a_second_keeper_ends_at_once(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        keeper, launcher = launch.pid_of("keeper"), launch.pid_of("launcher")
        for _ in range(3):
            await asyncio.to_thread(start_keeper, launch.run_directory)
        await until(lambda: keepers(launch) == [keeper], "the end of the second keeper")
        assert launch.pid_of("launcher") == launcher
        assert (await launch.run(["true"])).code == 0

    in_launch(tmp_path, body)


def keepers(launch: Launch) -> list[int]:
    """All processes with this run directory that are not the launcher."""
    found = [p for p in leaks.processes() if str(launch.run_directory) in p.command.split(" ")]
    return [process.pid for process in found if process.name != "tare-launcher"]


def started_here(launch: Launch) -> list[int]:
    """Children of this process, which may have others beside, that a launch of this run directory has begun."""
    return [p.pid for p in leaks.processes() if p.parent == os.getpid() and str(launch.run_directory) in p.command]


def test_nobody_s_child(tmp_path: Path) -> None:
    """The daemon has no zombie to reap when a keeper ends, and its end is no signal for the keeper."""

    async def body(launch: Launch) -> None:
        for name in ("keeper", "launcher"):
            fields = Path(f"/proc/{launch.pid_of(name)}/stat").read_text().rpartition(")")[2].split()
            assert int(fields[1]) != os.getpid() and int(fields[3]) != os.getsid(0)
        keeper = launch.pid_of("keeper")
        await launch.kill_ours("keeper")
        await replaced(launch, "keeper", keeper)
        await until(lambda: not started_here(launch), "the end of what started it")

    in_launch(tmp_path, body)


# Both


@pytest.mark.parametrize("tells", [True, False])
def test_both_killed_while_the_daemon_holds_a_pidfd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tells: bool
) -> None:
    """The kernel remembers from 6.15 on; before that nobody does, and nothing is guessed."""
    if not tells:
        monkeypatch.setattr(processes, "PIDFD_GET_INFO", 0xC040FFFF)
    kernel = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2])

    async def body(launch: Launch) -> None:
        boxes = [await launch.start(WAITS, stdin=True) for _ in range(2)]
        waiting = asyncio.ensure_future(launch.wait(boxes[0].process))
        await asyncio.sleep(0)
        await kill_both(launch)
        for code, box in enumerate(boxes, 30):
            os.write(box.streams["stdin"], b"%d\n" % code)
        for code, end in enumerate([await waiting, await launch.wait(boxes[1].process)], 30):
            expected = (code, True) if tells and kernel >= (6, 15) else (255, False)
            assert (end.code, end.known) == expected
        assert not list((launch.run_directory / "tasks").iterdir())

    in_launch(tmp_path, body)


async def kill_both(launch: Launch) -> None:
    """Keeper first, so that it starts no other launcher."""
    launcher = launch.pid_of("launcher")
    await launch.kill_ours("keeper")
    await ended_by(launcher, signal.SIGKILL)


def test_both_and_the_daemon_killed(tmp_path: Path) -> None:
    """A container that ended when nobody was there: its code is unknown, and said to be."""

    async def body(launch: Launch) -> None:
        gone = await launch.start(WAITS, stdin=True)
        lives = await launch.start(WAITS, stdin=True)
        launch.handler.close()
        await kill_both(launch)
        os.write(gone.streams["stdin"], b"3\n")
        await until(lambda: not Path(f"/proc/{gone.process.pid}").exists(), "its end")
        async with second_daemon(launch) as handler:
            end = await handler.wait(gone.process)
            assert (end.code, end.signal, end.known) == (255, 0, False)
            handler.forget(gone.process)
            assert handler.alive(lives.process)
            os.write(lives.streams["stdin"], b"5\n")
            assert (await handler.wait(lives.process)).code in (5, 255)
            handler.forget(lives.process)
        launch.processes.clear()

    in_launch(tmp_path, body)


def test_a_daemon_killed_while_containers_run(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        ends = await launch.start(WAITS, stdin=True)
        lives = await launch.start(WAITS, stdin=True)
        launch.handler.close()
        os.write(ends.streams["stdin"], b"12\n")
        await until(lambda: not Path(f"/proc/{ends.process.pid}").exists(), "its end")
        async with second_daemon(launch) as handler:
            assert (await handler.wait(ends.process)).code == 12
            handler.forget(ends.process)
            os.write(lives.streams["stdin"], b"13\n")
            assert (await handler.wait(lives.process)).code == 13
            handler.forget(lives.process)
        launch.processes.clear()

    in_launch(tmp_path, body)


def test_a_child_at_its_gate_ends_with_its_daemon(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        made = await create(launch)
        assert Path(f"/proc/{made.pid}").exists()
        launch.handler.close()
        await until(lambda: not Path(f"/proc/{made.pid}").exists(), "the end of the child")
        assert not list((launch.run_directory / "tasks").iterdir())
        assert not list((launch.run_directory / "exits").iterdir())

    in_launch(tmp_path, body)


# The end


def test_quitting(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        pids = [launch.pid_of("keeper"), launch.pid_of("launcher")]
        assert not await launch.handler.quit()
        assert (await launch.exec(box, ["echo", "still"])).out == "still\n"
        await launch.kill(box)
        assert await launch.handler.quit()
        await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "their end")
        for name in ("keeper.sock", "launcher.sock", "launcher.pid"):
            assert not (launch.run_directory / name).exists()
        await launch.handler.connect()  # and from the beginning
        assert (await launch.run(["true"])).code == 0

    in_launch(tmp_path, body)


def test_a_process_whose_pid_has_another_owner_is_left_alone(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        other = Process(box.process.pid, box.process.start_time - 1)
        assert not launch.handler.signal(other, 9) and not launch.handler.alive(other)
        end = await launch.handler.wait(other)
        assert (end.code, end.known) == (255, False)
        assert launch.handler.alive(box.process)

    in_launch(tmp_path, body)


def test_several_wait_for_one_end(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(WAITS, stdin=True)
        waiting = [asyncio.ensure_future(launch.handler.wait(box.process)) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        os.write(box.streams["stdin"], b"7\n")
        with contextlib.suppress(asyncio.CancelledError):
            await waiting[0]
        assert [(await one).code for one in waiting[1:]] == [7, 7]
        await launch.wait(box.process)
        assert drain(box.streams["stdout"]) == ""

    in_launch(tmp_path, body)


def test_instances_in_one_machine_do_not_meet(tmp_path: Path) -> None:
    """Two run directories, two keepers; the end of one is nothing to the other."""
    (tmp_path / "one").mkdir()
    with mounted_tmpfs(tmp_path / "two") as two:

        async def body(first: Launch) -> None:
            async with Launch(two) as second:
                box = await second.start(SLEEP)
                await first.kill_ours("launcher")
                await first.kill_ours("keeper")
                assert second.handler.alive(box.process)
                assert (await second.exec(box, ["true"])).code == 0

        in_launch(tmp_path / "one", body)
