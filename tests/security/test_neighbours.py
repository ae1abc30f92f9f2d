"""What a container can do to the node and to others, and what it can learn of them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from pathlib import Path

import pytest

from tare.errors import DeadlineExceeded
from tare.handlers import starting
from tare.handlers.builtin import StartFailed
from tests.support.launch import SECONDS, Box, Launch, in_launch, line, namespaces, python_mounts, status, until
from tests.support.loggers import Group

pytestmark = pytest.mark.root

PYTHON = ["/usr/bin/python3", "-I", "-c"]
SLEEP = ["sleep", "1000"]


def test_a_fork_bomb_hits_its_limit_and_nobody_else(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box: Box = await launch.start(
            ["sh", "-c", "echo up; (while :; do sleep 1000 & done); exec sleep 1000"], resources={"pids": {"limit": 25}}
        )
        assert launch.manager is not None
        assert await line(box) == "up"
        path = f"{launch.parent}/{box.id}"
        manager = launch.manager
        await until(lambda: len(manager.processes(path)) >= 24, "the limit")
        assert len(manager.processes(path)) <= 25
        with pytest.raises(StartFailed):  # there is no room for another process in it
            for _ in range(50):  # one may slip in where the bomb's shell has just given up
                await launch.exec(box, ["true"])
        assert (await launch.run(["echo", "others"])).out == "others\n"
        await launch.kill(box)
        await until(lambda: manager.processes(path) == [], "the end of all of them")

    in_launch(tmp_path, body, cgroups=True)


BOMB = "import os\nwhile True:\n try: os.fork()\n except OSError: pass"


@pytest.mark.parametrize("shared", [False, True])
def test_a_fork_bomb_that_never_rests_can_be_ended(tmp_path: Path, shared: bool) -> None:
    """Also in a PID namespace that does not die with it: its cgroup is killed while it forks."""

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        kinds = {"namespaces": namespaces(**({"pid": pod.pins["pid"]} if shared else {}))}
        neighbour = await launch.start(SLEEP, linux=kinds)
        limit = {"pids": {"limit": 40}}
        box = await launch.start([*PYTHON, BOMB], mounts=python_mounts(), linux=kinds, resources=limit)
        manager, path = launch.manager, f"{launch.parent}/{box.id}"
        assert manager is not None
        await until(lambda: len(manager.processes(path)) >= 38, "the limit")
        assert (await launch.run(["echo", "others"], linux=kinds)).out == "others\n"
        assert (await launch.exec(neighbour, ["echo", "neighbours"])).out == "neighbours\n"
        if shared:
            async with asyncio.timeout(SECONDS):
                await manager.kill(path)
            assert (await launch.wait(box.process)).signal == 9
        else:
            await launch.kill(box)
        await until(lambda: manager.processes(path) == [], "the end of all of them")
        assert launch.handler.alive(neighbour.process)

    in_launch(tmp_path, body, cgroups=True)


def harassed(signal: int) -> list[str]:
    """A program that sends a signal to all that it can reach, over and over."""
    return [
        *PYTHON,
        f"import os\nprint('up', flush=True)\nwhile True:\n try: os.kill(-1, {signal})\n except OSError: pass",
    ]


@pytest.mark.parametrize("shared", [False, True])
def test_a_container_that_kills_everything_in_its_pid_namespace(tmp_path: Path, shared: bool) -> None:
    """Also what is only on its way in: each start and each exec runs and is killed, or says that it was killed before."""

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        kinds = {"namespaces": namespaces(**({"pid": pod.pins["pid"]} if shared else {}))}
        box = await launch.start(harassed(9), mounts=python_mounts(), linux=kinds)
        assert await line(box) == "up"
        outcomes: set[str] = set()
        for number in range(30):
            try:
                coming = launch.run(SLEEP, linux=kinds) if shared and number % 2 else launch.exec(box, SLEEP)
                result = await coming
            except StartFailed as error:
                assert "the process was killed before it could start" in str(error), error
                outcomes.add("before")
            else:
                assert (result.code, result.signal) == (137, 9)
                outcomes.add("after")
        assert outcomes, "nothing was tried"
        assert launch.handler.alive(box.process) and pod.pause is not None and launch.handler.alive(pod.pause)
        assert (await launch.run(["echo", "others"])).out == "others\n"
        await launch.kill(box)
        assert await markers(launch) == [pod.pause.pid]

    in_launch(tmp_path, body)


def test_a_container_that_stops_everything_in_its_pid_namespace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is stopped on its way in is given up at its deadline; meanwhile others go on, and nothing of it stays."""
    monkeypatch.setattr(starting, "SETUP_TIMEOUT", 1.0)

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        kinds = {"namespaces": namespaces(pid=pod.pins["pid"])}
        box = await launch.start(harassed(19), mounts=python_mounts(), linux=kinds)
        assert await line(box) == "up"
        coming = [asyncio.ensure_future(launch.exec(box, ["true"])) for _ in range(4)]
        coming += [asyncio.ensure_future(launch.run(["true"], linux=kinds)) for _ in range(4)]
        assert (await launch.run(["echo", "others"])).out == "others\n"
        done, waiting = await asyncio.wait(coming, timeout=5)
        errors = [task.exception() for task in done]
        assert all(error is None or isinstance(error, DeadlineExceeded) for error in errors), errors
        await launch.kill(box)
        for made in list(launch.processes):  # those that were stopped after their exec
            launch.handler.signal(made, 9)
        await asyncio.gather(*waiting)
        assert any(errors) or waiting, "nothing was stopped"
        assert pod.pause is not None and await markers(launch) == [pod.pause.pid]

    in_launch(tmp_path, body)


