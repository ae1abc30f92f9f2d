"""Sockets that live in a pod's network namespace, made by a thread that enters it and ends: a namespace is a thread's own (setns(2))."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import socket
import threading
from pathlib import Path

CLONE_NEWNET = 0x40000000
CONNECT_SECONDS = 10.0
LOOPBACKS = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))

_libc = ctypes.CDLL(None, use_errno=True)


def make_socket(namespace: Path | None, family: socket.AddressFamily) -> socket.socket:
    """A TCP socket in the namespace that a file pins; None: the node's. Raises OSError."""
    if namespace is None:
        return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    made: list[socket.socket | OSError] = []

    def enter() -> None:
        try:
            switch(namespace)
            made.append(make_socket(None, family))
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=enter, name="netns")
    thread.start()
    thread.join()
    (result,) = made
    if isinstance(result, OSError):
        raise result
    return result


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


def switch(namespace: Path) -> None:
    """Move the calling thread, which is to end soon, into the namespace that a file pins. Raises OSError."""
    fd = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, CLONE_NEWNET):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(namespace))
    finally:
        os.close(fd)


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
