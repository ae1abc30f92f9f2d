"""Keeper and launcher are told nonsense, and go on."""

from __future__ import annotations

import array
import asyncio
import os
import random
import signal
import socket
from pathlib import Path

import pytest

from tare.handlers.builtin import StartFailed
from tare.launch import packets, plan, wire
from tare.launch.launcher import Launcher
from tests.support import leaks
from tests.support.launch import Launch, in_launch, until
from tests.support.trace import Trace

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
WAIT = 10.0


class Client:
    """A raw connection to keeper or launcher."""

    def __init__(self, launch: Launch, name: str) -> None:
        self.socket = packets.connect(f"{launch.run_directory}/{name}.sock")
        self.socket.settimeout(WAIT)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, packet: bytes, fds: tuple[int, ...] = ()) -> None:
        """Any bytes, with any descriptors."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.socket.sendmsg([packet], rights, socket.MSG_NOSIGNAL)

    async def answer(self) -> tuple[int, list[wire.Field]] | None:
        """(kind, fields) of the answer; None where the other side hangs up."""
        try:
            kind, _, fields, fds = await asyncio.to_thread(packets.receive, self.socket)
        except packets.Closed:
            return None
        packets.close_all(fds)
        return kind, fields


def health(launch: Launch) -> list[tuple[int, int]]:
    """PIDs of keeper and launcher, and how many descriptors each has."""
    pids = [launch.pid_of("keeper"), launch.pid_of("launcher")]
    return [(pid, len(os.listdir(f"/proc/{pid}/fd"))) for pid in pids]


async def settled(launch: Launch) -> list[tuple[int, int]]:
    """The same once both have taken the daemon's connections, and nothing of that is on its way any more."""
    await launch.handler.check_sources([("/", False)])
    seen = [health(launch)]
    while len(seen) < 5 or len({tuple(each) for each in seen[-5:]}) > 1:
        await asyncio.sleep(0.02)
        seen.append(health(launch))
    return seen[-1]


@pytest.mark.parametrize("name", ["keeper", "launcher"])
def test_bytes_that_are_no_message_end_the_connection_and_nothing_else(tmp_path: Path, name: str) -> None:
    async def body(launch: Launch) -> None:
        before = await settled(launch)
        noise = random.Random(7)
        packets_of_noise = [
            b"\0",
            b"T",
            wire.encode(wire.HELLO, 1)[:-1],
            wire.encode(wire.HELLO, 1) + b"x",
            wire.encode(wire.STORE, 1, (b"key",))[:-1],
            b"T" + bytes(7),
            b"T\xff\xff\xff\xff\xff\xff\xff" + bytes(100),
            bytes(wire.MAX_PACKET),
            bytes(wire.MAX_PACKET + 5000),
            *(noise.randbytes(noise.randrange(1, 200)) for _ in range(50)),
        ]
        for packet in packets_of_noise:
            with Client(launch, name) as client:
                client.send(packet)
                reply = await client.answer()
                assert reply is None or reply[0] in (wire.OK, wire.FAILED)
        with Client(launch, name) as client:
            client.send(b"")
            assert await client.answer() is None
        await until(lambda: health(launch) == before, "the closing of the connections")

    in_launch(tmp_path, body)


@pytest.mark.parametrize("name", ["keeper", "launcher"])
def test_every_kind_with_wrong_fields(tmp_path: Path, name: str) -> None:
    """Too few, too many, of the wrong kind, without the descriptors: refused on a connection that goes on."""

    async def body(launch: Launch) -> None:
        before = await settled(launch)
        shapes: list[tuple[bytes | int, ...]] = [(), (1,), (b"", b"", b"", b""), (-1, -1, -1), (b"x" * 1000, 5, 5)]
        with Client(launch, name) as client:
            for kind in [*range(60), 255]:
                if kind == wire.HELLO or (kind == wire.QUIT and name == "keeper"):
                    continue
                for fields in shapes:
                    client.send(wire.encode(kind, 9, fields))
                    assert (await client.answer() or (0,))[0] == wire.FAILED, (kind, fields)
            client.send(wire.encode(wire.HELLO, 9) if name == "keeper" else wire.encode(wire.ABANDON, 9, (b"?",)))
            assert (await client.answer() or (0,))[0] == wire.OK
        await until(lambda: health(launch) == before, "the closing of the connection")
        assert (await launch.run(["true"])).code == 0

    in_launch(tmp_path, body)


