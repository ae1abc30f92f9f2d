"""`tare doctor`: what this node has of what pods need, and whether all that is of Tare on it belongs to a record.

examine ─► the node itself, no daemon needed
audit   ─► the daemon where one serves; else the databases, with the directories locked so that none begins meanwhile
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import click

from tare.cli.client import CALL_SECONDS, DEFAULT_SOCKET, Client
from tare.cli.options import output_option
from tare.cli.output import print_json, print_table
from tare.errors import TareError, describe

if TYPE_CHECKING:
    from tare.config import Config

FINDINGS, BLIND = 1, 2
REPAIR_SECONDS = 1800.0


@click.command()
@click.option("--config", "path", metavar="FILE", help="The daemon's TOML file of settings.")
@click.option("--root", metavar="DIR", help="The daemon's root directory.  [default: /var/lib/tare]")
@click.option("--run", metavar="DIR", help="The daemon's run directory.  [default: /run/tare]")
@click.option("--repair", is_flag=True, help="Mend what can be: never what is in use, or not Tare's.")
@click.option("--images", is_flag=True, help="Read all that is stored of images, too, as `tare image verify` does.")
@click.option("--json", "as_json", is_flag=True, help="As -o json.")
@output_option
@click.pass_obj
def doctor(
    socket: str,
    path: str | None,
    root: str | None,
    run: str | None,
    repair: bool,
    images: bool,
    as_json: bool,
    output: str,
) -> int:
    """Say what this node has of what pods need, and what of Tare on it belongs to no record, or is missing.

    The node is looked at with or without a daemon. Ends with 1 where something is missing without which pods do not run or something is
    to be mended, with 2 where it could not be looked at, else with 0.
    """
    from tare import config
    from tare.cli.examine import examine

    settings = config.load(path, root=root, run=run, socket=None if socket == DEFAULT_SOCKET else socket)
    rows = [
        {"subject": found.subject, "state": found.state.value, "text": found.text, "hint": found.hint}
        for found in asyncio.run(examine(settings))
    ]
    blind = False
    try:
        rows += audit(settings, repair=repair)
        rows += damaged(settings) if images else []
    except (TareError, OSError) as error:
        blind = True
        rows.append(
            {
                "subject": "audit",
                "state": "unknown",
                "text": f"it could not be looked at: {describe(error)}",
                "hint": "",
            }
        )
    if as_json or output == "json":
        print_json(rows)
    else:
        print_table(["WHAT", "STATE", "FOUND"], [[row["subject"], row["state"], told(row)] for row in rows])
    missing = any(row["state"] == "missing" for row in rows)
    wrong = any(row["state"] not in ("good", "limited") and not row.get("mended") for row in rows)
    return FINDINGS if missing else BLIND if blind else FINDINGS if wrong else 0


def told(row: dict[str, Any]) -> str:
    """A finding's text, with what was done or can be."""
    text = f"{row['text']}: {row['outcome']}" if row.get("outcome") else str(row["text"])
    return f"{text} ({row['hint']})" if row["hint"] and not row.get("mended") else text


def audit(config: Config, *, repair: bool) -> list[dict[str, Any]]:
    """Findings of the audit, or one that says that there are none. Raises TareError, OSError where it cannot be looked at."""
    from tare.app import taken

    if os.geteuid() != 0:
        raise TareError("audit the node", hint="run it as root: sudo tare doctor")
    with taken(config.root, config.run) as free:
        found = beside(config, repair=repair) if free else asked(config, repair=repair)
    if found:
        return found
    serving = "the daemon" if not free else "no daemon"
    return [{"subject": "audit", "state": "good", "text": f"{serving} serves, and all belongs to a record", "hint": ""}]


def asked(config: Config, *, repair: bool) -> list[dict[str, Any]]:
    """By the daemon that serves. Raises CallFailed."""
    from tare.api.v1 import tare_pb2

    with Client(str(config.socket)) as client:
        seconds = REPAIR_SECONDS if repair else CALL_SECONDS
        answer = client.call(client.node.Audit, tare_pb2.AuditRequest(repair=repair), timeout=seconds)
    names = ("state", "text", "hint", "kind", "name", "owner", "outcome", "mended")
    return [
        {"subject": f"{item.kind} {item.name}", **{name: getattr(item, name) for name in names}}
        for item in answer.findings
    ]


def beside(config: Config, *, repair: bool) -> list[dict[str, Any]]:
    """Where no daemon serves; a repair does what one does that starts, first, and says so of what is gone after it."""
    from tare import app
    from tare.cgroups.layout import detect
    from tare.runtime.audit import Surroundings
    from tare.runtime.audit_live import Outcome, look

    def found() -> list[Outcome]:
        layout = detect(config.runtime.cgroup_root)
        around = Surroundings(run=config.run, root=config.root, keep_blobs=config.images.keep_blobs)
        return [Outcome(finding) for finding in look(config, layout, around)]

    outcomes = found()
    if repair and outcomes:
        done = app.mend(config)
        known = {outcome.finding for outcome in done}
        started = [
            Outcome(item.finding, "settled, as by a daemon's start", True)
            for item in outcomes
            if item.finding not in known
        ]
        outcomes = [*started, *done]
    return [
        {
            "subject": f"{item.finding.kind} {item.finding.name}",
            "state": item.finding.state.value,
            "text": item.finding.text,
            "hint": item.finding.hint,
            "kind": item.finding.kind,
            "name": item.finding.name,
            "owner": item.finding.owner,
            "outcome": item.said,
            "mended": item.mended,
        }
        for item in outcomes
    ]


def damaged(config: Config) -> list[dict[str, Any]]:
    """What is not as its digest says, of all images, by the daemon. Raises CallFailed."""
    from tare.api.v1 import tare_pb2

    with Client(str(config.socket)) as client:
        found = list(client.stream(client.tare.Verify, tare_pb2.VerifyRequest()))
    rows = [
        {
            "subject": f"{item.kind} {item.name}",
            "state": "damaged",
            "text": item.trouble,
            "hint": f"tare image repair {item.image_id}",
        }
        for item in found
        if item.trouble
    ]
    return rows or [
        {
            "subject": "images",
            "state": "good",
            "text": f"{len(found)} blobs and layers are as they should be",
            "hint": "",
        }
    ]
