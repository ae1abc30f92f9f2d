"""What a container makes the launcher's child, by CLONE_PARENT, does not keep the container from ending."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from tare.handlers.builtin import Process
from tare.launch import launcher as launching
from tare.launch import linux, packets, wire
from tare.launch.children import Child
from tests.support.launch import Box, Launch, in_launch, line, namespaces, python_mounts, until

pytestmark = pytest.mark.root

PYTHON = ["/usr/bin/python3", "-I", "-c"]
SLEEP = ["sleep", "1000"]
SIBLINGS = """
import ctypes, os, signal, sys, time
CLONE_PARENT, CLONE = 0x8000, {"x86_64": 56, "aarch64": 220}[os.uname().machine]
libc = ctypes.CDLL(None)
def sibling(lives):
    pid = libc.syscall(ctypes.c_long(CLONE), ctypes.c_ulong(CLONE_PARENT | signal.SIGCHLD), *(ctypes.c_long(0),) * 4)
    if pid == 0:
        time.sleep(1000 if lives else 0)
        os._exit(0)
    assert pid > 0, os.strerror(ctypes.get_errno())
for number in range(20):
    sibling(lives=number % 2)
print("made", flush=True)
time.sleep(1000)
"""


def children(pid: int) -> list[int]:
    """A process's children, zombies too."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("shared", [False, True])
def test_children_that_an_exec_gives_to_the_launcher(tmp_path: Path, shared: bool) -> None:
    """Those that end are reaped while all else goes on; the container ends with the rest of them, and nothing is left."""

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        kinds = {"namespaces": namespaces(**({"pid": pod.pins["pid"]} if shared else {}))}
        launcher = launch.pid_of("launcher")
        was = children(launcher)
        box: Box = await launch.start(SLEEP, mounts=python_mounts(), linux=kinds)
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        launch.descriptors += [ours, theirs]
        made = await launch.begin_exec(box, [*PYTHON, SIBLINGS], theirs)
        assert await asyncio.to_thread(os.read, ours, 100) == b"made\n"
        known = {*was, box.process.pid, made.pid}
        await until(lambda: len(set(children(launcher)) - known) == 10, "the reaping of those that have ended", 5)
        assert (await launch.exec(box, ["echo", "others"])).out == "others\n"
        await end_all(launch, box, made)
        await until(lambda: children(launcher) == was, "the end of all of them", 5)
        assert launch.pid_of("launcher") == launcher

    in_launch(tmp_path, body, cgroups=True)


async def end_all(launch: Launch, box: Box, made: Process) -> None:
    """The end of a container with all that is in its cgroup."""
    assert launch.manager is not None
    async with asyncio.timeout(5):
        await launch.manager.kill(f"{launch.parent}/{box.id}")
        assert (await launch.wait(box.process)).signal == 9
        assert (await launch.wait(made)).signal == 9


def test_children_that_a_main_process_gives_to_the_launcher(tmp_path: Path) -> None:
    """In a PID namespace of the pod's, whose PID 1 is to end as well."""

    async def body(launch: Launch) -> None:
        pod = await launch.pod("pid")
        kinds = {"namespaces": namespaces(pid=pod.pins["pid"])}
        launcher = launch.pid_of("launcher")
        was = children(launcher)
        box = await launch.start([*PYTHON, SIBLINGS], mounts=python_mounts(), linux=kinds)
        assert await line(box) == "made"
        await until(lambda: len(children(launcher)) == len(was) + 11, "the reaping of those that have ended", 5)
        await launch.kill(box)
        async with asyncio.timeout(5):
            await launch.remove_pod(pod)
        await until(lambda: children(launcher) == [], "the end of all of them", 5)

    in_launch(tmp_path, body)


def test_a_child_that_is_reaped_before_its_maker_is_heard(tmp_path: Path) -> None:
    """What asked for it is told, and the launcher goes on."""
    pid, pidfd = linux.clone3()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    with packets.listen(str(tmp_path / "sock")) as listener:
        server = launching.Launcher(str(tmp_path), listener)
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made = Child(wire.EXEC, b"e", there, 1)
        assert made.status is not None
        server.loop.watch(made.status.fileno(), lambda: None)
        server.born_elsewhere(made, pid, pidfd)
        kind, request, fields, _ = packets.receive(here)
        assert (kind, request, fields[:2]) == (wire.FAILED, 1, [b"setup", 10])
        assert made.unwanted and not made.pid and not server.pids
        for end in (here, there, made.status, made.theirs):
            end.close()
        server.loop.epoll.close()
        for fd in server.signals:
            os.close(fd)
