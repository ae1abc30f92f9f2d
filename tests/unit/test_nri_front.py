"""NRI from the runtime's side: what a plugin that joins waits for, and who waits for it; and that there is nothing of it without a plugin."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tare.config import NriConfig, ValidatorConfig
from tare.errors import DeadlineExceeded
from tare.nri import ContainerAdjustment, ContainerUpdate, Plugin
from tare.nri import server as server_module
from tare.nri.front import Front
from tare.nri.plugin import Session, connect
from tare.nri.server import Server
from tare.nri.validator import Refused
from tare.runtime.plugins import Subject
from tare.runtime.records import (
    ContainerConfig,
    ContainerMetadata,
    ContainerRecord,
    ContainerState,
    ImageRef,
    PodConfig,
    PodMetadata,
    PodRecord,
    PodState,
    Resources,
)

STORE: Any = SimpleNamespace(pods={}, containers={}, pod_facts={}, container_facts={})


def front(**settings: Any) -> Front:
    """One of a node with nothing on it."""
    return Front(NriConfig(**settings), STORE)


def test_a_plugin_that_joins_waits_for_what_is_on_its_way_and_the_next_for_it() -> None:
    async def scenario() -> None:
        gate, order = front(), []
        await gate.making("first")

        async def join() -> None:
            async with gate.quiet():
                order.append("joins")
                await asyncio.sleep(0)
                order.append("joined")

        async def make(thing: str) -> None:
            await gate.making(thing)
            order.append(thing)
            gate.made(thing)

        joining = [asyncio.ensure_future(join()) for _ in range(2)]
        await asyncio.sleep(0)
        making = asyncio.ensure_future(make("second"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert order == []
        gate.made("first")
        gate.made("first")
        await asyncio.gather(*joining, making)
        assert order[:2] == ["joins", "joined"] and sorted(order[2:]) == ["joined", "joins", "second"]
        await make("third")

    asyncio.run(scenario())


def test_what_never_ends_keeps_a_plugin_out_and_holds_up_nobody_else() -> None:
    async def scenario() -> None:
        gate = front(registration_timeout=0.05)
        await gate.making("stuck")
        with pytest.raises(DeadlineExceeded, match="that are being made"):
            async with gate.quiet():
                raise AssertionError("it is not quiet")
        await asyncio.wait_for(gate.making("next"), 5)

    asyncio.run(scenario())


def test_it_is_active_where_plugins_are_required() -> None:
    assert not front().active
    assert front(default_validator=ValidatorConfig(enable=True)).active
    assert not front(enable=False, default_validator=ValidatorConfig(enable=True)).active


def test_a_daemon_without_plugins_knows_nothing_of_their_messages() -> None:
    program = "import sys, tare.app; print(*(name for name in sys.modules if name.startswith('tare.nri')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    found = {f"tare.nri{name}" for name in ("", ".front", ".launched", ".names", ".server")}
    assert set(done.stdout.split()) == found


NOBODY: Any = None


def server(path: Path, **settings: Any) -> Server:
    """One that listens at a path."""
    config = NriConfig(socket=str(path), **settings)
    return Server(config, path.parent / "run", Front(config, STORE), NOBODY, NOBODY)


def test_a_socket_that_somebody_has_is_left_alone_and_a_dead_one_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "deep" / "nri.sock"

    async def scenario() -> None:
        first, second = server(path), server(path)
        await first.start(NOBODY)
        status = path.stat()
        assert (stat.S_IMODE(status.st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)
        await second.start(NOBODY)
        assert "another runtime does" in caplog.text and path.stat().st_ino == status.st_ino
        await second.close()
        assert path.stat().st_ino == status.st_ino
        await first.close()
        assert not path.exists()
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as dead:
            dead.bind(str(path))
        await second.start(NOBODY)
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as connected:
            connected.connect(str(path))
        await second.close()

    asyncio.run(scenario())


def test_what_is_no_socket_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "nri.sock"
    path.write_text("a file of somebody's")

    async def scenario() -> None:
        listening = server(path)
        await listening.start(NOBODY)
        await listening.close()

    asyncio.run(scenario())
    assert "NRI plugins cannot connect" in caplog.text and path.read_text() == "a file of somebody's"


@pytest.mark.parametrize("setting", ["enable", "connections"])
def test_nothing_listens_where_it_is_turned_off(tmp_path: Path, setting: str) -> None:
    async def scenario() -> None:
        silent = server(tmp_path / "nri.sock", **{setting: False})
        await silent.start(NOBODY)
        assert not (tmp_path / "nri.sock").exists()
        await silent.close()

    asyncio.run(scenario())


def test_where_it_is_by_default(tmp_path: Path) -> None:
    for run, expected in ((Path("/run/tare"), "/var/run/nri/nri.sock"), (tmp_path, f"{tmp_path}/nri.sock")):
        assert str(Server(NriConfig(), run, front(), NOBODY, NOBODY).path) == expected


class Full(socket.socket):
    """A socket of a process that has no descriptor left, but for the first look."""

    looks = 0

    def accept(self) -> tuple[socket.socket, Any]:
        """As accept(2) has it."""
        Full.looks += 1
        if Full.looks == 1:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_a_connection_that_cannot_be_taken_is_tried_again_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        listening = server(tmp_path / "nri.sock", registration_timeout=20.0)
        with monkeypatch.context() as patched:
            patched.setattr(socket, "socket", Full)
            await listening.start(NOBODY)
        monkeypatch.setattr(server_module, "PAUSE", 0.1)
        connected = await connect(str(listening.path))
        with connected:
            began = asyncio.get_running_loop().time()
            async with asyncio.timeout(20):
                while Full.looks < 2:
                    await asyncio.sleep(0.01)
            assert asyncio.get_running_loop().time() - began >= 0.09
            await listening.close()

    asyncio.run(scenario())
    assert "Too many open files" in caplog.text


class Slow:
    """Containers that take their time to be given limits."""

    def __init__(self) -> None:
        self.asked, self.go = asyncio.Event(), asyncio.Event()
        self.done: list[str] = []

    async def limit_container(self, container_id: str, wanted: Resources) -> None:
        """Halfway until it may go on."""
        self.asked.set()
        await self.go.wait()
        self.done.append(container_id)

    async def stop_container(self, container_id: str, timeout: float) -> None:
        """Nothing asks for it."""


@contextlib.asynccontextmanager
async def joined(gate: Front, plugin: Plugin) -> AsyncIterator[None]:
    """The plugin takes part; it hangs up at the end of the block."""
    session = asyncio.ensure_future(Session(plugin).serve(await connect(gate.settings.socket), "mine", "10"))
    try:
        async with asyncio.timeout(20):
            while not gate.titles():
                await asyncio.sleep(0.01)
        yield
    finally:
        session.cancel()
        await asyncio.gather(session, return_exceptions=True)


def test_what_a_plugin_wants_of_containers_does_not_stop_halfway_when_it_hangs_up_and_the_daemon_ends(
    tmp_path: Path,
) -> None:
    store: Any = SimpleNamespace(
        pods={}, containers={"c": SimpleNamespace(state=ContainerState.EXITED)}, pod_facts={}, container_facts={}
    )

    async def scenario() -> None:
        config = NriConfig(socket=str(tmp_path / "nri.sock"), request_timeout=20.0, registration_timeout=20.0)
        containers, plugin, gate = Slow(), Plugin(), Front(config, store)
        listening = Server(config, tmp_path / "run", gate, NOBODY, NOBODY)
        await listening.start(containers)
        async with joined(gate, plugin):
            update = asyncio.ensure_future(plugin.update([ContainerUpdate(container_id="c")]))
            await asyncio.wait_for(containers.asked.wait(), 20)
        assert (await asyncio.gather(update, return_exceptions=True))[0] is not None
        async with asyncio.timeout(20):
            while gate.titles():
                await asyncio.sleep(0.01)
        ending = asyncio.ensure_future(listening.close())
        await asyncio.sleep(0)
        containers.go.set()
        await ending
        assert containers.done == ["c"]

    asyncio.run(scenario())


class Stalls(Plugin):
    """One that is asked, and never answers."""

    async def create_container(self, pod: Any, container: Any) -> ContainerAdjustment:
        """Never."""
        await asyncio.Event().wait()
        return ContainerAdjustment()


def test_one_that_must_be_asked_and_is_lost_over_the_question_is_missed(tmp_path: Path) -> None:
    """It was there when the container was put to it, and has not had its say."""
    metadata = PodMetadata(name="p", uid="u", namespace="n")
    pod = PodRecord(id="p", config=PodConfig(metadata=metadata), handler="", state=PodState.READY, created_at=1)
    container = ContainerRecord(
        id="c",
        pod_id="p",
        config=ContainerConfig(metadata=ContainerMetadata(name="c"), image=ImageRef(image="i")),
        image_id="i",
        image_ref="i",
        state=ContainerState.CREATED,
        created_at=1,
    )

    async def scenario() -> None:
        required = ValidatorConfig(enable=True, required_plugins=("mine",))
        config = NriConfig(
            socket=str(tmp_path / "nri.sock"),
            request_timeout=1.0,
            registration_timeout=20.0,
            default_validator=required,
        )
        gate = Front(config, STORE)
        listening = Server(config, tmp_path / "run", gate, NOBODY, NOBODY)
        await listening.start(NOBODY)
        async with joined(gate, Stalls()):
            with pytest.raises(Refused, match="required NRI plugins are not there: mine"):
                await gate.adjust(Subject(pod=pod, container=container, unborn=True), "/p/c")
        await listening.close()

    asyncio.run(scenario())
