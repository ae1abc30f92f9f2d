"""Blocking work beside the event loop, and work that several wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")


async def settled(future: asyncio.Future[Any]) -> None:
    """Wait until a future is done, however it ends. A cancellation meanwhile is raised only then."""
    cancelled = False
    while not future.done():
        try:
            await asyncio.wait((future,))
        except asyncio.CancelledError:
            cancelled = True
    if not future.cancelled():
        future.exception()  # asked for, so that asyncio does not report it as forgotten
    if cancelled:
        raise asyncio.CancelledError


async def in_thread(executor: Executor, work: Callable[[], T], stop: Callable[[], None] | None = None) -> T:
    """The result of blocking work. Does not return before the thread is done with it, not even when cancelled.

    With `stop`, work that has not begun is then not begun, and `stop` hurries what has.
    """
    submitted = executor.submit(work)
    future = asyncio.wrap_future(submitted)
    try:
        await asyncio.wait((future,))
    except asyncio.CancelledError:
        if stop is None or not submitted.cancel():
            if stop is not None:
                stop()
            await settled(future)
        raise
    return future.result()


async def together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it at once; the first that fails ends the others, and its error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for item in work:
                group.create_task(item)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


@dataclass(slots=True)
class _Job(Generic[T]):
    task: asyncio.Task[T]
    waiters: int = 0


class Shared(Generic[T]):
    """Work by key: whoever wants what is under way already waits with the others. It is cancelled when the last of them leaves."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job[T]] = {}

    def running(self) -> set[str]:
        """The keys of what is under way."""
        return set(self._jobs)

    async def run(
        self, key: str, work: Callable[[], Coroutine[Any, Any, T]], own_errors: type[Exception] | tuple[()] = ()
    ) -> T:
        """The result of `work()`, or of the same key's work under way. Raises what it raises, and only after its end if cancelled last.

        Of `own_errors` who began the work is to blame: who had joined it does it then itself.
        """
        while True:
            joined = key in self._jobs
            try:
                return await self._wait(key, work)
            except own_errors:
                if not joined:
                    raise

    async def _wait(self, key: str, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        job = self._jobs.get(key)
        if job is None:
            job = self._jobs[key] = _Job(asyncio.create_task(work(), name=key))
            job.task.add_done_callback(partial(self._ended, key, job))
        job.waiters += 1
        try:
            await asyncio.wait((job.task,))
        finally:
            job.waiters -= 1
            if not job.waiters:
                self._ended(key, job)
                job.task.cancel()
                await settled(job.task)
        return job.task.result()

    def _ended(self, key: str, job: _Job[T], _: object = None) -> None:
        if self._jobs.get(key) is job:
            del self._jobs[key]


class Syncer:
    """Those who need the disk to have caught up wait together for one sync that began after they asked."""

    def __init__(self, sync: Callable[[], None], executor: Executor) -> None:
        self._sync = sync
        self._executor = executor
        self._under_way = asyncio.Lock()
        self._next: asyncio.Task[None] | None = None

    async def sync(self) -> None:
        """Return after a sync that began after this call. Raises OSError."""
        if self._next is None:
            self._next = asyncio.create_task(self._run())
        task = self._next
        await asyncio.wait((task,))
        task.result()

    async def _run(self) -> None:
        async with self._under_way:
            self._next = None  # who asks from now on may have written what this sync does not see
            await in_thread(self._executor, self._sync)
