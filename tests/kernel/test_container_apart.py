"""A container whose process appears in a PID namespace of others with its privileges gone (`compile.is_apart`): it is like any other."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from tare.launch import mounts
from tests.support.launch import Launch, in_launch, line, namespaces, status

pytestmark = pytest.mark.root

FACTS = """
cat /proc/1/comm; hostname; cat /proc/self/stat; cat /proc/self/status
pwd; ulimit -n; cat /proc/timer_list | wc -c
"""


@pytest.fixture(params=["new", "old"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Before Linux 6.17 /proc comes from where the pod keeps one."""
    if request.param == "old":
        monkeypatch.setattr(mounts, "shows_other_pids", lambda: False)
    return str(request.param)


async def shared(launch: Launch, **more: Any) -> dict[str, Any]:
    """Changes of the linux object for a container in a pod's PID namespace."""
    pod = await launch.pod("pid")
    return {"namespaces": namespaces(pid=pod.pins["pid"]), **more}


def test_it_is_what_its_configuration_says(kernel: str, tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        result = await launch.run(
            ["sh", "-c", FACTS],
            linux=await shared(launch),
            hostname="apart",
            cwd="/tmp",
            user={"uid": 7, "gid": 8},
            noNewPrivileges=True,
            rlimits=[{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}],
            scheduler={"policy": "SCHED_BATCH", "nice": 5},
        )
        assert (result.code, result.err) == (0, "")
        first, name, stat, *rest = result.out.splitlines()
        assert (first, name, rest[-3:]) == ("tare-pod", "apart", ["/tmp", "77", "0"])
        fields = stat.rpartition(")")[2].split()
        assert fields[16] == "5" and fields[38] == "3"  # nice, SCHED_BATCH
        assert fields[3] != "0" and fields[4] == "0"  # a session of its own, no terminal
        facts = status("\n".join(rest[:-3]))
        assert (facts["Uid"].split()[0], facts["Gid"].split()[0], facts["NoNewPrivs"]) == ("7", "8", "1")
        assert int(facts["NSpid"]) > 1

    in_launch(tmp_path, body)


def test_its_terminal_is_its_own(kernel: str, tmp_path: Path) -> None:
    """It controls the session of the container's process, and is its console."""

    async def body(launch: Launch) -> None:
        script = "stty -onlcr; tty; test /dev/console -ef $(tty) && echo console; echo seen > /dev/tty; read word"
        box = await launch.start(["sh", "-c", script], terminal=True, linux=await shared(launch))
        said = b""
        while b"seen" not in said:
            await asyncio.sleep(0.01)
            said += os.read(box.terminal, 4096)
        assert said.decode().split() == ["/dev/pts/0", "console", "seen"]
        os.write(box.terminal, b"\n")
        assert (await launch.wait(box.process)).code == 0

    in_launch(tmp_path, body)


def test_one_process_is_enough_where_no_more_are_allowed(tmp_path: Path) -> None:
    """Who makes it would be a second one in its group, so it is made the other way."""

    async def body(launch: Launch) -> None:
        limits = {"pids": {"limit": 1}}
        wanted = await shared(launch, resources=limits)
        assert (await launch.run(["true"], resources=limits, linux=wanted)).code == 0

    in_launch(tmp_path, body, cgroups=True)


def test_it_joins_the_namespace_of_another_container(tmp_path: Path) -> None:
    """One that nobody keeps a /proc of: where the kernel makes none from outside either, the container's own process does."""

    async def body(launch: Launch) -> None:
        target = await launch.start(["sh", "-c", "echo up; sleep 1000; true"])
        assert await line(target) == "up"
        linux = {"namespaces": namespaces(pid=f"/proc/{target.process.pid}/ns/pid")}
        result = await launch.run(["cat", "/proc/1/cmdline"], linux=linux)
        assert result.out.split("\0")[:3] == ["sh", "-c", "echo up; sleep 1000; true"]

    in_launch(tmp_path, body)