async def markers(launch: Launch) -> list[int]:
    """PIDs that the launcher has on record, once it has reaped all else."""
    tasks = launch.run_directory / "tasks"
    await until(lambda: len(list(tasks.iterdir())) <= 1, "the reaping")
    return [int(path.name.partition(".")[0]) for path in tasks.iterdir()]


@pytest.mark.parametrize("shared", [False, True])
def test_containers_that_are_stopped_can_be_ended(tmp_path: Path, shared: bool) -> None:
    """SIGSTOP for its main process and for an exec in it; SIGTERM waits then, SIGKILL does not."""

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        kinds = {"namespaces": namespaces(**({"pid": pod.pins["pid"]} if shared else {}))}
        box = await launch.start(["sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.01; done"], linux=kinds)
        assert await line(box) == "up"
        other = await launch.begin_exec(box, SLEEP, launch.descriptors[0])
        both = (box.process, other)
        for made in both:
            launch.handler.signal(made, 19)
        await until(lambda: all(state(made.pid) == "T" for made in both), "the stop")
        launch.handler.signal(box.process, 15)
        assert state(box.process.pid) == "T"
        for made in (other, box.process):
            launch.handler.signal(made, 9)
            end = await launch.wait(made)
            assert (end.code, end.signal) == (137, 9)

    in_launch(tmp_path, body)


def state(pid: int) -> str:
    """A process's state letter."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_full_dev_and_dev_shm_are_the_containers_own_trouble(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        before = os.statvfs("/dev/shm").f_bavail
        shm = {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "size=1m"]}
        fill = "dd if=/dev/zero of=/dev/shm/x bs=64k; echo full; exec sleep 1000"
        box = await launch.start(["sh", "-c", fill], mounts=[shm])
        assert await line(box) == "full" and "No space left" in await line(box, "stderr")
        assert (await launch.exec(box, ["sh", "-c", "wc -c </dev/shm/x; echo x >/dev/shm/y"])).out.startswith(
            "1048576\n"
        )
        assert (await launch.run(["sh", "-c", "echo x >/dev/shm/y; cat /dev/shm/y"], mounts=[shm])).out == "x\n"
        assert abs(os.statvfs("/dev/shm").f_bavail - before) < 256
        await launch.kill(box)

    in_launch(tmp_path, body)


def test_a_container_that_floods_its_log_with_endless_lines(tmp_path: Path) -> None:
    """Its neighbours in the same logger are logged meanwhile, and the logger does not grow."""
    with Group(tmp_path) as group:
        group.start()
        loud, quiet = group.container("loud"), group.container("quiet")
        for box in (loud, quiet):
            group.add(box)
        flood = subprocess.Popen(["cat", "/dev/zero"], stdout=loud.writers["stdout"])
        try:
            sizes = []
            for number in range(20):
                os.write(quiet.writers["stdout"], b"line %d\n" % number)
                deadline = time.monotonic() + 5
                while (
                    quiet.log is None or not quiet.log.exists() or b"line %d\n" % number not in quiet.log.read_bytes()
                ):
                    assert time.monotonic() < deadline, "the quiet one is not heard"
                    time.sleep(0.005)
                sizes.append(resident(group.pid))
        finally:
            flood.kill()
            flood.wait()
        assert loud.log is not None and loud.log.stat().st_size > 1 << 20
        assert max(sizes) - sizes[2] < 2048, sizes


def resident(pid: int) -> int:
    """kB of memory that a process has."""
    return int(status(Path(f"/proc/{pid}/status").read_text())["VmRSS"].split()[0])


def test_a_container_sees_nothing_of_ours(tmp_path: Path) -> None:
    """No path of the node, no process of ours, no socket, no environment."""

    async def body(launch: Launch) -> None:
        os.environ["TARE_SECRET"] = "word"
        try:
            result = await launch.run(
                [
                    "sh",
                    "-c",
                    "cat /proc/1/environ; ls /proc | grep -E '^[0-9]+$'; cat /proc/net/unix; cat /proc/self/mountinfo",
                ]
            )
        finally:
            del os.environ["TARE_SECRET"]
        assert "word" not in result.out and "launcher" not in result.out
        pids = [entry for entry in result.out.splitlines() if entry.isdecimal()]
        assert all(int(pid) < 10 for pid in pids)
        leaks_of_paths = [entry for entry in result.out.splitlines() if str(launch.run_directory) in entry]
        assert leaks_of_paths == []

    in_launch(tmp_path, body)
