"""How far a pull or a push is: bars on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tare.cli.output import short_id
from tare.errors import TareError

if TYPE_CHECKING:
    from tare.api.v1 import tare_pb2


def watch(messages: Iterable[tare_pb2.Progress], title: str) -> tare_pb2.Progress:
    """Show what comes, one bar for each blob, and return the last message. Raises what the messages raise."""
    if sys.stderr.isatty():
        return with_bars(messages, title)
    last = None
    for message in messages:
        last = message
    return known(last, title)


def with_bars(messages: Iterable[tare_pb2.Progress], title: str) -> tare_pb2.Progress:
    """As `watch`, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description:27}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    console.print(title, highlight=False, markup=False)
    last = None
    with Progress(*columns, console=console) as bars:
        tasks = {}
        for message in messages:
            last = message
            if not message.blob:
                continue
            words = f"{short_id(message.blob)} {message.state}"
            if message.blob not in tasks:
                tasks[message.blob] = bars.add_task(words, total=message.total)
            bars.update(tasks[message.blob], completed=message.done, description=words)
    return known(last, title)


def known(last: tare_pb2.Progress | None, title: str) -> tare_pb2.Progress:
    """The last message, which there must be."""
    if last is None:
        raise TareError(title, cause="the daemon did not say how it ended")
    return last
