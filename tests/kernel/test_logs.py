"""The daemon's requests to loggers that a real launcher forks, with a real keeper of spares, each killed in its turn."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from tare.errors import DeadlineExceeded, Unavailable
from tare.handlers import interpreter
from tare.handlers.channel import Channel
from tare.handlers.logs import LogFailed, Logs
from tare.launch import linux, packets, wire
from tests.support.loggers import reassemble

LINE = 1000


class Processes:
    """Keeper and launcher of a run directory, and the loggers that it makes."""

    def __init__(self, run: Path, timeout: float) -> None:
        self.run = run
        self.groups: list[int] = []
        self.logs = Logs(run, self.start_logger, timeout=timeout)
        for name in ("tasks", "exits", "pods", "containers", "loggers", "rootfs"):
            (run / name).mkdir(parents=True, exist_ok=True)

    async def begin(self) -> None:
        """Start a keeper, which starts a launcher, and wait until both listen."""
        package = Path(interpreter.__file__).parents[2]
        command = [sys.executable, "-I", "-S", "-E", "-B", "-c", interpreter.BOOT, str(package), str(self.run), "test"]
        with subprocess.Popen(command, start_new_session=True) as process:
            self.groups.append(process.pid)
        self.keeper = Channel(self.run / "keeper.sock", "the keeper", lambda *_: None)
        self.launcher = Channel(self.run / "launcher.sock", "the launcher", lambda *_: None)
        for channel in (self.keeper, self.launcher):
            while True:
                try:
                    channel.connect()
                    break
                except OSError:
                    await asyncio.sleep(0.005)

        fields, _ = await self.keeper.request(wire.HELLO, (wire.VERSION,), doing="greet", timeout=10)
        self.keeper_pid = int(fields[1])

    async def end(self) -> None:
        """End them all, by force what does not end by itself."""
        try:
            await self.keeper.request(wire.QUIT, doing="quit", timeout=10)
            self.hang_up()
            until_dead(self.keeper_pid)
        finally:
            for group in self.groups:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)

    def hang_up(self) -> None:
        self.keeper.close()
        self.launcher.close()

    async def start_logger(self, group: str) -> None:
        await self.launcher.request(wire.LOGGER, (group.encode(),), doing="start a logger", timeout=10)

    def logger_pid(self, group: str = "g") -> int:
        return int((self.run / "loggers" / group / "pid").read_text().split()[0])

    async def kept(self, key: bytes) -> int:
        """How many descriptors the keeper has under a key."""
        _, fds = await self.keeper.request(wire.FETCH, (key,), doing="look", timeout=10)
        packets.close_all(fds)
        return len(fds)

    async def until_kept(self, keys: Sequence[bytes], counts: list[int]) -> None:
        """What a logger has told the keeper may come after what is asked here: it has a connection of its own."""
        async with asyncio.timeout(10):
            while [await self.kept(key) for key in keys] != counts:
                await asyncio.sleep(0)

    def writer(self, container: str, stream: str) -> int:
        """A container's own end of a stream."""
        return os.open(self.run / "containers" / container / stream, os.O_RDWR)


def until_dead(pid: int, number: int = 0) -> None:
    """Send a signal, and wait until a process is dead, unless it is already."""
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid)
        with os.fdopen(pidfd):
            signal.pidfd_send_signal(pidfd, number)
            assert select.select([pidfd], [], [], 10)[0]


def kill(pid: int) -> None:
    until_dead(pid, signal.SIGKILL)


def run(base: Path, test: Callable[[Processes], Awaitable[None]], timeout: float = 10) -> None:
    """A test with processes of its own, which are ended whatever happens."""

    async def main() -> None:
        processes = Processes(base, timeout)
        await processes.begin()
        try:
            await test(processes)
        finally:
            await processes.end()

    asyncio.run(main())


async def settle(processes: Processes, container: str = "c") -> None:
    """Until the container's FIFOs are empty and what was in them is logged."""
    for name in ("stdout", "stderr"):
        reader = os.open(processes.run / "containers" / container / name, os.O_RDONLY | os.O_NONBLOCK)
        while select.select([reader], [], [], 0)[0]:
            await processes.logs.drain("g", "nobody", 10)
        os.close(reader)
    await processes.logs.drain("g", "nobody", 10)


