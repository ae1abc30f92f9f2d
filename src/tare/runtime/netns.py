"""Sockets that live in a pod's network namespace, made by a thread that enters it and ends: a namespace is a thread's own (setns(2))."""

from __future__ import annotations

import asyncio
import ctypes
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
            connection = make_socket(namespace, family)
        except OSError as error:  # a node without IPv6
            failure = failure or error
            continue
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(connection, (address, port))
            return await asyncio.open_connection(sock=connection)
        except OSError as error:
            connection.close()
            number = error.errno or 0  # asyncio puts words of its own in the place of the kernel's
            failure = failure or OSError(number, os.strerror(number), f"{address} port {port}")
        except BaseException:
            connection.close()
            raise
    assert failure is not None
    raise failure
