"""`tare logs`: what a container wrote, from its CRI log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

import click

from tare.cli import crilog
from tare.cli.client import CallFailed, Client
from tare.cli.containers import container_candidates
from tare.cli.follow import LogFile
from tare.cli.lookup import pick
from tare.errors import FailedPrecondition, InternalError

POLL_SECONDS = 0.1


def write(lines: Iterable[bytes], renderer: crilog.Renderer) -> bool:
    """Print entries to the streams that they name, in their order; says whether there were any.

    Raises InternalError for a line that is no entry.
    """
    last = None
    for line in lines:
        try:
            entry = crilog.parse(line)
        except crilog.LogFormatError as error:
            raise InternalError("read the log", cause=error) from error
        stream = sys.stderr if entry.stream == "stderr" else sys.stdout
        if last is not None and stream is not last:
            last.buffer.flush()
        stream.buffer.write(renderer.render(entry))
        last = stream
    if last is not None:
        last.buffer.flush()
    return last is not None


def has_ended(client: Client, container_id: str) -> bool:
    """Whether the container has exited, or is no more. What it wrote is in its log file by then."""
    from tare.cri.v1 import api_pb2

    try:
        return client.container_status(container_id).state == api_pb2.CONTAINER_EXITED
    except CallFailed as error:
        if error.status == "NOT_FOUND":
            return True
        raise


@click.command()
@click.argument("container")
@click.option("-f", "--follow", is_flag=True, help="Go on until the container has ended.")
@click.option("-n", "--tail", type=click.IntRange(min=0), metavar="LINES", help="Only so many of the last lines.")
@click.option("-t", "--timestamps", is_flag=True, help="Begin each line with its time.")
@click.pass_obj
def logs(socket: str, container: str, follow: bool, tail: int | None, timestamps: bool) -> None:
    """Print what CONTAINER wrote to its standard output and standard error."""
    renderer = crilog.Renderer(timestamps=timestamps)
    with Client(socket) as client:
        target = pick(container_candidates(client.containers()), container, "container")
        path = client.container_status(target.id).log_path
        if not path:
            raise FailedPrecondition(f"container {container} has no log", cause="its maker gave no log path")
        with LogFile(path) as log:
            if tail is not None:
                write(last_lines(log, tail), renderer)
            write(log.read(), renderer)
            ended = not follow
            while not ended:
                ended = has_ended(client, target.id)  # before the file is read, so that nothing is missed
                if not write(log.read(), renderer) and not ended:
                    time.sleep(POLL_SECONDS)


def last_lines(log: LogFile, count: int) -> list[bytes]:
    """The entries of the last `count` lines. Raises InternalError."""
    try:
        return log.skip_to_last(count)
    except crilog.LogFormatError as error:
        raise InternalError(f"read {log.path}", cause=error) from error
