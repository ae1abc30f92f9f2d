"""A child's helper in the node's namespaces: what it does for the child that asks, and how both end."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from tare.handlers import compile as compiler
from tare.handlers.builtin import Process, StartFailed
from tests.support import leaks
from tests.support.launch import Launch, in_launch, line, namespaces, until

pytestmark = pytest.mark.root

SPEAK = ["sh", "-c", "echo up; sleep 1000"]


def with_helper(patch: pytest.MonkeyPatch, *files: Path | str) -> None:
    """From now on plans have a list of steps for a helper for each of these files: to write the child's PID there."""
    original = compiler.container

    def compiled(*arguments: Any) -> compiler.Compiled:
        result = original(*arguments)
        plan = result.plan
        lists = [[("join_cgroup", f"write the PID into {file}", os.fsencode(file))] for file in files]
        asks = [("outside", f"have list {number} run", number) for number in range(len(files))]
        plan |= {"outside": lists, "before": plan.get("before", []), "making": plan.get("making", "make a process")}
        plan["steps"] = [*plan["steps"], *asks]
        result.helper = True
        return result

    patch.setattr(compiler, "container", compiled)


def helpers(launch: Launch) -> list[leaks.Process]:
    """The helpers of this launch that live, and their makers."""
    ours = [process for process in leaks.processes() if str(launch.run_directory) in process.command.split(" ")]
    return [process for process in ours if process.name == "tare-outside"]


@pytest.mark.parametrize("shared", [False, True])
def test_the_helper_knows_the_child_by_the_nodes_pid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    files = [tmp_path / "first", tmp_path / "second"]
    for file in files:
        file.touch()
    with_helper(monkeypatch, *files)

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        wanted = namespaces(pid=pod.pins["pid"]) if shared else namespaces()
        box = await launch.start(SPEAK, linux={"namespaces": wanted})
        assert await line(box) == "up"
        assert [file.read_text() for file in files] == [str(box.process.pid)] * 2
        # Nothing of it stays: neither the helper nor the process in between that waited for it.
        children = {process.pid for process in leaks.processes() if process.parent == launch.pid_of("launcher")}
        assert helpers(launch) == []
        assert children == {box.process.pid, *([pod.pause.pid] if pod.pause else [])}

    in_launch(tmp_path, body)


def test_it_is_over_before_the_process_is_created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may be created and never started: no helper waits for that."""
    (tmp_path / "file").touch()
    with_helper(monkeypatch, tmp_path / "file")

    async def body(launch: Launch) -> None:
        found: list[Process] = []

        def created(process: Process) -> None:
            found.append(process)

        identity, overlay, _ = launch.place()
        cgroup = launch.cgroup(identity)
        made = await launch.handler.create(
            identity, launch.spec(SPEAK), overlay=overlay, cgroup=cgroup, on_created=created
        )
        launch.processes[made] = None
        await until(lambda: helpers(launch) == [], "the helper's end")
        assert found == [made] and (tmp_path / "file").read_text() == str(made.pid)
        assert launch.handler.alive(made)

    in_launch(tmp_path, body)


def test_what_fails_outside_is_the_starts_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    missing = tmp_path / "no/such"
    with_helper(monkeypatch, tmp_path / "file", missing)

    async def body(launch: Launch) -> None:
        with pytest.raises(StartFailed) as caught:
            await launch.start(SPEAK)
        assert (caught.value.step, caught.value.errno) == (f"write the PID into {missing}", 2)
        await until(lambda: helpers(launch) == [], "the helper's end")
        await until(lambda: not list((launch.run_directory / "tasks").iterdir()), "no marker")
        pid = int((tmp_path / "file").read_text())
        await until(lambda: not Path(f"/proc/{pid}").exists(), "the child's end")

    in_launch(tmp_path, body)


def test_a_child_that_fails_takes_its_helper_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with_helper(monkeypatch, tmp_path / "file")

    async def body(launch: Launch) -> None:
        with pytest.raises(StartFailed, match="make the root file system"):
            await launch.start(SPEAK, lowers=[tmp_path / "missing"])
        await until(lambda: helpers(launch) == [], "the helper's end")
        assert (tmp_path / "file").read_text() == ""

    in_launch(tmp_path, body)


def test_a_helper_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hangs on a FIFO that nobody reads; killed there, the start fails and says so."""
    os.mkfifo(tmp_path / "fifo")
    with_helper(monkeypatch, tmp_path / "fifo")

    async def body(launch: Launch) -> None:
        starting = asyncio.ensure_future(launch.start(SPEAK))
        await until(lambda: helpers(launch) != [], "the helper")
        [helper] = helpers(launch)
        blocked = Path(f"/proc/{helper.pid}/wchan")
        await until(lambda: blocked.read_text() == "wait_for_partner", "its opening of the FIFO")
        os.kill(helper.pid, 9)
        with pytest.raises(StartFailed, match="the helper outside has ended") as caught:
            await starting
        assert caught.value.step == "have list 0 run"

    in_launch(tmp_path, body)


def test_a_child_that_is_killed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then a helper goes on with what it does, and ends."""
    os.mkfifo(tmp_path / "fifo")
    with_helper(monkeypatch, tmp_path / "fifo")

    async def body(launch: Launch) -> None:
        starting = asyncio.ensure_future(launch.start(SPEAK))
        await until(lambda: helpers(launch) != [], "the helper")
        [helper] = helpers(launch)
        await until(
            lambda: Path(f"/proc/{helper.pid}/wchan").read_text() == "wait_for_partner", "its opening of the FIFO"
        )
        await launch.handler._abandon(b"c1")
        reading = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        launch.descriptors.append(reading)
        await until(lambda: helpers(launch) == [], "the helper's end")
        starting.cancel()
        with pytest.raises((StartFailed, asyncio.CancelledError)):
            await starting

    in_launch(tmp_path, body)
