"""A process that is made while its plan is compiled (`handlers.starting`): it is told of, waits for the plan, and goes on by itself."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tare.errors import InvalidArgument, Unavailable
from tare.handlers.builtin import Process, StartFailed
from tare.launch import wire
from tests.support.launch import Launch, in_launch, until

pytestmark = pytest.mark.root

UNKNOWN = 99
SLEEP = ["sleep", "1000"]


def heard(launch: Launch, instead: dict[int, int] | None = None) -> list[int]:
    """The kinds of what is asked of the launcher from now on; some are asked as another kind."""
    kinds: list[int] = []
    channel = launch.handler._launcher
    request = channel.request

    async def listening(kind: int, *arguments: Any, **named: Any) -> Any:
        kinds.append(kind)
        return await request((instead or {}).get(kind, kind), *arguments, **named)

    channel.request = listening  # type: ignore[method-assign]
    return kinds


async def nothing_left(launch: Launch) -> None:
    """No process, marker or record of what was begun."""
    await until(lambda: not launch.handler._errands, "the end of the errands")
    await until(lambda: not list((launch.run_directory / "tasks").iterdir()), "no marker")
    children = Path(f"/proc/{launch.pid_of('launcher')}/task/{launch.pid_of('launcher')}/children")
    await until(lambda: not children.read_text(), "the end of its process")
    assert not list((launch.run_directory / "exits").iterdir())


def test_two_requests_and_nothing_in_between(tmp_path: Path) -> None:
    """It is told of with its marker written, before there is anything of the container."""

    async def body(launch: Launch) -> None:
        kinds = heard(launch)
        seen: list[tuple[bool, str]] = []

        async def look(process: Process) -> None:
            marked = (launch.run_directory / "tasks" / f"{process.pid}.{process.start_time}").exists()
            await asyncio.sleep(0.05)  # whoever is told may take its time
            seen.append((marked, os.readlink(f"/proc/{process.pid}/root")))

        assert (await launch.run(["true"], on_created=look)).code == 0
        assert seen == [(True, "/")] and kinds == [wire.BEGIN, wire.PROCEED]

    in_launch(tmp_path, body)


@pytest.mark.parametrize("wanted", [{"terminal": True}, {"hooks": {"createContainer": [{"path": "/bin/true"}]}}])
def test_who_is_to_be_seen_at_its_gate_is_created(wanted: dict[str, Any], tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        kinds = heard(launch)
        box = await launch.start(SLEEP, **wanted)
        assert kinds == [wire.CREATE, wire.START] and launch.handler.alive(box.process)

    in_launch(tmp_path, body)


def test_a_launcher_of_another_version(tmp_path: Path) -> None:
    """One that does not know how: it is asked once, and its way is taken."""

    async def body(launch: Launch) -> None:
        kinds = heard(launch, {wire.BEGIN: UNKNOWN})
        for _ in range(2):
            assert (await launch.run(["true"])).code == 0
        assert kinds == [wire.BEGIN, *[wire.CREATE, wire.START] * 2]

    in_launch(tmp_path, body)


def test_a_configuration_that_comes_to_no_plan(tmp_path: Path) -> None:
    """The process is there by then, and ends."""

    async def body(launch: Launch) -> None:
        with pytest.raises(InvalidArgument, match="hide the whole container"):
            await launch.start(SLEEP, mounts=[{"destination": "/", "type": "tmpfs"}])
        await nothing_left(launch)

    in_launch(tmp_path, body)


def test_a_step_that_fails(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        with pytest.raises(StartFailed) as caught:
            await launch.start(SLEEP, mounts=[{"destination": "/x", "type": "bind", "source": "/no/such"}])
        assert (caught.value.step, caught.value.errno) == ("mount /x", 2)
        await nothing_left(launch)

    in_launch(tmp_path, body)


def test_one_that_ends_while_it_waits_for_its_plan(tmp_path: Path) -> None:
    """Nothing is said against the container: it can be started again."""

    async def body(launch: Launch) -> None:
        async def kill(process: Process) -> None:
            os.kill(process.pid, signal.SIGKILL)
            await until(lambda: not launch.handler.alive(process), "its end")

        with pytest.raises(Unavailable, match="is gone"):
            await launch.start(SLEEP, on_created=kill)
        await nothing_left(launch)
        assert (await launch.run(["true"])).code == 0

    in_launch(tmp_path, body)


def test_a_daemon_that_goes_before_it_proceeds(tmp_path: Path) -> None:
    """The process ends with the connection, without a marker or a record."""

    async def body(launch: Launch) -> None:
        async def leave(process: Process) -> None:
            launch.handler._launcher.close()
            await until(lambda: not Path(f"/proc/{process.pid}").exists(), "its end")
            assert not list((launch.run_directory / "tasks").iterdir())
            assert not list((launch.run_directory / "exits").iterdir())

        with pytest.raises(Unavailable):
            await launch.start(SLEEP, on_created=leave)
        await nothing_left(launch)

    in_launch(tmp_path, body)