@pytest.mark.parametrize("name", ["keeper", "launcher"])
def test_descriptors_that_nobody_asked_for_are_closed(tmp_path: Path, name: str) -> None:
    async def body(launch: Launch) -> None:
        before = await settled(launch)
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        with Client(launch, name) as client:
            for kind in (wire.HELLO, wire.FETCH, wire.DROP, wire.START, wire.ABANDON, 99, 0):
                client.send(wire.encode(kind, 1, (b"nothing",)), (theirs,) * 5)
                assert await client.answer() is not None
        with Client(launch, name) as client:
            client.send(b"nonsense", (theirs,) * 5)
            assert await client.answer() is None
        with Client(launch, name) as client:  # more than there is room for
            client.send(wire.encode(wire.STORE, 1, (b"k",)), (theirs,) * (wire.MAX_FDS + 30))
            assert await client.answer() is None
        os.close(theirs)
        assert await asyncio.to_thread(os.read, ours, 1) == b""  # nobody has the other end any more
        os.close(ours)
        await until(lambda: health(launch) == before, "the closing of the connections")

    in_launch(tmp_path, body)


def test_what_the_keeper_keeps(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        before = await settled(launch)
        first, second = os.pipe2(os.O_CLOEXEC)
        with Client(launch, "keeper") as client:
            for key in (b"a/1", b"a/2", b"b"):
                client.send(wire.encode(wire.STORE, 1, (key,)), (first, second))
                assert await client.answer() == (wire.OK, [])
            client.send(wire.encode(wire.STORE, 1, (b"b",)), (second,))  # in the place of the two
            assert await client.answer() == (wire.OK, [])
            client.send(wire.encode(wire.FETCH, 5, (b"b",)))
            *_, fds = await asyncio.to_thread(packets.receive, client.socket)
            assert len(fds) == 1
            assert os.readlink(f"/proc/self/fd/{fds[0]}") == os.readlink(f"/proc/self/fd/{second}")
            packets.close_all(fds)
            client.send(wire.encode(wire.DROP, 1))  # without a prefix: not everything
            assert (await client.answer() or (0,))[0] == wire.FAILED
            client.send(wire.encode(wire.DROP, 1, (b"a/",)))
            assert await client.answer() == (wire.OK, [])
            for key, count in ((b"a/1", 0), (b"a/2", 0), (b"b", 1), (b"c", 0)):
                client.send(wire.encode(wire.FETCH, 1, (key,)))
                *_, fds = await asyncio.to_thread(packets.receive, client.socket)
                assert len(fds) == count
                packets.close_all(fds)
            client.send(wire.encode(wire.DROP, 0, (b"",)))
        os.close(first)
        os.close(second)
        await until(lambda: health(launch) == before, "the letting go")

    in_launch(tmp_path, body)


def test_only_who_greets_is_told_of_exits(tmp_path: Path) -> None:
    """Loggers ask the keeper for descriptors: an exit that comes between is not taken for the answer."""

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        await launch.kill_ours("launcher")
        with Client(launch, "keeper") as silent, Client(launch, "keeper") as greeted:
            greeted.send(wire.encode(wire.HELLO, 1, (wire.VERSION,)))
            hello = await greeted.answer()
            assert hello is not None and hello[1][:2] == [wire.VERSION, launch.pid_of("keeper")]
            launch.handler.signal(box.process, 9)
            assert (await launch.wait(box.process)).code == 137
            assert await greeted.answer() == (wire.EXITED, [box.process.pid, box.process.start_time])
            silent.send(wire.encode(wire.FETCH, 3, (b"none",)))
            assert await silent.answer() == (wire.OK, [])

    in_launch(tmp_path, body)


def test_a_client_that_does_not_read_is_cut_and_holds_nobody_up(tmp_path: Path) -> None:
    async def body(launch: Launch) -> None:
        with Client(launch, "launcher") as client:
            for _ in range(3000):
                try:
                    client.send(wire.encode(wire.ABANDON, 1, (b"?",)))
                except OSError:
                    break
            assert (await launch.run(["true"])).code == 0

    in_launch(tmp_path, body)


def test_a_plan_that_is_none(tmp_path: Path) -> None:
    """The child finds out, and says so."""

    async def body(launch: Launch) -> None:
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        launch.descriptors.append(null)
        wrong = plan.seal({"steps": [("no such step", "x")], "final": [], "argv": [], "env": [], "paths": [b"x"]})
        launch.descriptors.append(wrong)
        with Client(launch, "launcher") as client:
            for number, fd in enumerate((null, wrong)):
                for kind, fields in (
                    (wire.CREATE, (b"x%d" % number, 0, b"")),
                    (wire.NAMESPACES, (b"y%d" % number, 0)),
                    (wire.CHECK, (b"z%d" % number,)),
                ):
                    client.send(wire.encode(kind, 1, fields), (fd,))
                    answer = await client.answer()
                    assert answer is not None and answer[0] == wire.FAILED and answer[1][0], (kind, answer)
                client.send(wire.encode(wire.EXEC, 1, (b"e%d" % number,)), (fd, null, null, null, null))
                answer = await client.answer()
                assert answer is not None and answer[0] == wire.FAILED
            client.send(wire.encode(wire.CREATE, 1, (b"flags", 1 << 62, b"")), (wrong,))
            answer = await client.answer()
            assert answer is not None and answer[0] == wire.FAILED and answer[1][1] == 22
        launcher = launch.pid_of("launcher")
        await until(lambda: not [p for p in leaks.processes() if p.parent == launcher], "the end of the children")

    in_launch(tmp_path, body)


def test_an_answer_that_is_too_long_ends_its_connection_alone(tmp_path: Path) -> None:
    """There is no way to send it, and nobody else is to be the worse for it."""
    with packets.listen(str(tmp_path / "sock")) as listener:
        server = Launcher(str(tmp_path), listener)
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with here:
            server.connections[there.fileno()] = there
            server.loop.watch(there.fileno(), lambda: None)
            server.send(there, wire.OK, 1, (1, 1, bytes(wire.MAX_PACKET - 20)))
            assert server.connections == {} and there.fileno() < 0
            with pytest.raises(packets.Closed):
                packets.receive(here)
        server.loop.epoll.close()
        packets.close_all(server.signals)


def test_an_intermediate_process_that_is_killed_leaves_no_stray(tmp_path: Path) -> None:
    """Between making the process in its place and naming it: strace holds it there, as the kernel's OOM killer may find it."""

    async def body(launch: Launch) -> None:
        box = await launch.start(SLEEP)
        launcher = launch.pid_of("launcher")

        def family() -> list[int]:
            pids = [p.pid for p in leaks.processes() if p.parent == launcher and p.pid != box.process.pid]
            return sorted(pids)

        hold = ("-e", "trace=clone,clone3", "-e", "inject=clone,clone3:delay_exit=400000")
        async with Trace(launcher, tmp_path / "trace", *hold):
            start = asyncio.ensure_future(launch.exec(box, ["true"]))
            await until(lambda: len(family()) == 2, "both processes")
            [helper] = [pid for pid in family() if len(nspid(pid)) == 1]
            os.kill(helper, signal.SIGKILL)
            with pytest.raises(StartFailed, match="killed before it could start"):
                await start
        await until(lambda: family() == [], "the reaping of the stray")
        assert launch.pid_of("launcher") == launcher
        assert len(list((launch.run_directory / "tasks").iterdir())) == 1
        assert (await launch.exec(box, ["echo", "on"])).out == "on\n"

    in_launch(tmp_path, body)


def nspid(pid: int) -> list[str]:
    """A process's PIDs, from the node's namespace inwards."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return next((line.split()[1:] for line in lines if line.startswith("NSpid:")), [])
