"""Sockets that live in a pod's network namespace, made by a thread that enters it and ends: a namespace is a thread's own (setns(2))."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from pathlib import Path

from tare.network import place

CONNECT_SECONDS = 10.0
LOOPBACKS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))


def make_socket(namespace: Path | None, family: socket.AddressFamily) -> socket.socket:
    """A TCP socket in the namespace that a file pins; None: the node's. Raises OSError."""
    if namespace is None:
        return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    return place.inside(namespace, lambda: make_socket(None, family))


async def make_apart(namespace: Path | None, family: socket.AddressFamily) -> socket.socket:
    """The same without holding up the loop: setns waits where others make or end namespaces."""
    if namespace is None:
        return make_socket(None, family)
    making = asyncio.get_running_loop().run_in_executor(None, make_socket, namespace, family)
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(close_made)
        raise


def close_made(making: asyncio.Future[socket.socket]) -> None:
    """What nobody waits for any more."""
    if not making.cancelled() and making.exception() is None:
        making.result().close()


async def connect(namespace: Path | None, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to a port of a namespace's loopback, IPv4 first, as "localhost" is looked up. Raises OSError, TimeoutError."""
    failure: OSError | None = None
    for family, address in LOOPBACKS:
        try:
            connection = await make_apart(namespace, family)
        except OSError as error:  # a node without IPv6
            failure = failure or error
            continue
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(connection, (address, port))
            return await asyncio.open_connection(sock=connection)
        except OSError as error:
            connection.close()
            # asyncio puts words of its own in the place of the kernel's; its own TimeoutError has no number
            number = error.errno or (errno.ETIMEDOUT if isinstance(error, TimeoutError) else errno.EIO)
            failure = failure or OSError(number, os.strerror(number), f"{address} port {port}")
        except BaseException:
            connection.close()
            raise
    assert failure is not None
    raise failure
