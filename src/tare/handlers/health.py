"""Whether the processes that make and log containers answer, for metrics and for the node's conditions. Nothing is started or mended here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tare.errors import DeadlineExceeded, Unavailable, describe
from tare.handlers.channel import Channel, Refused
from tare.handlers.logs import exchange
from tare.launch import journal, packets, slots, wire

ANSWER_TIMEOUT = 2.0  # for a question whether they are there
NOBODY = b"nobody"  # a container that no logger knows: asked to drain it, it answers at once


async def troubles(keeper: Channel, launcher: Channel) -> dict[str, str]:
    """What is wrong with each of "keeper" and "launcher" that does not answer."""
    questions = {
        "keeper": keeper.request(wire.HELLO, (wire.VERSION,), doing="reach the keeper", timeout=ANSWER_TIMEOUT),
        "launcher": launcher.request(wire.ABANDON, (b"nothing",), doing="reach the launcher", timeout=ANSWER_TIMEOUT),
    }
    answers = await asyncio.gather(*questions.values(), return_exceptions=True)
    found = {}
    for name, answer in zip(questions, answers, strict=True):
        if isinstance(answer, Unavailable | DeadlineExceeded | Refused):
            found[name] = str(answer)
        elif isinstance(answer, BaseException):
            raise answer
        else:
            packets.close_all(answer[1])
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggerHealth:
    """One group's logger: how many containers it serves, what is wrong with it.

    `lost_lines` are those that are not yet told in the logs; None where its journal is of another version.
    """

    group: str
    containers: int
    lost_lines: int | None
    trouble: str | None


async def loggers(run: Path) -> list[LoggerHealth]:
    """Those of a run directory that have containers; one without any ends by itself."""
    counted = await asyncio.to_thread(lambda: list(_counted(run)))
    answers = await asyncio.gather(*(_trouble(run / "loggers" / group / "sock") for group, _, _ in counted))
    return [
        LoggerHealth(group=group, containers=containers, lost_lines=lost, trouble=trouble)
        for (group, containers, lost), trouble in zip(counted, answers, strict=True)
    ]


async def _trouble(path: Path) -> str | None:
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT):
            await exchange(path, wire.DRAIN, (NOBODY,), ())
    except TimeoutError:
        return f"it has not answered for {ANSWER_TIMEOUT:g} s"
    except (OSError, packets.Closed, wire.WireError) as error:
        return describe(error)
    return None


def _counted(run: Path) -> Iterator[tuple[str, int, int | None]]:
    """(group, containers, lost lines) as the journals of groups have them. Blocks."""
    base = run / "loggers"
    for group in sorted(os.listdir(base)) if base.is_dir() else ():
        try:
            numbers = list(slots.read(f"{base / group}/slots"))
            lost = journal.lost_lines(f"{base / group}/journal", numbers)
        except FileNotFoundError:  # it is going
            continue
        if numbers:
            yield group, len(numbers), lost
