"""Commands of the node that the launcher runs: what they are, how they end, and that none is waited for for ever."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tare.errors import DeadlineExceeded, Unavailable
from tare.handlers.channel import Refused
from tare.handlers.commands import TAIL, Commands, children
from tare.handlers.processes import Process, Processes
from tare.launch import linux
from tests.support.launch import Launch, in_launch, second_daemon, status, until

pytestmark = pytest.mark.root

SHELL = "/bin/sh"
LONG = 60.0


def shell(script: str) -> list[str]:
    """A command line."""
    return [SHELL, "-c", script]


def commands(launch: Launch) -> Commands:
    """Those of the test's handler."""
    return launch.handler.commands


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def left(launch: Launch) -> list[str]:
    """Markers and exit records."""
    return [path.name for name in ("tasks", "exits") for path in (launch.run_directory / name).iterdir()]


def number_in(path: Path) -> int:
    """The number in a file, once it is there; 0 before."""
    text = path.read_text() if path.exists() else ""
    return int(text) if text.endswith("\n") else 0


async def begun(path: Path) -> int:
    """The number in a file, waited for."""
    await until(lambda: number_in(path) > 0, "the command")
    return number_in(path)


async def replaced(launch: Launch, old: int) -> None:
    """Until there is another launcher."""
    await until(lambda: launch.pid_of("launcher") not in (0, old), "another launcher")


async def gone(pid: int) -> None:
    """Until there is no such process."""
    await until(lambda: not os.path.exists(f"/proc/{pid}"), f"the end of process {pid}")


