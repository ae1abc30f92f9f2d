"""`tare logs`: what a container wrote, from its CRI log file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable

import click

from tare.cli import crilog
from tare.cli.client import CallFailed, Client
from tare.cli.containers import container_candidates
from tare.cli.follow import LogFile
from tare.cli.health import next_attempt
from tare.cli.lookup import pick
from tare.cli.removal import attempts_in, is_run_pod
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
    """Print what CONTAINER wrote to its standard output and standard error, before it was started again too."""
    renderer = crilog.Renderer(timestamps=timestamps)
    with Client(socket) as client:
        target = pick(container_candidates(client.containers()), container, "container")
        path = client.container_status(target.id).log_path
        if not path:
            raise FailedPrecondition(f"container {container} has no log", cause="its maker gave no log path")
        pod = pod_of(client, target.id)
        if pod is not None:
            tail = earlier(path, tail, renderer)
        current: str | None = target.id
        while current is not None:
            show(client, current, path, renderer, tail=tail, follow=follow)
            current = next_attempt(client, pod, current) if follow and pod is not None else None
            if current is not None:
                before, path, tail = path, client.container_status(current).log_path, None
                between(before, path, renderer)


def pod_of(client: Client, container_id: str) -> str | None:
    """The ID of the pod that `tare run` made for a container, whose attempts are one container to who reads its log; None for any other."""
    pods = {pod.id for pod in client.pods() if is_run_pod(pod)}
    return next(
        (c.pod_sandbox_id for c in client.containers() if c.id == container_id and c.pod_sandbox_id in pods), None
    )


def earlier(path: str, tail: int | None, renderer: crilog.Renderer) -> int | None:
    """Print what attempts before this one's log have, as far as it belongs to the last `tail` lines; how many are left for this one."""
    files = attempts_in(os.path.dirname(path))
    before = files[: files.index(path)] if path in files else []
    parts: list[list[bytes]] = []
    left = tail
    if tail is not None:
        with LogFile(path) as log:
            left = tail - len(last_lines(log, tail))
    for name in reversed(before):
        if left == 0:
            break
        with LogFile(name) as log:
            parts.append(list(log.read()) if left is None else last_lines(log, left))
        left = None if left is None else left - len(parts[-1])
    for lines in reversed(parts):
        write(lines, renderer)
    return tail


def between(before: str, after: str, renderer: crilog.Renderer) -> None:
    """Print what attempts have written that came and went after one log and before another."""
    files = attempts_in(os.path.dirname(after))
    if before in files and after in files:
        for name in files[files.index(before) + 1 : files.index(after)]:
            with LogFile(name) as log:
                write(log.read(), renderer)


def show(
    client: Client, container_id: str, path: str, renderer: crilog.Renderer, *, tail: int | None, follow: bool
) -> None:
    """One container's log: its last `tail` lines, or all, and with `follow` what comes until it has ended."""
    with LogFile(path) as log:
        if tail is not None:
            write(last_lines(log, tail), renderer)
        write(log.read(), renderer)
        ended = not follow
        while not ended:
            ended = has_ended(client, container_id)  # before the file is read, so that nothing is missed
            if not write(log.read(), renderer) and not ended:
                time.sleep(POLL_SECONDS)


def last_lines(log: LogFile, count: int) -> list[bytes]:
    """The entries of the last `count` lines. Raises InternalError."""
    try:
        return log.skip_to_last(count)
    except crilog.LogFormatError as error:
        raise InternalError(f"read {log.path}", cause=error) from error
