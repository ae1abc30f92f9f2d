"""A container that shares the PID namespace of another one, which may end at any moment and leave its PID to somebody else."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from tare.errors import FailedPrecondition
from tare.handlers.builtin import Process
from tare.runtime.containers import Start, start_process
from tare.runtime.records import NamespaceMode, NamespaceOptions, ProcessFact

TARGET = ProcessFact(pid=77, start_time=5)


class Handler:
    """Starts nothing; answers whether the target lives from a list."""

    def __init__(self, lives: list[bool]) -> None:
        self.lives: Iterator[bool] = iter(lives)
        self.asked: list[Process] = []
        self.executed = False

    def alive(self, process: Process) -> bool:
        self.asked.append(process)
        return next(self.lives)

    async def start(self, *_: Any, on_created: Callable[[Process], Awaitable[None]], **__: Any) -> Process:
        made = Process(99, 6)
        await on_created(made)
        self.executed = True
        return made


def start_of(handler: Handler, path: str) -> Start:
    """The start of a container in the PID namespace at a path."""
    parts, facts = MagicMock(), {"t": SimpleNamespace(process=TARGET)}
    parts.handler, parts.plugins.active = handler, False
    parts.cgroups.placing.return_value = None
    parts.store.container_facts = facts
    parts.store.container = lambda identity, doing: SimpleNamespace(id=identity)
    parts.store.put_container_facts = facts.__setitem__
    options = NamespaceOptions(pid=NamespaceMode.TARGET, target_id="t")
    config = SimpleNamespace(tty=False, security=SimpleNamespace(namespaces=options))
    record: Any = SimpleNamespace(config=config, id="c", pod_id="p")
    spec = {"linux": {"namespaces": [{"type": "mount"}, {"type": "pid", "path": path}]}}
    group: Any = object()
    return Start(
        parts=parts, id="c", group="g", cgroup_path="/c", record=record, spec=spec, lowers=(Path("/l"),), cgroup=group
    )


def test_it_is_looked_at_by_pid_and_start_time_before_and_after_the_namespace_is_opened() -> None:
    handler = Handler([True, True])
    start = start_of(handler, "/proc/77/ns/pid")
    asyncio.run(start_process(start))
    assert handler.executed and handler.asked == [Process(77, 5)] * 2


@pytest.mark.parametrize(("lives", "path"), [([False], "/proc/77/ns/pid"), ([True], "/proc/78/ns/pid")])
def test_one_that_has_ended_or_is_another_by_now_makes_no_process(lives: list[bool], path: str) -> None:
    start = start_of(Handler(lives), path)
    with pytest.raises(FailedPrecondition, match="has ended"):
        asyncio.run(start_process(start))
    assert start.process is None


def test_one_that_ends_while_the_namespace_is_opened_lets_nothing_run() -> None:
    """The process is known by then, so that the operation's undo ends it at its gate."""
    handler = Handler([True, False])
    start = start_of(handler, "/proc/77/ns/pid")
    with pytest.raises(FailedPrecondition, match="has ended"):
        asyncio.run(start_process(start))
    assert not handler.executed and start.process == Process(99, 6)
