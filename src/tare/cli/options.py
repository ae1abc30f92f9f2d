"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

C = TypeVar("C", bound=Callable[..., Any])


def output_option(command: C) -> C:
    """`-o table|json`, as `output`."""
    return click.option(
        "-o", "--output", type=click.Choice(["table", "json"]), default="table", help="How to print the answer."
    )(command)


def quiet_option(command: C) -> C:
    """`-q`, as `quiet`."""
    return click.option("-q", "--quiet", is_flag=True, help="Print IDs only, in full.")(command)
