"""`tare tag`, `tare push`, `tare history`."""

from __future__ import annotations

import click

from tare.cli.client import Client
from tare.cli.credentials import credentials, creds_option
from tare.cli.options import output_option
from tare.cli.output import as_dict, print_json, print_table, size
from tare.cli.progress import watch

SHOWN_COMMAND = 60


@click.command()
@click.argument("image")
@click.argument("name")
@click.pass_obj
def tag(socket: str, image: str, name: str) -> None:
    """Give IMAGE the further name NAME, which another image may lose by it."""
    from tare.api.v1 import tare_pb2

    with Client(socket) as client:
        print(client.call(client.tare.Tag, tare_pb2.TagRequest(image=image, name=name)).name)


@click.command()
@click.argument("image")
@click.argument("name", required=False, default="")
@creds_option
@click.option(
    "--all-platforms", is_flag=True, help="The whole index that IMAGE is from; what is not here is fetched from there."
)
@click.pass_obj
def push(socket: str, image: str, name: str, creds: str | None, all_platforms: bool) -> None:
    """Push IMAGE to its registry, under NAME if that is given, and print its digest there."""
    from tare.api.v1 import tare_pb2

    request = tare_pb2.PushRequest(image=image, target=name, auth=credentials(name or image, creds))
    if all_platforms:
        request.whole = True
        request.origin_auth.CopyFrom(credentials(image, None) or tare_pb2.Credentials())
    with Client(socket) as client:
        print(watch(client.stream(client.tare.Push, request), f"pushing {name or image}").digest)


@click.command()
@click.argument("image")
@click.option("--no-trunc", is_flag=True, help="Print commands in full.")
@output_option
@click.pass_obj
def history(socket: str, image: str, no_trunc: bool, output: str) -> None:
    """Print the steps by which IMAGE was made, the newest first."""
    from tare.api.v1 import tare_pb2

    with Client(socket) as client:
        answer = client.call(client.tare.History, tare_pb2.ImageRequest(image=image))
    if output == "json":
        print_json(as_dict(answer))
        return
    rows = []
    for entry in answer.entries:
        command = " ".join(entry.created_by.split())
        if not no_trunc and len(command) > SHOWN_COMMAND:
            command = command[: SHOWN_COMMAND - 1] + "…"
        rows.append([entry.created or "-", size(entry.size), command or "-", entry.comment])
    print_table(["CREATED", "SIZE", "CREATED BY", "COMMENT"], rows)
