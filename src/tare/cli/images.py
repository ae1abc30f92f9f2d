"""`tare pull`, `tare images`, `tare rmi`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tare.cli.client import Client
from tare.cli.credentials import credentials, creds_option
from tare.cli.options import output_option, quiet_option
from tare.cli.output import as_dict, print_json, print_table, short_id, size
from tare.cli.progress import watch
from tare.errors import NotFound

if TYPE_CHECKING:
    from tare.cri.v1 import api_pb2

PULL_SECONDS = 3600.0


def find(client: Client, name: str) -> api_pb2.Image | None:
    """The image that a name, digest or ID means, if it is here."""
    from tare.cri.v1 import api_pb2

    request = api_pb2.ImageStatusRequest(image=api_pb2.ImageSpec(image=name))
    answer = client.call(client.images.ImageStatus, request)
    return answer.image if answer.image.id else None


@click.command()
@click.argument("image")
@creds_option
@output_option
@click.pass_obj
def pull(socket: str, image: str, creds: str | None, output: str) -> None:
    """Pull IMAGE from its registry and print the ID that it has here.

    Without --creds, credentials are those of docker's config.json and its helpers, if there are any.
    """
    from tare.api.v1 import tare_pb2

    request = tare_pb2.PullRequest(image=image, auth=credentials(image, creds))
    with Client(socket) as client:
        last = watch(client.stream(client.tare.Pull, request), f"pulling {image}")
    if output == "json":
        print_json({"imageRef": last.image_id, "digest": last.digest})
    else:
        print(last.image_id)


def rows_of(image: api_pb2.Image) -> list[list[str]]:
    """One row for each of its tags, or one without."""
    tags = list(image.repo_tags) or [f"{digest.partition('@')[0]}:<none>" for digest in image.repo_digests[:1]]
    return [[tag, short_id(image.id), size(image.size)] for tag in tags or ["<none>"]]


@click.command()
@quiet_option
@output_option
@click.option("--outdated", is_flag=True, help="Only tags that have moved at their registries.")
@click.pass_obj
def images(socket: str, quiet: bool, output: str, outdated: bool) -> None:
    """List the images that are here."""
    from tare.cri.v1 import api_pb2

    with Client(socket) as client:
        if outdated:
            from tare.cli.freshness import print_outdated

            print_outdated(client, quiet)
            return
        answer = client.call(client.images.ListImages, api_pb2.ListImagesRequest())
    if output == "json":
        print_json(as_dict(answer))
    elif quiet:
        for image in answer.images:
            print(image.id)
    else:
        rows = sorted(row for image in answer.images for row in rows_of(image))
        print_table(["IMAGE", "ID", "SIZE"], rows)


@click.command("rmi")
@click.argument("names", metavar="IMAGE...", nargs=-1, required=True)
@click.option("-f", "--force", is_flag=True, help="An image that is not here is no failure.")
@click.pass_obj
def remove(socket: str, names: tuple[str, ...], force: bool) -> None:
    """Remove images, with all their tags."""
    from tare.cri.v1 import api_pb2

    with Client(socket) as client:
        for name in names:
            if find(client, name) is None:
                if force:
                    continue
                raise NotFound(f"there is no image {name} here")
            client.call(client.images.RemoveImage, api_pb2.RemoveImageRequest(image=api_pb2.ImageSpec(image=name)))
            print(name)
