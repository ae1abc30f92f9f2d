"""Network namespaces for tests: a test body that runs in one of its own, and others that stand for pods and for hosts on the wire.

A namespace lives as long as a thread in it or a descriptor of it, so nothing is left however a test ends. A socket keeps
the namespace in which it was made: with `Namespace.udp` and its like one thread holds both ends of a conversation.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

CLONE_NEWNET = 0x40000000
TIMEOUT = 5.0
libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    """Raise what a C function's result means."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def in_thread(function: Callable[[], R]) -> R:
    """The function's result, or its error, from a thread that ends with it."""
    results: list[R] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again where the test waits
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def on_its_own_node(test: Callable[P, R]) -> Callable[P, R]:
    """Run the test in a network namespace of its own, with the loopback up: a node on which nothing else is."""

    @functools.wraps(test)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        def body() -> R:
            checked(libc.unshare(CLONE_NEWNET))
            sh("ip link set lo up")
            return test(*args, **kwargs)

        return in_thread(body)

    return wrapper


def sh(command: str) -> str:
    """Run a command in the namespace of this thread; its output."""
    return subprocess.run(command.split(), check=True, capture_output=True, text=True, timeout=30).stdout


def ip(command: str) -> list[dict[str, Any]]:
    """What `ip` says of the namespace of this thread, such as `ip("addr show")`."""
    found: list[dict[str, Any]] = json.loads(sh(f"ip -details -json {command}") or "[]")
    return [item for item in found if item]


def udp(address: str, port: int = 0) -> socket.socket:
    """A datagram socket in the namespace of this thread."""
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(TIMEOUT)
    sock.bind((address, port))
    return sock


class Namespace:
    """A network namespace, new or that of the process `pid`: `fd`, and `netlink`, an rtnetlink socket in it."""

    def __init__(self, pid: int | None = None) -> None:
        def make() -> tuple[int, socket.socket]:
            if pid is None:
                checked(libc.unshare(CLONE_NEWNET))
            else:
                with open(f"/proc/{pid}/ns/net") as there:
                    checked(libc.setns(there.fileno(), CLONE_NEWNET))
            fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            return fd, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)

        self.fd, self.netlink = in_thread(make)
        self._sockets = [self.netlink]

    def __enter__(self) -> Namespace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the namespace; twice is the same as once."""
        for sock in self._sockets:
            sock.close()
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def run(self, function: Callable[[], R]) -> R:
        """The function's result, from a thread inside."""

        def inside() -> R:
            checked(libc.setns(self.fd, CLONE_NEWNET))
            return function()

        return in_thread(inside)

    def ip(self, command: str) -> list[dict[str, Any]]:
        """What `ip` says inside."""
        return self.run(lambda: ip(command))

    def sh(self, command: str) -> str:
        """Run a command inside."""
        return self.run(lambda: sh(command))

    def udp(self, address: str = "0.0.0.0", port: int = 0) -> socket.socket:
        """A bound datagram socket inside; closed with the namespace."""
        return self.keep(lambda: udp(address, port))

    def keep(self, make: Callable[[], socket.socket]) -> socket.socket:
        """A socket made inside; closed with the namespace."""
        sock = self.run(make)
        self._sockets.append(sock)
        return sock


def wire(other: Namespace, name: str, peer: str) -> None:
    """A veth from the namespace of this thread (`name`) into the other one (`peer`), both up."""
    # `ip` knows namespaces by PID or by a name under /run/netns; a thread inside has a PID of its own.
    ready, done = threading.Event(), threading.Event()
    tids: list[int] = []

    def stay() -> None:
        checked(libc.setns(other.fd, CLONE_NEWNET))
        tids.append(threading.get_native_id())
        ready.set()
        done.wait(TIMEOUT)

    thread = threading.Thread(target=stay)
    thread.start()
    try:
        ready.wait(TIMEOUT)
        sh(f"ip link add {name} type veth peer name {peer} netns {tids[0]}")
    finally:
        done.set()
        thread.join()
    sh(f"ip link set {name} up")
    other.sh("ip link set lo up")
    other.sh(f"ip link set {peer} up")
