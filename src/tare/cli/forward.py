"""`tare port-forward`: ports of this machine that lead into a pod, through its network namespace, for as long as the command runs."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from tare.cli.client import Client
from tare.cli.containers import pod_candidates
from tare.cli.lookup import pick
from tare.errors import FailedPrecondition, InvalidArgument, describe

PORTS = re.compile(r"(?:(?P<local>\d{0,5}):)?(?P<remote>\d{1,5})")
CHUNK = 64 << 10
MAX_PORT = 0xFFFF


@dataclass(frozen=True, slots=True)
class Way:
    """From a port here (0: any free one) to one in the pod."""

    local: int
    remote: int


def parse(text: str) -> Way:
    """ "8080:80", "80" (the same one here), ":80" (any free one). Raises InvalidArgument."""
    match = PORTS.fullmatch(text)
    if match is None:
        raise InvalidArgument("read the ports", cause=f"{text!r} is not [LOCAL:]REMOTE")
    remote = int(match["remote"])
    local = remote if match["local"] is None else int(match["local"] or 0)
    if not 0 < remote <= MAX_PORT or local > MAX_PORT:
        raise InvalidArgument("read the ports", cause=f"{text!r} has a number that is not a port")
    return Way(local, remote)


@click.command("port-forward")
@click.option(
    "--address", "addresses", multiple=True, default=("127.0.0.1", "::1"), show_default=True, help="Where to listen."
)
@click.argument("pod")
@click.argument("ports", metavar="[LOCAL:]REMOTE...", nargs=-1, required=True)
@click.pass_obj
def port_forward(socket: str, addresses: tuple[str, ...], pod: str, ports: tuple[str, ...]) -> None:
    """Lead ports of this machine to ports of POD until interrupted."""
    ways = [parse(text) for text in ports]
    with Client(socket) as client:
        target = pick(pod_candidates(client.pods()), pod, "pod")
        namespace = namespace_of(client, target.id)
    asyncio.run(serve(addresses, ways, namespace))


def namespace_of(client: Client, pod_id: str) -> Path | None:
    """The file that pins a pod's network namespace; None for the node's. Raises FailedPrecondition where the pod does not run."""
    from tare.cri.v1 import api_pb2

    request = api_pb2.PodSandboxStatusRequest(pod_sandbox_id=pod_id, verbose=True)
    answer = client.call(client.runtime.PodSandboxStatus, request)
    if answer.status.state != api_pb2.SANDBOX_READY:
        raise FailedPrecondition(f"forward ports of pod {pod_id}", cause="it does not run")
    if answer.status.linux.namespaces.options.network == api_pb2.NODE:
        return None
    return Path(json.loads(answer.info["info"])["namespaces"]["net"])


async def serve(addresses: tuple[str, ...], ways: list[Way], namespace: Path | None) -> None:
    """Listen until SIGINT or SIGTERM."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        for way in ways:
            await listen(stack, addresses, way, namespace)
        await stop.wait()


async def listen(
    stack: contextlib.AsyncExitStack, addresses: tuple[str, ...], way: Way, namespace: Path | None
) -> None:
    """One way, at all addresses that this machine has. Raises FailedPrecondition where it is none of them."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await relay(reader, writer, namespace, way.remote)

    failure: OSError | None = None
    port, listening = way.local, False
    for address in addresses:
        try:
            server = await asyncio.start_server(connected, address, port)
        except OSError as error:
            failure = error
            continue
        stack.callback(server.close)
        port, listening = server.sockets[0].getsockname()[1], True
        shown = f"[{address}]" if ":" in address else address
        click.echo(f"Forwarding from {shown}:{port} -> {way.remote}")
    if not listening:
        raise FailedPrecondition(f"listen on port {way.local}", cause=failure)


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, namespace: Path | None, port: int) -> None:
    """One connection, each way half closed by itself."""
    from tare.runtime import netns

    try:
        inner_reader, inner_writer = await netns.connect(namespace, port)
    except OSError as error:
        sys.stderr.write(f"tare: forward to port {port}: {describe(error)}\n")
        writer.close()
        return
    try:
        await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))
    except OSError as error:
        sys.stderr.write(f"tare: connection to port {port}: {describe(error)}\n")
    finally:
        writer.close()
        inner_writer.close()


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One way."""
    while data := await reader.read(CHUNK):
        writer.write(data)
        await writer.drain()
    writer.write_eof()
