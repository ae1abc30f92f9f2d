"""`tare stats`: what running containers use, once or again and again."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from tare.cli.client import Client
from tare.cli.containers import container_candidates
from tare.cli.lookup import pick
from tare.cli.options import output_option
from tare.cli.output import as_dict, print_json, print_table, short_id, size

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tare.cri.v1 import api_pb2

COLUMNS = ["CONTAINER", "NAME", "POD", "CPU", "MEMORY", "LIMIT", "SWAP", "DISK"]
CORE = 1_000_000_000  # nanoseconds of CPU in a second
UNKNOWN = "-"


@click.command()
@click.argument("words", metavar="[CONTAINER]...", nargs=-1)
@click.option("--no-stream", "once", is_flag=True, help="Once, instead of until interrupted.")
@click.option(
    "-i",
    "--interval",
    type=click.FloatRange(min=1.0),
    default=2.0,
    show_default=True,
    help="Seconds between two looks; use of CPU is what there was in between.",
)
@output_option
@click.pass_obj
def stats(socket: str, words: tuple[str, ...], once: bool, interval: float, output: str) -> None:
    """Show what running containers use: CPU (100% is one core), memory without idle page cache, disk of what they wrote."""
    with Client(socket) as client:
        wanted = {pick(container_candidates(client.containers()), word, "container").id for word in words}
        # The daemon tells a rate of CPU between two questions: the first may be long ago, so this one sets the clock.
        measure(client, wanted)
        while True:
            time.sleep(1.0 if once else interval)
            found = measure(client, wanted)
            if output == "json":
                print_json([as_dict(item) for item in found])
            else:
                pods = {pod.id: pod.metadata.name for pod in client.pods()}
                owners = {item.id: pods.get(item.pod_sandbox_id, UNKNOWN) for item in client.containers()}
                if not once and sys.stdout.isatty():
                    click.clear()
                print_table(COLUMNS, rows(found, owners))
            sys.stdout.flush()
            if once:
                return


def measure(client: Client, wanted: set[str]) -> list[api_pb2.ContainerStats]:
    """Of the wanted ones (of all, if none is named) that run, by name."""
    from tare.cri.v1 import api_pb2

    answer = client.call(client.runtime.ListContainerStats, api_pb2.ListContainerStatsRequest())
    found = [item for item in answer.stats if not wanted or item.attributes.id in wanted]
    return sorted(found, key=lambda item: (item.attributes.metadata.name, item.attributes.id))


def rows(found: Iterable[api_pb2.ContainerStats], pods: dict[str, str]) -> list[list[str]]:
    """Lines of the table; `pods` are the names of containers' pods."""
    return [
        [
            short_id(item.attributes.id),
            item.attributes.metadata.name,
            pods.get(item.attributes.id, UNKNOWN),
            cpu(item.cpu),
            size(item.memory.working_set_bytes.value) if item.HasField("memory") else UNKNOWN,
            limit(item.memory),
            size(item.swap.swap_usage_bytes.value) if item.HasField("swap") else UNKNOWN,
            size(item.writable_layer.used_bytes.value) if item.HasField("writable_layer") else UNKNOWN,
        ]
        for item in found
    ]


def cpu(usage: api_pb2.CpuUsage) -> str:
    """In hundredths of a core: "12.5%"."""
    return f"{usage.usage_nano_cores.value * 100 / CORE:.1f}%" if usage.HasField("usage_nano_cores") else UNKNOWN


def limit(memory: api_pb2.MemoryUsage) -> str:
    """On memory: what is used and what is available."""
    if not memory.HasField("available_bytes"):
        return UNKNOWN
    return size(memory.working_set_bytes.value + memory.available_bytes.value)
