"""Bounds for what a step does: a deadline whose error says what was waited for, the kernel's errors in the family's words, and a
second try where a process of Tare's own was lost."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from tare.errors import DeadlineExceeded, InternalError, ResourceExhausted, Unavailable, describe

log = logging.getLogger(__name__)
R = TypeVar("R")

USED_UP = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EROFS))


@asynccontextmanager
async def deadline(seconds: float, doing: str) -> AsyncIterator[None]:
    """Raise DeadlineExceeded where the block takes longer; an error of the block's own stays what it is."""
    bound = asyncio.timeout(seconds)
    try:
        async with bound:
            yield
    except TimeoutError:
        if not bound.expired():
            raise
        raise DeadlineExceeded(doing, cause=f"no end within {seconds:g} s") from None


@contextmanager
def kernel_errors(doing: str) -> Iterator[None]:
    """Raise what the kernel refuses as ResourceExhausted, where something is used up, or InternalError."""
    try:
        yield
    except OSError as error:
        kind = ResourceExhausted if error.errno in USED_UP else InternalError
        raise kind(doing, cause=error) from error


async def twice(attempt: Callable[[], Awaitable[R]], clean: Callable[[], Awaitable[None]] | None = None) -> R:
    """Try, and once again where the process that was asked ended meanwhile (there is a new one); `clean` takes back the first try."""
    try:
        return await attempt()
    except Unavailable as error:
        log.warning("%s; once again", describe(error))
    if clean is not None:
        await clean()
    return await attempt()
