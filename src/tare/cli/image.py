"""`tare image verify`, `tare image repair`: the health of what is stored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from tare.cli.client import Client
from tare.cli.credentials import credentials, creds_option
from tare.cli.options import output_option
from tare.cli.output import as_dict, print_json, print_table, short_id

if TYPE_CHECKING:
    from tare.api.v1 import tare_pb2


@click.group()
def image() -> None:
    """Look after images: find what is damaged, and repair it."""


@image.command()
@click.argument("images", metavar="[IMAGE...]", nargs=-1)
@output_option
@click.pass_obj
def verify(socket: str, images: tuple[str, ...], output: str) -> int:
    """Read all that is stored of images (of all of them where none is named); ends with 1 where something is damaged."""
    from tare.api.v1 import tare_pb2

    with Client(socket) as client:
        found = list(client.stream(client.tare.Verify, tare_pb2.VerifyRequest(images=images)))
    troubled = [finding for finding in found if finding.trouble]
    if output == "json":
        print_json([as_dict(finding) for finding in found])
    elif troubled:
        print_table(["IMAGE", "KIND", "NAME", "TROUBLE"], rows(troubled))
    else:
        print(f"{len(found)} blobs and layers are as they should be")
    return 1 if troubled else 0


@image.command()
@click.argument("name", metavar="IMAGE")
@creds_option
@output_option
@click.pass_obj
def repair(socket: str, name: str, creds: str | None, output: str) -> None:
    """Make what is damaged of IMAGE anew, and that alone: from its blobs, or where those are damaged from its registry."""
    from tare.api.v1 import tare_pb2

    request = tare_pb2.RepairRequest(image=name, auth=credentials(name, creds))
    with Client(socket) as client:
        found = list(client.stream(client.tare.Repair, request))
    if output == "json":
        print_json([as_dict(finding) for finding in found])
    elif found:
        print_table(["IMAGE", "KIND", "REPAIRED", "TROUBLE"], rows(found))
    else:
        print("nothing was to be repaired")


def rows(findings: Iterable[tare_pb2.Finding]) -> list[list[str]]:
    """Findings for a reader."""
    return [[short_id(f.image_id), f.kind, short_id(f.name), f.trouble] for f in findings]