def test_codes_and_words(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        run = commands(launch).run
        assert await run(shell("exit 0"), timeout=LONG) == (0, "")
        assert await run(shell("echo lost; echo said >&2; exit 7"), timeout=LONG) == (7, "said")
        assert await run(shell("kill -TERM $$"), timeout=LONG) == (143, "")
        code, words = await run(shell(f"yes 0123456 | head -c {40 * TAIL} >&2; echo last >&2"), timeout=LONG)
        assert code == 0 and words.endswith("last") and len(words) <= TAIL
        assert not left(launch)

    in_launch(tmp_path, body)


def test_what_it_reads(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        for data in (b"", b"{}", bytes(range(256)) * 1024):
            result, said = await commands(launch).capture(shell("wc -c"), timeout=LONG)
            assert (result.code, said) == (0, "0")
            out = os.memfd_create("out", os.MFD_CLOEXEC)
            launch.descriptors.append(out)
            assert (await commands(launch).run(["/bin/cat"], stdin=data, stdout=out, timeout=LONG)).code == 0
            assert os.pread(out, len(data) + 1, 0) == data
        source, feed = os.pipe2(os.O_CLOEXEC)
        os.write(feed, b"piped")
        os.close(feed)
        launch.descriptors.append(source)
        out = os.memfd_create("out", os.MFD_CLOEXEC)
        launch.descriptors.append(out)
        assert (await commands(launch).run(["/bin/cat"], stdin=source, stdout=out, timeout=LONG)).code == 0
        assert os.pread(out, 9, 0) == b"piped"

    in_launch(tmp_path, body)


def test_what_it_is(tmp_path: Path) -> None:
    """The node's namespaces, a session of its own, no descriptor but its streams, no signal ignored, only the environment given."""

    async def body(launch: Launch) -> None:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        launch.descriptors.append(null)
        process = await commands(launch).spawn(
            ["/bin/sleep", "1000"], env={"ONLY": "this"}, cwd="/tmp", stdin=null, stdout=null, stderr=null
        )
        entry = Path(f"/proc/{process.pid}")
        facts = status((entry / "status").read_text())
        for mask in ("SigIgn", "SigBlk", "SigCgt"):
            assert int(facts[mask], 16) == 0, mask
        assert facts["Umask"] == "0022"
        assert (entry / "environ").read_bytes() == b"ONLY=this\0"
        assert (entry / "cwd").readlink() == Path("/tmp")
        # The loader of a program has its libraries open for a moment.
        await until(lambda: sorted(os.listdir(entry / "fd")) == ["0", "1", "2"], "nothing but its streams")
        assert os.getsid(process.pid) == os.getpgid(process.pid) == process.pid
        for kind in ("mnt", "pid", "net", "ipc", "uts", "user"):
            assert (entry / "ns" / kind).stat().st_ino == Path(f"/proc/self/ns/{kind}").stat().st_ino
        assert int(facts["PPid"]) == launch.pid_of("launcher")
        assert (launch.run_directory / "tasks" / f"{process.pid}.{process.start_time}").exists()
        launch.handler.signal(process, signal.SIGINT)
        assert (await launch.wait(process)).code == 130

    in_launch(tmp_path, body)


def test_what_cannot_be_run(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        for argv, cwd, word in (
            (["/no/such"], "/", "No such file"),
            (["/etc/passwd"], "/", "Permission denied"),
            ([SHELL], "/no/dir", "No such file"),
        ):
            with pytest.raises(Refused, match=word):
                await commands(launch).run(argv, cwd=cwd, timeout=LONG)
        assert not left(launch)

    in_launch(tmp_path, body)


def test_the_time_is_over_for_the_whole_group(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        child, words = tmp_path / "child", "it waits"
        script = f"sleep 1000 & echo $! > {child}; echo {words} >&2; wait"
        with pytest.raises(DeadlineExceeded, match=f"did not end within 0.5 s; it said: {words}"):
            await commands(launch).run(shell(script), timeout=0.5)
        await gone(int(child.read_text()))
        assert not left(launch)

    in_launch(tmp_path, body)


def test_time_is_kept_without_a_daemon(tmp_path: Path) -> None:
    """The daemon is killed in the middle: the launcher ends the command when its time is over, and nothing waits."""

    async def body(launch: Launch) -> None:
        async with second_daemon(launch) as daemon:
            child = tmp_path / "child"
            script = f"sleep 1000 & echo $! > {child}; wait"
            call = asyncio.ensure_future(daemon.commands.run(shell(script), timeout=1.0))
            await begun(child)
            await until(lambda: len(daemon.commands.live) == 1, "the answer")
            daemon.close()  # as the kernel does where a daemon is killed
            await gone(number_in(child))
            with pytest.raises(DeadlineExceeded):
                await call

    in_launch(tmp_path, body)


def test_a_command_of_an_earlier_daemon_is_ended(tmp_path: Path) -> None:
    """With everything below it, in whatever session that is; containers and execs of that daemon are not touched."""

    async def body(launch: Launch) -> None:
        box = await launch.start(["sleep", "1000"])
        child = tmp_path / "child"
        script = f"setsid sh -c 'echo $$ > {child}; sleep 1000; :' & wait"
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        launch.descriptors.append(null)
        process = await commands(launch).spawn(shell(script), stdin=null, stdout=null, stderr=null)
        await begun(child)
        async with second_daemon(launch) as daemon:
            await daemon.commands.end_strays()
        # Its record went with what the other daemon knew of it; the kernel may remember.
        end = await launch.wait(process)
        assert (end.code, end.known) in ((137, True), (255, False)), end
        await gone(number_in(child))
        assert launch.handler.alive(box.process)

    in_launch(tmp_path, body)


@pytest.mark.parametrize("reaped", [False, True])
def test_who_has_the_pid_of_a_command_that_is_gone_is_spared(tmp_path: Path, reaped: bool) -> None:
    """Also where the command's own pidfd is still held; the same with the right start time is killed, with what is below it."""
    (tmp_path / "exits").mkdir()
    other = subprocess.Popen(["/bin/sh", "-c", "sleep 1000 & sleep 1001 & wait"], start_new_session=True)
    try:
        deadline = time.monotonic() + LONG
        while len(children(other.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        below = children(other.pid)
        known = Processes(tmp_path)
        start = linux.start_time(other.pid)
        gone = Process(other.pid, start - 1)
        if reaped:
            ended = subprocess.Popen(["/bin/true"])
            known.adopt(gone, os.pidfd_open(ended.pid))
            ended.wait()
        Commands(no_plan, no_plan, known, tmp_path).kill(gone)
        assert children(other.pid) == below and len(below) == 2 and other.poll() is None
        Commands(no_plan, no_plan, known, tmp_path).kill(Process(other.pid, start))
        assert other.wait() == -9
        for process in (gone, Process(other.pid, start)):
            known.forget(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(other.pid, signal.SIGKILL)
        other.wait()


async def no_plan(*_: object) -> tuple[list[bytes | int], list[int]]:
    """Nothing is to be run."""
    raise AssertionError("a plan is sent")


def test_the_launcher_is_killed_in_the_middle(tmp_path: Path) -> None:
    """The exit code is known all the same; and its time is over all the same."""

    async def body(launch: Launch) -> None:
        for script, timeout in (("sleep 0.6; exit 5", LONG), ("sleep 1000 & wait", 1.0)):
            file = tmp_path / f"begun{timeout}"
            call = asyncio.ensure_future(commands(launch).run(shell(f"echo 1 > {file}; {script}"), timeout=timeout))
            await begun(file)
            await until(lambda: len(commands(launch).live) == 1, "the answer")
            old = launch.pid_of("launcher")
            await launch.kill_ours("launcher")
            if timeout == LONG:
                assert (await call).code == 5
            else:
                with pytest.raises(DeadlineExceeded):
                    await call
            await replaced(launch, old)
        assert not left(launch)

    in_launch(tmp_path, body)


def test_who_leaves_ends_it(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        child = tmp_path / "child"
        call = asyncio.ensure_future(commands(launch).run(shell(f"echo $$ > {child}; sleep 1000"), timeout=LONG))
        await begun(child)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await gone(number_in(child))
        await until(lambda: not left(launch), "its record to be forgotten")

    in_launch(tmp_path, body)


def test_nothing_piles_up(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        run = commands(launch).run

        async def some() -> None:
            results = await asyncio.gather(*(run(shell("exit 3"), stdin=b"x", timeout=LONG) for _ in range(4)))
            assert [result.code for result in results] == [3] * 4
            with pytest.raises(Refused):
                await run(["/no/such"], timeout=LONG)
            with pytest.raises(DeadlineExceeded):
                await run(["/bin/sleep", "1000"], timeout=0.02)

        await some()
        launcher = launch.pid_of("launcher")
        before = descriptors(launcher), descriptors(os.getpid())
        for _ in range(5):
            await some()
        assert (descriptors(launcher), descriptors(os.getpid())) == before
        assert not left(launch)

    in_launch(tmp_path, body)


def test_the_launcher_dies_over_the_request(tmp_path: Path) -> None:
    """The call ends at once, with the command's code or as Unavailable; one that had begun is ended by the next daemon."""

    async def body(launch: Launch) -> None:
        for pause in (0.0, 0.0005, 0.001, 0.002):
            old = launch.pid_of("launcher")
            call = asyncio.ensure_future(commands(launch).run(["/bin/sleep", "1000"], timeout=LONG))
            await asyncio.sleep(pause)
            await launch.kill_ours("launcher")
            await replaced(launch, old)
            if call.done():
                with pytest.raises(Unavailable):
                    await call
            else:
                call.cancel()
            await asyncio.wait([call])
        await commands(launch).end_strays()
        await until(lambda: not left(launch), "all of them to be forgotten")

    in_launch(tmp_path, body)


LEAVES = """
import os, sys, time
pid = os.fork()
if not pid:
    {child}
    os._exit({code})
open({file!r}, "w").write(str(pid))
{parent}
os._exit(0)
"""


@pytest.mark.parametrize("child", ["", "time.sleep(0.2)", "os.kill(os.getpid(), 9)"])
@pytest.mark.parametrize("parent", ["", "time.sleep(0.2)"])
def test_what_a_command_leaves_behind_is_stood_in_for(tmp_path: Path, child: str, parent: str) -> None:
    """Its exit code is known whichever of the two ends first."""

    async def body(launch: Launch) -> None:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        launch.descriptors.append(null)
        file = str(tmp_path / "pid")
        script = LEAVES.format(child=child, code=6, file=file, parent=parent)
        argv = ["/usr/bin/python3", "-I", "-S", "-c", script]
        made = await commands(launch).spawn(argv, stdin=null, stdout=null, stderr=null, pid_file=file)
        assert made.pid != int(Path(file).read_text())
        assert (await launch.wait(made)).code == (137 if "kill" in child else 6)
        commands(launch).forget(made)
        assert not left(launch)

    in_launch(tmp_path, body)


def test_what_is_stood_in_for_keeps_its_own_streams_alone(tmp_path: Path) -> None:
    """The end of file comes when it has ended, though the one that stands in for it and the launcher live on."""

    async def body(launch: Launch) -> None:
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        launch.descriptors += (ours, null)
        file = str(tmp_path / "pid")
        script = LEAVES.format(child="os.close(1); time.sleep(1000)", code=0, file=file, parent="")
        argv = ["/usr/bin/python3", "-I", "-S", "-c", script]
        made = await commands(launch).spawn(argv, stdin=null, stdout=theirs, stderr=null, pid_file=file)
        os.close(theirs)
        assert os.read(ours, 1) == b""
        commands(launch).kill(made)
        assert (await launch.wait(made)).code == 137
        commands(launch).forget(made)

    in_launch(tmp_path, body)


def test_one_that_leaves_nothing_behind(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        launch.descriptors.append(null)
        for script, words in (("exit 3", "it ended with 3"), ("exit 0", "No such file")):
            with pytest.raises(Refused, match=words):
                file = str(tmp_path / "pid")
                await commands(launch).spawn(shell(script), stdin=null, stdout=null, stderr=null, pid_file=file)
        assert not left(launch)

    in_launch(tmp_path, body)


def test_it_joins_groups(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        cgroup = launch.cgroup("c1")
        launch.boxes = 1
        out = os.memfd_create("out", os.MFD_CLOEXEC)
        launch.descriptors.append(out)
        result = await commands(launch).run(
            ["/bin/cat", "/proc/self/cgroup"], stdout=out, timeout=LONG, join=cgroup.join
        )
        lines = os.pread(out, 1 << 16, 0).decode().splitlines()
        assert result.code == 0 and sum(line.endswith(cgroup.path) for line in lines) >= len(cgroup.join)

    in_launch(tmp_path, body, cgroups=True)


def test_a_command_whose_answer_was_lost_is_ended_before_the_call_fails(tmp_path: Path) -> None:
    """Nothing of it runs any more when the caller hears of it, so that it can be asked for again; a command of another caller goes on."""

    async def body(launch: Launch) -> None:
        other = asyncio.ensure_future(commands(launch).run(shell("sleep 2; exit 5"), timeout=LONG))
        await until(lambda: len(commands(launch).live) == 1, "the other command")
        lost: list[None] = []
        commands(launch).on_lost = lambda: lost.append(None)
        launch.signal_ours("launcher", signal.SIGSTOP)
        child = tmp_path / "child"
        call = asyncio.ensure_future(commands(launch).run(shell(f"echo $$ > {child}; sleep 1000"), timeout=LONG))
        await asyncio.sleep(0.1)
        old = launch.signal_ours("launcher", signal.SIGCONT)
        while not call.done() and not child.exists():
            await asyncio.sleep(0)
        os.kill(old, signal.SIGKILL)
        try:
            await asyncio.wait_for(asyncio.shield(call), 5)
        except Unavailable:
            assert lost and commands(launch).live != set()
            if child.exists() and number_in(child):
                await gone(number_in(child))
        except TimeoutError:  # the answer came all the same
            call.cancel()
            await asyncio.wait([call])
        assert (await other).code == 5
        await until(lambda: not os.listdir(launch.run_directory / "tasks"), "the markers to go")

    in_launch(tmp_path, body)
