"""Where the CRI socket is, who may reach it, and what happens to one that is already there."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path

import grpc.aio
import pytest

from tare.cri.server import Server
from tare.cri.v1 import api_pb2 as pb
from tare.errors import AlreadyExists, FailedPrecondition, InternalError, InvalidArgument
from tests.support.cri_ports import Client, MemoryImages, MemoryRuntime, serving


def start(path: Path) -> None:
    """Serve on `path` and ask for the version."""

    async def play() -> None:
        async with serving(path, MemoryRuntime()) as client:
            await client.runtime.Version(pb.VersionRequest())

    asyncio.run(play())


def stale(path: Path) -> None:
    """A socket that nobody listens on any more."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()


def test_socket_is_for_root_only_and_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "run" / "tare" / "tare.sock"

    async def play() -> None:
        async with serving(path, MemoryRuntime()) as client:
            await client.runtime.Version(pb.VersionRequest())
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert os.listdir(path.parent) == ["tare.sock"]

    asyncio.run(play())
    assert os.listdir(path.parent) == []


def test_directory_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    start(tmp_path / "tare.sock")
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    stale(tmp_path / "tare.sock")
    start(tmp_path / "tare.sock")


def test_leftovers_of_a_death_while_binding_are_replaced(tmp_path: Path) -> None:
    nursery = tmp_path / ".tare.sock.new"
    nursery.mkdir()
    stale(nursery / "s")
    start(tmp_path / "tare.sock")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("backlog", [0, 5])
def test_socket_in_use_is_left_alone(tmp_path: Path, backlog: int) -> None:
    path = tmp_path / "tare.sock"
    with socket.socket(socket.AF_UNIX) as owner, socket.socket(socket.AF_UNIX) as other:
        owner.bind(str(path))
        owner.listen(backlog)
        other.connect(str(path))
        number = path.stat().st_ino
        with pytest.raises(AlreadyExists, match=f"listen on {path}: another process listens there"):
            start(path)
        assert path.stat().st_ino == number


def test_two_servers(tmp_path: Path) -> None:
    path = tmp_path / "tare.sock"

    async def play() -> None:
        async with serving(path, MemoryRuntime()) as client:
            second = Server(path, MemoryRuntime(), MemoryImages())
            with pytest.raises(AlreadyExists):
                await second.start()
            await second.stop(0)
            await client.runtime.Version(pb.VersionRequest())

    asyncio.run(play())


def test_socket_of_a_successor_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "tare.sock"

    async def play() -> None:
        async with serving(path, MemoryRuntime()):
            path.unlink()
            async with serving(path, MemoryRuntime()) as client:
                await client.runtime.Version(pb.VersionRequest())
                path.rename(tmp_path / "aside")
                path.write_text("not ours")

    asyncio.run(play())
    assert path.read_text() == "not ours"


def test_file_at_the_path_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tare.sock"
    path.write_text("precious")
    with pytest.raises(FailedPrecondition, match="not a socket"):
        start(path)
    assert path.read_text() == "precious"


def test_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="too long"):
        start(tmp_path / ("x" * 100) / "tare.sock")
    assert os.listdir(tmp_path) == []


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match=r"listen on /proc/tare\.sock"):
        start(Path("/proc/tare.sock"))


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InternalError, match="Not a directory"):
        start(tmp_path / "file" / "run" / "tare.sock")


def test_calls_under_way_end_with_the_server(tmp_path: Path) -> None:
    """Grace is over: what holds a call up is cancelled, and `stop` returns."""
    path = tmp_path / "tare.sock"

    async def play() -> None:
        runtime = MemoryRuntime()
        server = Server(path, runtime, MemoryImages())
        await server.start()
        runtime.gate.clear()
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            call = Client(channel).runtime.RunPodSandbox(
                pb.RunPodSandboxRequest(config=pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name="x")))
            )
            await runtime.entered.wait()
            await server.stop(0.01)
            with pytest.raises(grpc.aio.AioRpcError):
                await call
            await runtime.cancelled.wait()
            await server.wait()

    asyncio.run(asyncio.wait_for(play(), 30))
