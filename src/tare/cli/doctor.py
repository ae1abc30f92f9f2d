"""`tare doctor`: what this node has of what pods need."""

from __future__ import annotations

import asyncio

import click

from tare.cli.options import output_option
from tare.cli.output import print_json, print_table


@click.command()
@click.option("--config", "path", metavar="FILE", help="The daemon's TOML file of settings.")
@click.option("--root", metavar="DIR", help="The daemon's root directory.  [default: /var/lib/tare]")
@output_option
def doctor(path: str | None, root: str | None, output: str) -> int:
    """Say what this node has of what pods need, and what to do about the rest.

    It looks at the node itself and needs no daemon. Ends with 1 where something is missing without which pods do not run.
    """
    from tare import config
    from tare.cli.examine import State, examine

    findings = asyncio.run(examine(config.load(path, root=root)))
    if output == "json":
        keys = ("subject", "text", "hint")
        print_json([{"state": found.state.value, **{key: getattr(found, key) for key in keys}} for found in findings])
    else:
        rows = [
            [found.subject, found.state.value, f"{found.text} ({found.hint})" if found.hint else found.text]
            for found in findings
        ]
        print_table(["WHAT", "STATE", "FOUND"], rows)
    return int(any(found.state is State.MISSING for found in findings))
