"""A container with a terminal: from its own devpts, its controlling terminal and its console, the master handed out before it runs."""

from __future__ import annotations

import fcntl
import os
import stat
import termios
from pathlib import Path

import pytest

from tare.handlers.builtin import StartFailed
from tests.support.launch import Box, Launch, bind, in_launch, python_mounts, readable, standard_mounts, until

pytestmark = pytest.mark.root

LOOK = """
import os, fcntl, termios
print(*(os.isatty(fd) for fd in range(3)), os.ttyname(0))
print(os.get_terminal_size(0).lines, os.get_terminal_size(0).columns)
print(os.tcgetpgrp(0) == os.getpgrp() == os.getpid(), os.getsid(0) == os.getpid())
tty, console = os.open("/dev/tty", os.O_RDWR), os.stat("/dev/console")
print(os.ttyname(tty), console.st_rdev == os.fstat(0).st_rdev, os.stat("/dev/pts/0").st_ino == console.st_ino)
print(sorted(os.listdir("/proc/self/fd")))
print("end")
"""
PYTHON = ["/usr/bin/python3", "-I", "-c"]


async def said(box: Box, end: str) -> list[str]:
    """What comes out of the terminal, up to a word."""
    text = ""
    while end not in text:
        await readable(box.terminal)
        text += os.read(box.terminal, 4096).decode()
    return text.replace("\r\n", "\n").splitlines()


def test_a_terminal(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        size = {"height": 33, "width": 101}
        script = LOOK + "\nimport sys; sys.stdin.readline()"
        box = await launch.start(
            [*PYTHON, script], mounts=python_mounts(), terminal=True, consoleSize=size, user={"uid": 1000, "gid": 1000}
        )
        lines = await said(box, "end")
        assert lines == [
            "True True True /dev/pts/0",
            "33 101",
            "True True",
            "/dev/tty True True",
            "['0', '1', '2', '3', '4']",
            "end",
        ]
        slave = Path(f"/proc/{box.process.pid}/root/dev/console").stat()
        assert slave.st_uid == 1000 and stat.S_IMODE(slave.st_mode) == 0o620
        os.write(box.terminal, b"\n")
        assert (await launch.wait(box.process)).code == 0

    in_launch(tmp_path, body)


def test_input_echo_and_interrupt(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        script = "trap 'echo caught; exit 5' INT; stty size; read word; echo got $word; read more"
        box = await launch.start(["sh", "-c", script], terminal=True, consoleSize={"height": 24, "width": 80})
        assert await said(box, "\n") == ["24 80"]
        os.write(box.terminal, b"hello\n")
        assert await said(box, "got hello") == ["hello", "got hello"]
        fcntl.ioctl(box.terminal, termios.TIOCSWINSZ, b"\x18\0\x50\0\0\0\0\0")
        os.write(box.terminal, b"\x03")
        assert await said(box, "caught\r\n") == ["^Ccaught"]
        assert (await launch.wait(box.process)).code == 5
        with pytest.raises(OSError, match="Input/output error"):  # the last holder of the other side is gone
            while os.read(box.terminal, 100):
                continue

    in_launch(tmp_path, body)


def test_nobody_but_us_holds_the_master(tmp_path: Path) -> None:
    """The launcher and the child let go of it: closing a terminal is an end for the container."""

    async def body(launch: Launch) -> None:
        box = await launch.start(["sh", "-c", "echo up; read word"], terminal=True)
        await said(box, "up")
        for pid in (launch.pid_of("launcher"), launch.pid_of("keeper"), box.process.pid):
            targets = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            assert not any("ptmx" in target for target in targets), (pid, targets)
        assert {os.readlink(f"/proc/{box.process.pid}/fd/{fd}") for fd in range(3)} == {"/dev/pts/0"}
        launch.descriptors.remove(box.terminal)
        os.close(box.terminal)
        end = await launch.wait(box.process)
        assert end.code in (1, 129)  # it reads an end of file, or the hangup comes first

    in_launch(tmp_path, body)


def test_each_container_has_terminals_of_its_own(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        before = set(os.listdir("/dev/pts"))
        for _ in range(2):
            box = await launch.start(["sh", "-c", "tty; ls /dev/pts; read x"], terminal=True)
            assert await said(box, "ptmx") == ["/dev/pts/0", "0     ptmx"]
        assert set(os.listdir("/dev/pts")) == before

    in_launch(tmp_path, body)


def test_without_a_devpts_there_is_no_terminal(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        identity, overlay, _ = launch.place()
        spec = launch.spec(["sh"], terminal=True)
        spec["mounts"] = [item for item in standard_mounts() if item["destination"] != "/dev/pts"]
        with pytest.raises(StartFailed) as caught:
            await launch.handler.start(identity, spec, overlay=overlay, cgroup=launch.cgroup(identity))
        assert (caught.value.step, caught.value.errno) == ("open a terminal", 2)

    in_launch(tmp_path, body)


def test_a_device_in_the_place_of_the_multiplexer_is_not_opened(tmp_path: Path) -> None:
    """A bind over /dev/pts brings a ptmx that is no terminal."""

    async def body(launch: Launch) -> None:
        fake = tmp_path / "pts"
        fake.mkdir()
        os.mkfifo(fake / "ptmx")
        with pytest.raises(StartFailed) as caught:
            await launch.start(["sh"], terminal=True, mounts=[bind("/dev/pts", fake)])
        assert caught.value.step == "open a terminal" and "is not the device 5:2: /dev/pts/ptmx" in str(caught.value)

    in_launch(tmp_path, body)


def test_a_failed_start_gives_the_terminal_back(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        await launch.run(["true"])
        launcher = launch.pid_of("launcher")
        before = len(os.listdir(f"/proc/{launcher}/fd"))
        with pytest.raises(StartFailed):
            await launch.start(["nonexistent"], terminal=True)
        with pytest.raises(StartFailed):
            await launch.start(["sh"], terminal=True, cwd="/bin/busybox")
        await until(lambda: len(os.listdir(f"/proc/{launcher}/fd")) == before, "the closing of all")

    in_launch(tmp_path, body)
