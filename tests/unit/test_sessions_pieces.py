"""What sessions are made of, without any container: dialling into a pod, a terminal that is lost, and the end of a tree that goes on growing."""

from __future__ import annotations

import asyncio
import errno
import itertools
import signal
import socket
import threading
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tare.errors import DeadlineExceeded, FailedPrecondition, Unavailable
from tare.handlers.builtin import Process
from tare.runtime import interactive, netns, trees
from tare.runtime.interactive import Interactive
from tare.runtime.records import ContainerState
from tare.runtime.streams import Streams
from tare.runtime.trees import Member

NAMESPACE = Path("/run/netns/pod")
MADE = Process(pid=7, start_time=70)


# Dialling


def test_a_port_that_does_not_answer_in_time_is_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "CONNECT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, socket.socket() as waits:
        waits.connect(listener.getsockname())  # the queue is full: the kernel drops who comes next
        with pytest.raises(OSError, match=r"timed out: '127\.0\.0\.1 port") as failure:
            asyncio.run(netns.connect(None, listener.getsockname()[1]))
    assert failure.value.errno == errno.ETIMEDOUT


def test_entering_a_namespace_does_not_hold_the_loop_up(monkeypatch: pytest.MonkeyPatch) -> None:
    going_on = threading.Event()

    def slow(namespace: Path | None, family: socket.AddressFamily) -> socket.socket:
        assert going_on.wait(5)
        return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)

    monkeypatch.setattr(netns, "make_socket", slow)

    async def go(port: int) -> None:
        asyncio.get_running_loop().call_later(0.1, going_on.set)
        _, writer = await netns.connect(NAMESPACE, port)
        writer.close()
        await writer.wait_closed()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        asyncio.run(go(listener.getsockname()[1]))


def test_a_socket_that_nobody_waits_for_any_more_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    going_on, made = threading.Event(), socket.socket()

    def slow(namespace: Path | None, family: socket.AddressFamily) -> socket.socket:
        assert going_on.wait(5)
        return made

    monkeypatch.setattr(netns, "make_socket", slow)

    async def go() -> None:
        dial = asyncio.create_task(netns.connect(NAMESPACE, 80))
        await asyncio.sleep(0.05)
        dial.cancel()
        going_on.set()
        with pytest.raises(asyncio.CancelledError):
            await dial
        while made.fileno() >= 0:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(go(), 5))


# A terminal


class Forgetful:
    """A handler whose exec gives its terminal to nobody."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    async def exec(self, *_: Any, **__: Any) -> Process:
        return MADE

    def signal(self, process: Process, number: int) -> bool:
        self.done.append((process, number))
        return True

    def forget(self, process: Process) -> None:
        self.done.append((process, "forgotten"))


def test_a_process_whose_terminal_is_lost_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    handler: Any = Forgetful()
    monkeypatch.setattr(interactive, "process_of", lambda fact: fact)
    sessions = Interactive(SimpleNamespace(handler=handler), set(), hangup_seconds=1)  # type: ignore[arg-type]
    record: Any = SimpleNamespace(id="box")
    facts: Any = SimpleNamespace(process=MADE)
    group: Any = None
    with pytest.raises(Unavailable, match="the terminal was lost"):
        asyncio.run(sessions._start(record, facts, {"terminal": True}, group, (0, 1, 2)))
    assert handler.done == [(MADE, signal.SIGKILL), (MADE, "forgotten")]


class Leaving:
    """Logs of a container that is removed, or cannot be started, while a client joins it."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.ours, self.theirs = socket.socketpair()
        self.theirs.settimeout(5)

    async def attach(self, group: str, container_id: str) -> socket.socket:
        self.facts.clear()
        return self.ours

    async def end_input(self, group: str, container_id: str) -> None:
        raise AssertionError


def test_a_container_that_goes_while_a_client_joins_it_is_no_defect() -> None:
    """What has been joined is closed where the rest fails."""
    config = SimpleNamespace(tty=True, stdin=True, stdin_once=False)
    record: Any = SimpleNamespace(id="box", state=ContainerState.RUNNING, config=config)
    facts: dict[str, Any] = {"box": SimpleNamespace(group="g")}
    logs = Leaving(facts)
    store = SimpleNamespace(container_facts=facts, container=lambda *_: record)

    async def terminal(container_id: str) -> None:
        return None

    parts: Any = SimpleNamespace(store=store, logs=logs, handler=SimpleNamespace(terminal=terminal))
    client: Any = SimpleNamespace()
    sessions = Interactive(parts, set(), hangup_seconds=1)
    wanted = Streams(stdin=True, stdout=True, stderr=False, tty=True)
    with pytest.raises(Unavailable, match="nobody has its terminal any more"):
        asyncio.run(sessions.attach("box", wanted, client))
    with logs.theirs:
        assert logs.theirs.recv(1) == b""
    with pytest.raises(FailedPrecondition, match="does not run any more"):
        asyncio.run(sessions.attach("box", wanted, client))


# Trees


def test_a_tree_that_grows_without_end_holds_neither_its_end_nor_the_loop_up(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count(100)
    monkeypatch.setattr(trees, "KILL_SECONDS", 0.2)
    monkeypatch.setattr(trees, "look", lambda pids: [Member(next(numbers), 1, 1, 5)])
    monkeypatch.setattr(trees, "send", lambda member, number: None)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def candidates() -> Iterable[int]:
        return ()

    async def go() -> int:
        task = asyncio.create_task(others())
        await trees.stop(1, candidates)
        stopped = turns
        with pytest.raises(DeadlineExceeded, match="do not end"):
            await trees.kill(1, candidates, "exec")
        task.cancel()
        return stopped

    assert asyncio.run(asyncio.wait_for(go(), 10)) > 2
