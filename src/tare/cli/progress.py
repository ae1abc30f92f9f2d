"""How far a pull or a push is: bars on a terminal, elsewhere a line for each blob that is done."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tare.cli.output import short_id, size
from tare.errors import TareError

if TYPE_CHECKING:
    from tare.api.v1 import tare_pb2

ENDS = frozenset({"done", "there", "mounted"})


def watch(messages: Iterable[tare_pb2.Progress], title: str) -> tare_pb2.Progress:
    """Show what comes on standard error and return the last message. Raises what the messages raise."""
    return with_bars(messages, title) if sys.stderr.isatty() else with_lines(messages, title)


def with_lines(messages: Iterable[tare_pb2.Progress], title: str) -> tare_pb2.Progress:
    """As `watch`, for a file or a pipe."""
    last = None
    for message in messages:
        last = message
        if message.blob and message.state in ENDS:
            sys.stderr.write(f"{title}: {short_id(message.blob)} {message.state} ({size(message.total)})\n")
    return known(last, title)


def with_bars(messages: Iterable[tare_pb2.Progress], title: str) -> tare_pb2.Progress:
    """As `watch`, on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, Task, TextColumn, TransferSpeedColumn
    from rich.text import Text

    class Speed(TransferSpeedColumn):
        """Nothing where nothing is sent."""

        def render(self, task: Task) -> Text:
            return super().render(task) if task.finished_speed or task.speed else Text("")

    columns = (TextColumn("{task.description:27}"), BarColumn(), DownloadColumn(), Speed())
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
                tasks[message.blob] = bars.add_task(words, total=message.total, completed=message.done)
            bars.update(tasks[message.blob], completed=message.done, description=words)
    return known(last, title)


def known(last: tare_pb2.Progress | None, title: str) -> tare_pb2.Progress:
    """The last message, which there must be."""
    if last is None:
        raise TareError(title, cause="the daemon did not say how it ended")
    return last
