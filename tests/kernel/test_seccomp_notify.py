"""Calls that an agent answers: the listener comes to it whatever the filter holds up, and what the agent says is what the program sees."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from tare.handlers.builtin import StartFailed
from tare.handlers.compile import Filter
from tare.launch import listener, outside, packets, wire
from tare.runtime.seccomp_compile import SeccompCompiler
from tests.support import leaks
from tests.support.launch import Launch, drain, in_launch, readable, until, user_namespace
from tests.support.seccomp import agent, number_of

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
HELD_UP = """
    read write close sendmsg recvmsg sendto recvfrom poll ppoll select mmap munmap mprotect brk futex prctl setgroups setresuid setresgid
    capset capget seccomp execve exit_group getpid clock_gettime rt_sigaction rt_sigprocmask kill tgkill openat fstat ioctl umask
"""
"""What a container's first process needs between its filter and its program, and whatever else it could say something by.
(runc refuses a profile that holds up write: its init speaks by that.)"""
Json = dict[str, Any]


def profile(names: list[str], listener: Path, metadata: str = "what is mine") -> Json:
    """Everything is allowed but these, which are the agent's."""
    return {
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": str(listener),
        "listenerMetadata": metadata,
        "syscalls": [{"names": names, "action": "SCMP_ACT_NOTIFY"}],
    }


def compiled(directory: Path, wanted: Json) -> Filter:
    """A profile as it is loaded."""
    return asyncio.run(SeccompCompiler(directory).compile(wanted))


@pytest.mark.parametrize("confined", [True, False])
def test_an_agent_answers(confined: bool, tmp_path: Path) -> None:
    """With no_new_privs the filter is the last before execve, without it comes before the capabilities go."""
    path = tmp_path / "agent.sock"
    filter = compiled(tmp_path / "seccomp", profile(["mkdir", "mkdirat"], path))

    async def body(launch: Launch) -> None:
        box = await launch.start(
            ["sh", "-c", "mkdir /tmp/x; echo done; exec sleep 1000"],
            noNewPrivileges=confined,
            annotations={"com.example.key": "value"},
        )
        await until(lambda: "done" in box.read() or bool(served.calls), "the call")
        [state] = served.states
        container = {
            "ociVersion": "1.2.0",
            "id": box.id,
            "status": "created",
            "pid": box.process.pid,
            "bundle": str(launch.run_directory / "hooked" / box.id),
            "annotations": {"com.example.key": "value"},
        }
        assert state == {
            "ociVersion": "1.2.0",
            "fds": ["seccompFd"],
            "pid": box.process.pid,
            "metadata": "what is mine",
            "state": container,
        }
        await until(lambda: "No space left" in box.read("stderr"), "the answer")
        assert not (box.upper / "tmp/x").exists()
        assert sorted(os.listdir(f"/proc/{box.process.pid}/fd")) == ["0", "1", "2"]
        await launch.kill(box)

    with agent(path, {number_of(name): errno.ENOSPC for name in ("mkdir", "mkdirat")}) as served:
        in_launch(tmp_path, body, filter=filter)