def test_a_containers_whole_life(tmp_path: Path) -> None:
    log = tmp_path / "pod" / "0.log"

    async def test(processes: Processes) -> None:
        logs = processes.logs
        await logs.add("g", "c", str(log), tty=None, stdin=True, max_line=LINE)
        await logs.add("g", "c", str(log), tty=None, stdin=True, max_line=LINE)
        assert sorted(os.listdir(tmp_path / "run/containers/c")) == ["stderr", "stdin", "stdout"]
        out, err = processes.writer("c", "stdout"), processes.writer("c", "stderr")
        os.write(out, b"old\n")
        await settle(processes)
        rotated = log.rename(tmp_path / "rotated")
        await logs.reopen("g", "c")
        os.write(out, b"new")
        os.write(err, b"x" * 2500)
        assert not await logs.drain("g", "c", 0.05)
        os.close(out)
        os.close(err)
        assert await logs.drain("g", "c", 10)
        await logs.remove("g", "c")
        await logs.remove("g", "c")
        assert os.listdir(tmp_path / "run/containers") == []
        assert reassemble(rotated.read_bytes()) == {"stdout": b"old\n"}
        assert reassemble(log.read_bytes(), LINE) == {"stdout": b"new\n", "stderr": b"x" * 2500 + b"\n"}
        await processes.until_kept((b"fifo/c/stdout", b"fifo/c/stdin"), [0, 0])

    run(tmp_path / "run", test)


def test_what_a_dead_container_left_survives_the_logger(tmp_path: Path) -> None:
    log = tmp_path / "0.log"

    async def test(processes: Processes) -> None:
        await processes.logs.add("g", "c", str(log), tty=None, stdin=False, max_line=LINE)
        await settle(processes)
        os.kill(processes.logger_pid(), signal.SIGSTOP)
        out = processes.writer("c", "stdout")
        os.write(out, b"last words\n")
        os.close(out)
        kill(processes.logger_pid())
        assert await processes.logs.drain("g", "c", 10)
        assert reassemble(log.read_bytes()) == {"stdout": b"last words\n"}

    run(tmp_path / "run", test)


def test_a_terminal_survives_the_logger(tmp_path: Path) -> None:
    log = tmp_path / "0.log"

    async def test(processes: Processes) -> None:
        master, slave = os.openpty()
        await processes.logs.add("g", "c", str(log), tty=master, stdin=True, max_line=LINE)
        os.close(master)
        await processes.logs.drain("g", "nobody", 10)
        for number in range(20):
            os.write(slave, b"line %d\n" % number)
            kill(processes.logger_pid())
            await processes.logs.drain("g", "nobody", 10)
        termios.tcdrain(slave)
        os.close(slave)
        assert await processes.logs.drain("g", "c", 10)
        assert reassemble(log.read_bytes())["stdout"] == b"".join(b"line %d\r\n" % number for number in range(20))
        await processes.logs.remove("g", "c")
        await processes.until_kept((b"tty/c",), [0])

    run(tmp_path / "run", test)


def test_a_terminal_loses_and_doubles_nothing_under_random_kills(tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    text = b"".join(b"%06d %s\n" % (number, b"x" * (number % 97)) for number in range(20000))
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)

    async def test(processes: Processes) -> None:
        master, slave = os.openpty()
        await processes.logs.add("g", "c", str(log), tty=master, stdin=True, max_line=LINE)
        os.close(master)
        writer = os.fork()
        if writer == 0:
            left = memoryview(text)
            while left:
                left = left[os.write(slave, left) :]
            os._exit(0)
        os.close(slave)
        kills = 0
        while os.waitpid(writer, os.WNOHANG)[0] == 0:
            await asyncio.sleep(chance.expovariate(1 / 0.003))
            kill(processes.logger_pid())
            await processes.logs.drain("g", "nobody", 10)
            kills += 1
        assert await processes.logs.drain("g", "c", 10)
        print(f"{kills} kills")
        assert reassemble(log.read_bytes())["stdout"] == text.replace(b"\n", b"\r\n")

    run(tmp_path / "run", test)


