"""What a container can do to the node and to others, and what it can learn of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tare.handlers.builtin import StartFailed
from tests.support.launch import (
    Box,
    Launch,
    in_launch,
    line,
    until,
)

pytestmark = pytest.mark.root


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
            for _ in range(3):
                await launch.exec(box, ["true"])
        assert (await launch.run(["echo", "others"])).out == "others\n"
        await launch.kill(box)
        await until(lambda: manager.processes(path) == [], "the end of all of them")

    in_launch(tmp_path, body, cgroups=True)


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