@pytest.mark.parametrize("confined", [True, False])
def test_the_listener_is_handed_over_whatever_the_filter_holds_up(confined: bool, tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    filter = compiled(tmp_path / "seccomp", profile(HELD_UP.split(), path))

    async def body(launch: Launch) -> None:
        result = await launch.run(["echo", "hello"], noNewPrivileges=confined, user={"uid": 5, "gid": 6})
        assert (result.code, result.out) == (0, "hello\n")
        execve, later = number_of("execve"), number_of("setresuid")
        assert execve in served.calls and (later in served.calls) == (not confined)

    with agent(path) as served:
        in_launch(tmp_path, body, filter=filter)


def test_in_a_user_namespace(tmp_path: Path) -> None:
    """The agent's socket is the node's root's, whom nobody in there is."""
    (tmp_path / "private").mkdir(mode=0o700)
    path = tmp_path / "private/agent.sock"
    filter = compiled(tmp_path / "seccomp", profile(["mkdir", "mkdirat"], path))

    async def body(launch: Launch) -> None:
        result = await launch.run(["mkdir", "/tmp/x"], linux=user_namespace())
        assert result.code == 1 and "No space left" in result.err
        assert len(served.states) == 1

    with agent(path, {number_of(name): errno.ENOSPC for name in ("mkdir", "mkdirat")}) as served:
        in_launch(tmp_path, body, filter=filter)


@pytest.mark.parametrize("confined", [True, False])
@pytest.mark.parametrize("more", [[], ["setsid"]])
def test_an_exec_has_a_listener_of_its_own(more: list[str], confined: bool, tmp_path: Path) -> None:
    """It is of the process that runs the program, whoever has loaded the filter: the first process does, if the filter lets it go on."""
    path = tmp_path / "agent.sock"
    wanted = profile(["mkdir", "mkdirat", *more], path, metadata="")
    filter = compiled(tmp_path / "seccomp", wanted)

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        launch.descriptors += (reading, writing)
        script = ["sh", "-c", "mkdir /tmp/y; exec sleep 1000"]
        given = {"seccomp": wanted, "noNewPrivileges": confined, "scheduler": {"policy": "SCHED_BATCH"}}
        made = await launch.begin_exec(box, script, writing, **given, container=box.id)
        await readable(reading)
        assert "No space left" in drain(reading)
        assert os.sched_getscheduler(made.pid) == os.SCHED_BATCH
        first, second = served.states
        assert "metadata" not in second and second["pid"] == made.pid
        assert second["state"] == first["state"] | {"status": "running"}
        await launch.kill(box)

    with agent(path, {number_of(name): errno.ENOSPC for name in ("mkdir", "mkdirat")}) as served:
        in_launch(tmp_path, body, filter=filter)


def test_hooks_in_the_container_have_the_filter_too(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    filter = compiled(tmp_path / "seccomp", profile(["mkdir", "mkdirat"], path))
    hook = {"path": "/bin/sh", "args": ["sh", "-c", "mkdir /tmp/z && exit 1 || exit 0"]}

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP, hooks={"startContainer": [hook]})
        assert len(served.states) == 1 and served.calls
        await launch.kill(box)
        await launch.handler.hooked.release(box.id)

    with agent(path, {number_of(name): errno.ENOSPC for name in ("mkdir", "mkdirat")}) as served:
        in_launch(tmp_path, body, filter=filter)


def test_without_an_agent_nothing_starts(tmp_path: Path) -> None:
    """No socket; one that nobody listens at; a file; a socket of another type. Nothing stays."""
    deaf, text, datagram = tmp_path / "deaf", tmp_path / "text", tmp_path / "datagram"
    text.write_text("")
    sockets = [socket.socket(socket.AF_UNIX, kind) for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)]
    for made, path in zip(sockets, (deaf, datagram), strict=True):
        made.bind(str(path))
    cases = [
        (tmp_path / "missing", errno.ENOENT),
        (deaf, errno.ECONNREFUSED),
        (text, errno.ECONNREFUSED),
        (datagram, errno.EPROTOTYPE),
    ]
    filters = {path: compiled(tmp_path / "seccomp", profile(["mkdir"], path)) for path, _ in cases}

    async def body(launch: Launch) -> None:
        for path, number in cases:
            launch.filter = filters[path]
            with pytest.raises(StartFailed) as caught:
                await launch.start(SLEEP)
            assert caught.value.errno == number and str(path) in str(caught.value), str(caught.value)
            assert caught.value.step == f"hand the seccomp listener to {path}"
            launcher = launch.pid_of("launcher")
            await until(lambda: not any(p.parent == launcher for p in leaks.processes()), "the end of the child")  # noqa: B023
            await until(lambda: not any(p.name == "tare-outside" for p in launch._ours()), "the end of its helper")

    try:
        in_launch(tmp_path, body, filter=filters[deaf])
    finally:
        for made in sockets:
            made.close()


def test_an_agent_that_hangs_up_dooms_the_process(tmp_path: Path) -> None:
    """It has the filter by then: it cannot be told, and is killed, with the errno where its maker finds it."""
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    reading, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    page = mmap.mmap(-1, mmap.PAGESIZE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(tmp_path / "agent.sock"))
        listening.listen()
        helper = os.fork()
        if helper == 0:
            given = outside.Outside(theirs, writing, page, pid)
            outside.attempt(
                writing, given, listener.listener, "hand it over", (os.fsencode(tmp_path / "agent.sock"), (b"{}",))
            )
            os._exit(0)
        assert packets.receive(reading)[0] == wire.OK
        listening.accept()[0].close()
        page[8:12] = (1).to_bytes(4, "little")  # its descriptor 0
        kind, _, fields, _ = packets.receive(status)
        assert (kind, fields[:2]) == (wire.FAILED, [b"hand it over", errno.EPIPE])
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]) == 1
        assert int.from_bytes(page[:4], "little") == errno.EPIPE
    for made in (reading, writing, status, theirs):
        made.close()


def test_an_agent_that_is_behind_is_waited_for(tmp_path: Path) -> None:
    """Its queue of connections is full for a while."""
    path = tmp_path / "agent.sock"
    filter = compiled(tmp_path / "seccomp", profile(["mkdir"], path))
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen(0)
    before = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before.connect(str(path))

    async def body(launch: Launch) -> None:
        start = asyncio.ensure_future(launch.start(SLEEP))
        await until(
            lambda: any(waits_to_connect(p.pid) for p in leaks.processes() if p.name == "tare-outside"), "the helper"
        )
        accepted = [listening.accept()[0] for _ in range(2)]
        await start
        data, fds, _, _ = socket.recv_fds(accepted[1], 65536, 4)
        assert b'"fds":["seccompFd"]' in data and len(fds) == 1
        for end in accepted:
            end.close()
        os.close(fds[0])

    try:
        in_launch(tmp_path, body, filter=filter)
    finally:
        before.close()
        listening.close()


def waits_to_connect(pid: int) -> bool:
    """Whether it sleeps in connect(2)."""
    try:
        return Path(f"/proc/{pid}/syscall").read_text().split()[0] == str(number_of("connect"))
    except OSError:
        return False