def test_a_new_keeper_is_given_everything_again(tmp_path: Path) -> None:
    keys = (b"fifo/c/stdout", b"fifo/c/stderr", b"fifo/c/stdin", b"tty/t", b"logger/g")

    async def test(processes: Processes) -> None:
        master, slave = os.openpty()
        await processes.logs.add("g", "c", "", tty=None, stdin=True, max_line=LINE)
        await processes.logs.add("g", "t", "", tty=master, stdin=False, max_line=LINE)
        await processes.until_kept(keys, [1, 1, 1, 1, 2])
        kill(processes.keeper_pid)
        processes.hang_up()
        await processes.begin()
        assert [await processes.kept(key) for key in keys] == [0, 0, 0, 0, 0]
        await processes.logs.drain("g", "nobody", 10)
        await processes.until_kept(keys, [1, 1, 1, 1, 2])
        packets.close_all([master, slave])

    run(tmp_path / "run", test)


def test_a_logger_that_does_not_answer_is_named(tmp_path: Path) -> None:
    log = tmp_path / "0.log"

    async def test(processes: Processes) -> None:
        logs = processes.logs
        await logs.add("g", "c", str(log), tty=None, stdin=False, max_line=LINE)
        os.kill(processes.logger_pid(), signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded) as caught:
            await logs.reopen("g", "c")
        assert caught.value.step == "logger of group g"
        assert str(log) in str(caught.value)
        # Hung-up requests fill the queue of the socket: more of them must not block the daemon.
        await asyncio.gather(*(logs.drain("g", "c", 0.2) for _ in range(200)))
        await logs.add("other", "d", str(tmp_path / "d.log"), tty=None, stdin=False, max_line=LINE)
        os.kill(processes.logger_pid(), signal.SIGCONT)

    run(tmp_path / "run", test, timeout=0.2)


def test_a_refusal_says_step_errno_and_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    async def test(processes: Processes) -> None:
        with pytest.raises(LogFailed) as caught:
            await processes.logs.add("g", "c", str(tmp_path / "file/0.log"), tty=None, stdin=False, max_line=LINE)
        assert (caught.value.errno, caught.value.code) == (errno.ENOTDIR, "FAILED_PRECONDITION")
        assert caught.value.step == "logger of group g, open log"
        assert str(tmp_path / "file") in str(caught.value)
        with pytest.raises(LogFailed, match="no log of this container here: nobody"):
            await processes.logs.reopen("g", "nobody")
        await processes.logs.remove("g", "c")

    run(tmp_path / "run", test)


def test_a_group_that_was_never_served_needs_no_logger(tmp_path: Path) -> None:
    async def test(processes: Processes) -> None:
        assert await processes.logs.drain("g", "c", 10)
        await processes.logs.remove("g", "c")
        assert not (tmp_path / "run/loggers/g").exists()

    run(tmp_path / "run", test)


def test_without_a_launcher_the_wait_ends_and_says_why(tmp_path: Path) -> None:

    async def refuse(group: str) -> None:
        raise Unavailable("start a logger", cause="the launcher is not there")

    logs = Logs(tmp_path, refuse, timeout=0.2)
    with pytest.raises(DeadlineExceeded, match="the launcher is not there"):
        asyncio.run(logs.add("g", "c", str(tmp_path / "log"), tty=None, stdin=False, max_line=LINE))


def test_requests_are_repeated_while_loggers_and_launchers_are_killed(tmp_path: Path) -> None:
    async def test(processes: Processes) -> None:
        for number in range(10):
            name = f"c{number}"
            await processes.logs.add("g", name, str(tmp_path / name), tty=None, stdin=False, max_line=LINE)
            out = processes.writer(name, "stdout")
            os.write(out, b"one\ntwo\n")
            os.close(out)
            victim = processes.logger_pid() if number % 2 else launcher(processes)
            drained = asyncio.ensure_future(processes.logs.drain("g", name, 10))
            await asyncio.sleep(0)
            kill(victim)
            assert await drained
            assert reassemble((tmp_path / name).read_bytes()) == {"stdout": b"one\ntwo\n"}
            await processes.logs.remove("g", name)

    def launcher(processes: Processes) -> int:
        pid, start = (int(word) for word in (processes.run / "launcher.pid").read_text().split())
        assert linux.same_process(pid, start)
        return pid

    run(tmp_path / "run", test)
