"""`tare images --outdated`, `tare update`, `tare explain-pull`: what registries have now."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tare.cli.client import Client
from tare.cli.credentials import credentials, creds_option
from tare.cli.output import print_table, short_id
from tare.cli.progress import watch
from tare.errors import TareError

if TYPE_CHECKING:
    from tare.api.v1 import tare_pb2


def moved(client: Client, images: tuple[str, ...]) -> list[tare_pb2.Freshness]:
    """The tags that stand for something else at their registries now, or of which that cannot be said; by name."""
    from tare.api.v1 import tare_pb2
    from tare.cri.v1 import api_pb2

    names = images or tuple(
        tag
        for image in client.call(client.images.ListImages, api_pb2.ListImagesRequest()).images
        for tag in image.repo_tags
    )
    known: dict[str, tare_pb2.Credentials] = {}
    for name in names:
        server = name.partition("/")[0]
        auth = None if server in known else credentials(name, None)
        if auth is not None:
            auth.server_address = server
            known[server] = auth
    request = tare_pb2.OutdatedRequest(images=images, auth=list(known.values()))
    found = client.stream(client.tare.Outdated, request)
    return sorted((f for f in found if f.trouble or f.here != f.there), key=lambda f: f.name)


def print_outdated(client: Client, quiet: bool) -> None:
    """`tare images --outdated`."""
    found = moved(client, ())
    if quiet:
        for tag in found:
            if not tag.trouble:
                print(tag.name)
        return
    rows = [[f.name, short_id(f.here), short_id(f.there), f.trouble] for f in found]
    print_table(["IMAGE", "HERE", "THERE", "TROUBLE"], rows)


@click.command()
@click.argument("images", metavar="[IMAGE...]", nargs=-1)
@click.option(
    "--restart", is_flag=True, help="Then restart running containers that stand on an older image of these tags."
)
@click.option(
    "-t", "--timeout", type=click.IntRange(min=0), default=10, show_default=True, help="Seconds until one is killed."
)
@click.pass_obj
def update(socket: str, images: tuple[str, ...], restart: bool, timeout: int) -> None:
    """Pull tags (all of them where none is named) that have moved at their registries, and print them.

    With --restart containers are made anew from the newer image, all else as it was; where that does not start, from the older one again.
    Those of a kubelet's pods are stopped, and the kubelet starts them; those that a `tare run` waits for are left.
    """
    from tare.api.v1 import tare_pb2

    failures = []
    with Client(socket) as client:
        for tag in moved(client, images):
            if tag.trouble:
                failures.append(f"{tag.name}: {tag.trouble}")
                continue
            request = tare_pb2.PullRequest(image=tag.name, auth=credentials(tag.name, None))
            watch(client.stream(client.tare.Pull, request), f"pulling {tag.name}")
            print(tag.name)
        if restart:
            failures += print_restarted(client, images, timeout)
    if failures:
        raise TareError("update images", cause="; ".join(failures))


def print_restarted(client: Client, images: tuple[str, ...], timeout: int) -> list[str]:
    """Restart what is behind, print what became of each, and return what failed."""
    from tare.cli.restart import restart
    from tare.cri.v1 import api_pb2
    from tare.images.reference import parse

    wanted = {parse(name).tagged for name in images}
    listed = client.call(client.images.ListImages, api_pb2.ListImagesRequest()).images
    tags = {tag: image.id for image in listed for tag in image.repo_tags if not images or tag in wanted}
    rows, failures = [], []
    for done in restart(client, tags, timeout):
        rows.append([short_id(done.id), done.name, done.tag, short_id(done.new), done.outcome])
        if done.failed:
            failures.append(f"{done.name}: {done.outcome}")
    if rows:
        print_table(["CONTAINER", "NAME", "IMAGE", "NOW", "OUTCOME"], rows)
    return failures


@click.command("explain-pull")
@click.argument("image")
@creds_option
@click.pass_obj
def explain_pull(socket: str, image: str, creds: str | None) -> None:
    """Tell what a pull of IMAGE would do: each host that is asked, each answer, and why; no layer is fetched."""
    from tare.api.v1 import tare_pb2

    request = tare_pb2.ExplainRequest(image=image, auth=credentials(image, creds))
    with Client(socket) as client:
        for line in client.stream(client.tare.ExplainPull, request):
            print("  " * line.depth + line.text)
