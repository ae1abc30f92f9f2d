"""Starts that fail: at which step, with which errno, in which words, and that nothing of them stays."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from tare.errors import AlreadyExists, InvalidArgument
from tare.handlers.builtin import Process, StartFailed
from tare.handlers.compile import Filter
from tests.support import leaks
from tests.support.launch import Launch, bind, in_launch, namespaces, until
from tests.support.mounts import mounts_below

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]


def nothing_stays(launch: Launch) -> None:
    """No marker, no record, no mount, and no child of the launcher."""
    run = launch.run_directory
    assert not list((run / "tasks").iterdir()) and not list((run / "exits").iterdir())
    assert mounts_below(run) == []
    launcher = launch.pid_of("launcher")
    assert [process.pid for process in leaks.processes() if process.parent == launcher] == []


async def failure(launch: Launch, args: list[str], **changes: Any) -> StartFailed:
    """The error of a start that fails, when all of it is gone."""
    with pytest.raises(StartFailed) as caught:
        await launch.start(args, **changes)
    await all_gone(launch)
    return caught.value


async def all_gone(launch: Launch) -> None:
    """Wait for the end of what was begun."""
    launcher = launch.pid_of("launcher")
    await until(lambda: not any(process.parent == launcher for process in leaks.processes()), "the end of the child")
    await until(lambda: not launch.handler._errands, "the end of the errand")
    nothing_stays(launch)


def test_commands_that_cannot_be_executed(tmp_path: Path) -> None:
    image = tmp_path / "image"
    (image / "srv").mkdir(parents=True)
    (image / "srv/plain").write_text("text")
    (image / "srv/text").write_text("no program")
    (image / "srv/script").write_text("#!/no/such/interpreter\n")
    (image / "srv/elf").write_bytes(b"\x7fELF\x01\x01\x01" + bytes(9) + b"\x02\x00\x00\x01" + bytes(100))
    (image / "srv/circle").symlink_to("circle")
    for name in ("text", "script", "elf"):
        (image / "srv" / name).chmod(0o755)
    there = "is the command in the image, and is its interpreter?"
    cases = [
        ("nonexistent", 2, f"No such file or directory ({there})"),
        ("/srv/none", 2, f"No such file or directory ({there})"),
        ("/srv/script", 2, f"No such file or directory ({there})"),
        ("/srv/plain", 13, "Permission denied (is the command a file with execute permission?)"),
        ("/srv", 13, "Permission denied (is the command a file with execute permission?)"),
        ("/srv/text", 8, "Exec format error (is the command a program for this machine's architecture, or a script"),
        ("/srv/elf", 8, "Exec format error (is the command a program for this machine's architecture, or a script"),
        ("/srv/circle", 40, "Too many levels of symbolic links"),
        ("/srv/plain/x", 20, "Not a directory"),
        ("", 2, "No such file or directory"),
        ("x" * 300, 36, "File name too long"),
    ]

    async def body(launch: Launch) -> None:
        for command, errno, words in cases:
            error = await failure(launch, [command], lowers=[image])
            assert (error.step, error.errno) == ("exec", errno), command
            number = launch.boxes
            assert str(error).startswith(f"start container c{number}: at step exec: {command}: {words}"), str(error)

    in_launch(tmp_path, body)


def test_a_command_that_one_directory_of_the_path_forbids(tmp_path: Path) -> None:
    """As execvp(3): a file without permission is what is told, unless a later directory has a better one."""
    image = tmp_path / "image"
    (image / "first").mkdir(parents=True)
    (image / "first/only").write_text("")
    (image / "first/true").write_text("")

    async def body(launch: Launch) -> None:
        error = await failure(launch, ["only"], lowers=[image], env=["PATH=/first:/bin"])
        assert error.errno == 13
        assert (await launch.run(["true"], lowers=[image], env=["PATH=/none:/first:/bin"])).code == 0

    in_launch(tmp_path, body)


def test_a_user_without_permission(tmp_path: Path) -> None:
    image = tmp_path / "image"
    (image / "private").mkdir(parents=True, mode=0o700)
    (image / "private/true").symlink_to("/bin/busybox")
    (image / "private").chmod(0o700)

    async def body(launch: Launch) -> None:
        error = await failure(launch, ["/private/true"], lowers=[image], user={"uid": 1000, "gid": 1000})
        assert (error.step, error.errno) == ("exec", 13)
        assert (await launch.run(["/private/true"], lowers=[image])).code == 0

    in_launch(tmp_path, body)


def test_setup_that_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    async def body(launch: Launch) -> None:
        cwd = await failure(launch, SLEEP, cwd="/bin/busybox")
        assert (cwd.step, cwd.errno) == ("change to the working directory", 20)
        deep = await failure(launch, SLEEP, cwd="/bin/busybox/x")
        assert deep.step == "change to the working directory" and "bin/busybox" in str(deep)
        source = await failure(launch, SLEEP, mounts=[bind("/x", tmp_path / "none")])
        assert str(source) == f"start container c3: at step mount /x: No such file or directory: {tmp_path}/none"
        missing = {"namespaces": namespaces(network=tmp_path / "none")}
        namespace = await failure(launch, SLEEP, linux=missing)
        assert (namespace.step, namespace.errno) == (f"open network namespace {tmp_path}/none", 2)
        no_namespace = {"namespaces": namespaces(network=tmp_path / "file")}
        entered = await failure(launch, SLEEP, linux=no_namespace)
        assert (entered.step, entered.errno) == ("enter network namespace", 22)
        pid = await failure(launch, SLEEP, linux={"namespaces": namespaces(pid=tmp_path / "none")})
        assert (pid.step, pid.errno) == (f"open pid namespace {tmp_path}/none", 2)
        device = {"path": "/dev/zero/x", "type": "c", "major": 1, "minor": 3}
        assert (await failure(launch, SLEEP, linux={"devices": [device]})).step == "make /dev/zero/x"
        user = await failure(launch, SLEEP, user={"uid": 1 << 31, "gid": 1 << 33})
        assert user.step == f"become user {1 << 31}:{1 << 33}"
        late = await failure(launch, SLEEP, scheduler={"policy": "SCHED_ISO"})
        assert (late.step, late.errno) == ("set the scheduler", 22)
        # After all that the launcher is the same and serves.
        assert (await launch.run(["true"])).code == 0

    in_launch(tmp_path, body)


@pytest.mark.parametrize("no_new_privileges", [False, True])
def test_a_filter_that_the_kernel_refuses(tmp_path: Path, no_new_privileges: bool) -> None:
    async def body(launch: Launch) -> None:
        error = await failure(launch, SLEEP, noNewPrivileges=no_new_privileges)
        assert (error.step, error.errno) == ("load the seccomp filter", 22)
        assert "Invalid argument" in str(error)

    in_launch(tmp_path, body, filter=Filter(program=b"\xff" * 8))


def test_a_filter_that_forbids_execve(tmp_path: Path) -> None:
    """Even then the errno comes out, by the shared page: nothing else is certain to be allowed."""
    lines = b"\x20\0\0\0\0\0\0\0" + b"\x15\0\0\x01\x3b\0\0\0" + b"\x06\0\0\0\x01\0\x05\0" + b"\x06\0\0\0\0\0\xff\x7f"

    async def body(launch: Launch) -> None:
        error = await failure(launch, SLEEP)
        assert (error.step, error.errno) == ("exec", 1) and "Operation not permitted" in str(error)

    in_launch(tmp_path, body, filter=Filter(program=lines))


def test_a_filter_that_kills(tmp_path: Path) -> None:
    """A process that dies before its execve has not started."""
    everything = b"\x06\0\0\0\0\0\0\x80"

    async def body(launch: Launch) -> None:
        with pytest.raises(StartFailed, match="killed before it could start"):
            await launch.start(SLEEP, noNewPrivileges=False)
        # With no_new_privs the filter is loaded last, and execve itself is what it kills for: that cannot be told from a
        # program that is killed at once, and is reported as one.
        result = await launch.run(SLEEP, noNewPrivileges=True)
        assert (result.code, result.signal) == (159, 31)

    in_launch(tmp_path, body, filter=Filter(program=everything))


def test_what_is_wrong_with_the_request_makes_nothing(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        wrong: list[dict[str, Any]] = [
            {"env": ["A\0"]},
            {"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 20, "hard": 10}]},
            {"hooks": {"poststop": [{"path": "relative"}]}},
            {"linux": {"namespaces": []}},
            {"args": ["sh", "x" * (20 << 20)]},
        ]
        for changes in wrong:
            with pytest.raises(InvalidArgument):
                await launch.start(**({"args": SLEEP} | changes))
        nothing_stays(launch)

    in_launch(tmp_path, body)


def test_arguments_that_are_too_long_for_the_kernel(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        error = await failure(launch, ["sh", "x" * (1 << 20)])
        assert (error.step, error.errno) == ("exec", 7)

    in_launch(tmp_path, body)


def test_two_by_one_name(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        identity, overlay, _ = launch.place()
        spec = launch.spec(SLEEP)
        with pytest.raises((StartFailed, AlreadyExists), match="by this name"):
            await launch.handler.start(box.id, spec, overlay=overlay, cgroup=launch.cgroup(identity))
        assert launch.handler.alive(box.process)

    in_launch(tmp_path, body)


def test_an_observer_that_fails_ends_the_process_at_its_gate(tmp_path: Path) -> None:
    made: list[Process] = []

    async def body(launch: Launch) -> None:
        def look(process: Process) -> None:
            made.append(process)
            raise RuntimeError("the database is full")

        with pytest.raises(RuntimeError):
            await launch.start(SLEEP, on_created=look)
        await all_gone(launch)
        assert not Path(f"/proc/{made[0].pid}").exists()

    in_launch(tmp_path, body)


def test_a_start_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    """Cancelled wherever it is: making, at the gate, or just past it."""

    async def body(launch: Launch) -> None:
        for pause in (0.0, 0.001, 0.002, 0.003, 0.004, 0.006, 0.008, 0.012):
            task = asyncio.ensure_future(launch.start(SLEEP))
            await asyncio.sleep(pause)
            if task.done():
                await launch.kill(task.result())
                continue
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await all_gone(launch)

    in_launch(tmp_path, body)


def test_streams_that_are_missing(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        identity, overlay, _ = launch.place()
        os.unlink(launch.run_directory / "containers" / identity / "stderr")
        with pytest.raises(StartFailed) as caught:
            await launch.handler.start(identity, launch.spec(SLEEP), overlay=overlay, cgroup=launch.cgroup(identity))
        assert (caught.value.step, caught.value.errno) == ("open stderr", 2)

    in_launch(tmp_path, body)
