"""`tare exec`, `tare attach`."""

from __future__ import annotations

import os
import sys

import click

from tare.cli.client import Client
from tare.cli.containers import container_candidates
from tare.cli.lookup import pick

DETACH_KEYS = "ctrl-p,ctrl-q"
keys_option = click.option(
    "--detach-keys",
    default=DETACH_KEYS,
    show_default=True,
    metavar="KEYS",
    help="Keys that leave a terminal's session.",
)


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Pass standard input on.")
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal.")
@click.option(
    "--timeout",
    type=click.IntRange(min=0),
    default=0,
    help="Kill it after so many seconds; what it wrote (16 MiB at most) is printed at its end.  [default: never]",
)
@keys_option
@click.argument("container")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def execute(
    socket: str, interactive: bool, tty: bool, timeout: int, detach_keys: str, container: str, command: tuple[str, ...]
) -> int:
    """Run COMMAND in CONTAINER and end with its exit code; 125 where Tare fails."""
    if timeout and (interactive or tty):
        raise click.UsageError("--timeout is for commands without -i and -t")
    if tty and interactive and not os.isatty(sys.stdin.fileno()):
        raise click.UsageError("-it wants a terminal, and standard input is none: leave -t out")
    from tare.cri.v1 import api_pb2

    with Client(socket) as client:
        target = pick(container_candidates(client.containers()), container, "container")
        if timeout:
            return exec_sync(client, target.id, command, timeout)
        request = api_pb2.ExecRequest(
            container_id=target.id, cmd=command, tty=tty, stdin=interactive, stdout=True, stderr=not tty
        )
        url = client.call(client.runtime.Exec, request).url
    from tare.cli import stream

    return stream.join(url, socket, stdin=interactive, tty=tty, keys=detach_keys) or 0


def exec_sync(client: Client, container_id: str, command: tuple[str, ...], timeout: int) -> int:
    """To its end, and then what it wrote."""
    from tare.cri.v1 import api_pb2

    request = api_pb2.ExecSyncRequest(container_id=container_id, cmd=command, timeout=timeout)
    answer = client.call(client.runtime.ExecSync, request, timeout=timeout + 30)
    for out, data in ((sys.stdout, answer.stdout), (sys.stderr, answer.stderr)):
        out.buffer.write(data)
        out.buffer.flush()
    return int(answer.exit_code)


@click.command()
@click.option("--no-stdin", is_flag=True, help="Listen only.")
@keys_option
@click.argument("container")
@click.pass_obj
def attach(socket: str, no_stdin: bool, detach_keys: str, container: str) -> int:
    """Join CONTAINER's own streams until it ends, and end with its exit code; 0 after the detach keys, 125 where Tare fails."""
    from tare.cri.v1 import api_pb2

    with Client(socket) as client:
        target = pick(container_candidates(client.containers()), container, "container")
        tty, stdin = streams_of(client, target.id)
        stdin &= not no_stdin
        request = api_pb2.AttachRequest(container_id=target.id, tty=tty, stdin=stdin, stdout=True, stderr=not tty)
        url = client.call(client.runtime.Attach, request).url
        from tare.cli import stream

        if stream.join(url, socket, stdin=stdin, tty=tty, keys=detach_keys) is None:
            return 0
        status = client.container_status(target.id)
        return int(status.exit_code) if status.state == api_pb2.CONTAINER_EXITED else 0


def streams_of(client: Client, container_id: str) -> tuple[bool, bool]:
    """(whether it has a terminal, whether it reads input)."""
    import json

    from tare.cri.v1 import api_pb2

    request = api_pb2.ContainerStatusRequest(container_id=container_id, verbose=True)
    info = client.call(client.runtime.ContainerStatus, request).info
    process = json.loads(info["info"])["runtimeSpec"]["process"]
    tty = bool(process.get("terminal"))
    return tty, tty or bool(process.get("stdin"))
