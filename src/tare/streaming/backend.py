"""What tickets stand for, done by the runtime."""

from __future__ import annotations

import asyncio
from typing import Protocol

from tare.runtime.interactive import Interactive
from tare.runtime.streams import Streams
from tare.streaming.remote import Outcome, Wanted
from tare.streaming.server import ATTACH, EXEC, FORWARD, Request, Server
from tare.streaming.sessions import Session


def streams(wanted: Wanted) -> Streams:
    """The runtime's word for what a client has. With a terminal there is one output."""
    return Streams(stdin=wanted.stdin, stdout=wanted.stdout, stderr=wanted.stderr and not wanted.tty, tty=wanted.tty)


class RuntimeBackend:
    """A `server.Backend`."""

    def __init__(self, interactive: Interactive) -> None:
        self._interactive = interactive

    async def exec(self, request: Request, session: Session) -> Outcome:
        """Run the command to its end."""
        code = await self._interactive.exec(request.target, request.command, streams(request.wanted), session)
        return Outcome(code=code)

    async def attach(self, request: Request, session: Session) -> Outcome:
        """Join the container."""
        await self._interactive.attach(request.target, streams(request.wanted), session)
        return Outcome()

    async def dial(self, pod_id: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection into the pod."""
        return await self._interactive.dial(pod_id, port)


class Asked(Protocol):
    """The streams that a caller of CRI asked for."""

    @property
    def stdin(self) -> bool:
        """Whether it writes."""

    @property
    def stdout(self) -> bool:
        """Whether it reads output."""

    @property
    def stderr(self) -> bool:
        """Whether it reads errors, apart."""

    @property
    def tty(self) -> bool:
        """Whether there is a terminal."""


def asked(given: Asked) -> Wanted:
    """In this room's words."""
    return Wanted(stdin=given.stdin, stdout=given.stdout, stderr=given.stderr, tty=given.tty)


class RuntimeUrls:
    """Looks whether a request can be granted, and hands out its URL. Raises NotFound, FailedPrecondition, InvalidArgument, ResourceExhausted."""

    def __init__(self, interactive: Interactive, server: Server) -> None:
        self._interactive, self._server = interactive, server

    def exec(self, container_id: str, command: tuple[str, ...], given: Asked) -> str:
        """For a command in a running container."""
        record = self._interactive.check_exec(container_id)
        return self._server.url(EXEC, Request(target=record.id, command=command, wanted=asked(given)))

    def attach(self, container_id: str, given: Asked) -> str:
        """For a running container's own streams."""
        record = self._interactive.check_attach(container_id, streams(asked(given)))
        return self._server.url(ATTACH, Request(target=record.id, wanted=asked(given)))

    def port_forward(self, pod_id: str, ports: tuple[int, ...]) -> str:
        """For connections to a pod's ports."""
        return self._server.url(FORWARD, Request(target=self._interactive.check_forward(pod_id), ports=ports))
