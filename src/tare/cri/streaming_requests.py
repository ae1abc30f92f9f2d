"""Exec, Attach and PortForward as CRI asks for them, checked (pure). What they lead to is a URL; the rest is over HTTP."""

from __future__ import annotations

from dataclasses import dataclass

from tare.cri import checks
from tare.cri.v1 import api_pb2 as pb

MAX_PORTS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which streams the caller has, and whether a terminal is between them."""

    stdin: bool
    stdout: bool
    stderr: bool
    tty: bool


def wanted(request: pb.ExecRequest | pb.AttachRequest) -> Wanted:
    """The streams; there must be one, and a terminal has no stderr of its own. Raises InvalidArgument."""
    if request.tty and request.stderr:
        raise checks.refuse("stderr", "tty is set, and a terminal has one output only")
    if not (request.stdin or request.stdout or request.stderr):
        raise checks.refuse("stdout", "none of stdin, stdout and stderr is set")
    return Wanted(stdin=request.stdin, stdout=request.stdout, stderr=request.stderr, tty=request.tty)


def command(request: pb.ExecRequest) -> tuple[str, ...]:
    """The command and its arguments; there must be a command. Raises InvalidArgument."""
    if not request.cmd:
        raise checks.refuse("cmd", "it is empty")
    checks.present(request.cmd[0], "cmd[0]")
    return checks.texts(request.cmd, "cmd")


def ports(request: pb.PortForwardRequest) -> tuple[int, ...]:
    """The ports that are named; none may be. Raises InvalidArgument."""
    if len(request.port) > MAX_PORTS:
        raise checks.refuse("port", f"{len(request.port)} ports, at most {MAX_PORTS} are possible")
    for index, port in enumerate(request.port):
        if not 0 < port < 1 << 16:
            raise checks.refuse(f"port[{index}]", f"{port} is not a port")
    return tuple(request.port)
