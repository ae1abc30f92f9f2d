"""`tare log-level`: what the daemon's log has, asked and changed while it runs."""

from __future__ import annotations

import click

from tare.cli.client import Client

LEVELS = ("debug", "info", "warning", "error")


@click.command("log-level")
@click.argument("level", type=click.Choice(LEVELS), required=False)
@click.pass_obj
def log_level(socket: str, level: str | None) -> None:
    """Tell from which level on the daemon logs, or have it log from LEVEL on.

    A level that is set here holds until the daemon ends, or is told by SIGHUP to take the one of its settings.
    """
    from tare.api.v1 import tare_pb2

    with Client(socket) as client:
        reply = client.call(client.daemon.LogLevel, tare_pb2.LogLevelRequest(level=level or ""))
    click.echo(reply.level if level is None else f"{reply.before} -> {reply.level}")
