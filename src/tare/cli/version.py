"""`tare version`: the client's and the daemon's."""

from __future__ import annotations

import click

from tare import __version__
from tare.cli.client import Client
from tare.cli.options import output_option
from tare.cli.output import as_dict, print_json, print_table


@click.command()
@click.option("--client", "client_only", is_flag=True, help="Do not ask the daemon.")
@output_option
@click.pass_obj
def version(socket: str, client_only: bool, output: str) -> None:
    """Print this client's version and the daemon's."""
    if client_only:
        if output == "json":
            print_json({"client": {"version": __version__}})
        else:
            print_table(["PART", "VERSION", "CRI"], [["client", __version__, "v1"]])
        return
    from tare.cri.v1 import api_pb2

    with Client(socket) as client:
        answer = client.call(client.runtime.Version, api_pb2.VersionRequest())
    if output == "json":
        print_json({"client": {"version": __version__}, "daemon": as_dict(answer)})
        return
    rows = [["client", __version__, "v1"], [answer.runtime_name, answer.runtime_version, answer.runtime_api_version]]
    print_table(["PART", "VERSION", "CRI"], rows)
