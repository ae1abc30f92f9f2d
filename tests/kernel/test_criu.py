"""CRIU with the built-in handler alone: a container written down and made again on whichever layout of control groups there is."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import pytest

from tare.errors import FailedPrecondition
from tare.handlers.checkpointer import Checkpointer
from tare.handlers.criu_restore import Restoring
from tare.handlers.processes import Process
from tare.launch import linux
from tests.support.launch import Box, Launch, in_launch, namespaces, status

pytestmark = pytest.mark.root
CRIU = Path(sys.executable).parent / "criu"
SECONDS = 120.0  # emulated, CRIU takes its time
COUNT = ["sh", "-c", "i=0; trap 'exit 7' TERM; while true; do i=$((i+1)); echo $i; sleep 0.05; done"]


async def read_until(box: Box, count: int) -> list[int]:
    """The numbers that a container writes, until there are so many."""
    text, deadline = "", time.monotonic() + SECONDS
    while text.count("\n") < count:
        text += box.read()
        assert time.monotonic() < deadline, f"it wrote {text!r}"
        await asyncio.sleep(0.01)
    return [int(line) for line in text.split("\n")[:-1]]


async def shared(launch: Launch) -> dict[str, object]:
    """The linux object of a container in a pod with a network, host name and IPC of its own."""
    pins = (await launch.pod("net", "ipc", "uts")).pins
    return {"namespaces": namespaces(network=pins["net"], ipc=pins["ipc"], uts=pins["uts"])}


def checkpointer(launch: Launch) -> Checkpointer:
    return Checkpointer(launch.run_directory, str(CRIU), launch.handler.commands, launch.hierarchies())


def test_a_container_is_restored_and_stands_still_until_it_is_thawed(tmp_path: Path) -> None:
    """The same number comes next; its control groups, their namespace and its exit code are as a container's are."""

    async def body(launch: Launch) -> None:
        manager, criu = launch.manager, checkpointer(launch)
        assert manager is not None
        box = await launch.start(COUNT, linux=await shared(launch))
        before = await read_until(box, 5)
        (directory := tmp_path / "dump").mkdir()
        (directory / "checkpoint").mkdir()
        spec = launch.spec(COUNT, linux=await shared(launch))
        fifos = launch.run_directory / "containers" / box.id
        await manager.freeze(box.cgroup.path)
        outside = await criu.dump(
            box.process, spec, cgroup=box.cgroup, fifos=fifos, directory=directory, doing="dump it"
        )
        assert manager.frozen(box.cgroup.path)
        before += [int(line) for line in box.read().split()]
        await manager.thaw(box.cgroup.path)
        assert (await read_until(box, 3))[0] == before[-1] + 1
        assert outside.streams[0] == "" and all(outside.streams[1:])

        identity, overlay, streams = launch.place()
        for name in ("etc",):
            (overlay.upper / name).mkdir(exist_ok=True)
        cgroup = launch.cgroup(identity)
        what = Restoring(
            images=directory / "checkpoint",
            work=directory,
            external=tuple(key.split("]:")[1] for key in outside.external if key.startswith("mnt[")),
            streams=outside.streams,
        )
        process = await criu.restore(
            identity,
            spec,
            what,
            overlay=overlay,
            cgroup=cgroup,
            freeze=lambda: manager.freeze(cgroup.path),
            place=None,
        )
        launch.processes[process] = None
        other = Box(id=identity, process=process, upper=overlay.upper, cgroup=cgroup, streams=dict(streams))
        await check_still(launch, other)
        await manager.thaw(cgroup.path)
        after = await read_until(other, 5)
        assert after == list(range(after[0], after[0] + len(after))) and after[0] in (before[-1], before[-1] + 1)
        assert own_groups(process) == own_groups(box.process)
        launch.handler.signal(process, 15)
        assert (await launch.wait(process)).code == 7
        await launch.kill(box)

    in_launch(tmp_path, body, cgroups=True)


async def check_still(launch: Launch, box: Box) -> None:
    """It is the keeper's child, all of it is in its group, and it does nothing."""
    manager = launch.manager
    assert manager is not None and manager.frozen(box.cgroup.path)
    assert box.process.pid in manager.processes(box.cgroup.path)
    facts = status(Path(f"/proc/{box.process.pid}/status").read_text())
    assert int(facts["PPid"]) == launch.pid_of("keeper")
    box.read()  # what was in the FIFO when it was written down
    await asyncio.sleep(0.5)
    assert box.read() == ""
    assert linux.same_process(box.process.pid, box.process.start_time)


def own_groups(process: Process) -> list[str]:
    """What a container sees of control groups."""
    lines = Path(f"/proc/{process.pid}/mountinfo").read_text().splitlines()
    return sorted(line.split()[4] for line in lines if line.split()[4].startswith("/sys/fs/cgroup"))


def test_a_dump_of_what_is_gone(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        criu = checkpointer(launch)
        box = await launch.start(["sleep", "1000"])
        gone = Process(box.process.pid, box.process.start_time)
        spec, fifos = launch.spec([]), launch.run_directory / "containers" / box.id
        await launch.kill(box)
        with pytest.raises(FailedPrecondition):
            await criu.dump(gone, spec, cgroup=box.cgroup, fifos=fifos, directory=tmp_path, doing="dump it")

    in_launch(tmp_path, body, cgroups=True)
