"""A command between its pipes and its client, without any container: what of its output is waited for, and for how long."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable

import pytest

from tare.handlers.builtin import Process
from tare.runtime import streams
from tare.runtime.streams import Command, Started, Streams, Window

PROCESS = Process(pid=1, start_time=1)


class Slow:
    """A client that takes its time for each piece, and says what it has typed already."""

    def __init__(self, pause: float = 0.0, typed: bytes = b"") -> None:
        self.gone = asyncio.Event()
        self.pause, self.typed = pause, [typed, b""] if typed else [b""]
        self.heard: list[tuple[str, bytes]] = []

    async def stdin(self) -> bytes:
        return self.typed.pop(0) if self.typed else b""

    async def write(self, name: str, data: bytes) -> None:
        await asyncio.sleep(self.pause)
        self.heard.append((name, data))

    async def next_size(self) -> Window | None:
        return None


def run(client: Slow, begin: Callable[[int, int, int], None], **graces: float) -> tuple[int, list[Process]]:
    """A command that has done all that it does when `begin` returns, or is ended: (its exit code, what was ended)."""
    ended: list[Process] = []
    over = asyncio.Event()

    async def start(stdin: int, stdout: int, stderr: int, size: Window | None) -> Started:
        begin(stdin, stdout, stderr)
        if not graces:
            over.set()
        return Started(process=PROCESS)

    async def wait(process: Process) -> int:
        await over.wait()
        return 7

    async def end(process: Process) -> None:
        ended.append(process)
        over.set()

    async def go() -> int:
        wanted = Streams(stdin=True, stdout=True, stderr=True, tty=False)
        return await asyncio.wait_for(Command(client, wanted, start, wait, end, **graces).run(), 20)

    return asyncio.run(go()), ended


def test_what_an_ended_command_has_written_is_delivered_however_slow_its_client_is() -> None:
    client = Slow(pause=3 * streams.QUIET_SECONDS)

    def begin(stdin: int, stdout: int, stderr: int) -> None:
        os.write(stdout, b"x" * 50_000)
        os.write(stderr, b"wrong")

    assert run(client, begin) == (7, [])
    assert sorted(client.heard) == [("stderr", b"wrong"), ("stdout", b"x" * 50_000)]


def test_children_that_keep_its_output_open_are_not_waited_for() -> None:
    client, kept = Slow(), []

    def begin(stdin: int, stdout: int, stderr: int) -> None:
        os.write(stdout, b"started\n")
        kept.append(os.dup(stdout))

    start = time.monotonic()
    assert run(client, begin) == (7, [])
    assert time.monotonic() - start < 5
    assert client.heard == [("stdout", b"started\n")]
    os.close(kept[0])


@pytest.mark.parametrize("grace", [0.0, 0.2])
def test_an_orphan_without_a_terminal_is_ended_where_that_is_wanted(grace: float) -> None:
    client = Slow()
    client.gone.set()
    code, ended = run(client, lambda *_: None, **({"orphan_seconds": grace} if grace else {}))
    assert (code, ended) == (7, [PROCESS] if grace else [])


def test_input_that_nobody_reads_is_still_taken_from_the_client() -> None:
    client = Slow(typed=b"unread")

    def begin(stdin: int, stdout: int, stderr: int) -> None:
        """It has closed its input: its end is the only one, and is closed when this returns."""

    run(client, begin)
    assert client.typed == []


def test_a_chatty_child_does_not_hold_a_session_whose_client_has_left() -> None:
    client, over = Slow(), threading.Event()
    chatty: list[int] = []
    client.gone.set()

    def chat() -> None:
        while not over.wait(streams.QUIET_SECONDS / 5):
            try:
                os.write(chatty[0], b"word ")
            except BrokenPipeError:
                return

    talk = threading.Thread(target=chat)

    def begin(stdin: int, stdout: int, stderr: int) -> None:
        chatty.append(os.dup(stdout))
        talk.start()

    start = time.monotonic()
    try:
        assert run(client, begin) == (7, [])
        assert time.monotonic() - start < 5
    finally:
        over.set()
        talk.join()
        os.close(chatty[0])
