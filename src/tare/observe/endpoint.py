"""Where Prometheus finds the metrics: GET /metrics, plain HTTP on the address that the settings name. Imported only where they name one.

There is neither authentication nor encryption: whoever reaches the address may read. So that nobody who does can take the daemon's descriptors
from it, a connection is for one request, there are so many of them, and none lives longer than an answer may take. The answer is put
together in a thread.
"""

from __future__ import annotations

import asyncio
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from tare.errors import FailedPrecondition
from tare.observe.gauges import Gauges

HEAD_SIZE: Final = 8 << 10
MAX_CONNECTIONS: Final = 32
LIFE_SECONDS: Final = 30.0
STOP_SECONDS: Final = 1.0  # for answers that are on their way when the daemon ends


class TurnedAway(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It ends."""
        transport.close()


class Endpoint:
    """Serves one registry at an address and a port (0: any free one, which `port` tells). No connection lives longer than `life` seconds."""

    def __init__(
        self, registry: CollectorRegistry, gauges: Gauges, host: str, port: int, life: float = LIFE_SECONDS
    ) -> None:
        self._registry = registry
        self._gauges = gauges
        self._host = host
        self.port = port
        self._life = life
        registry.register(gauges)
        app = web.Application()
        app.router.add_get("/metrics", self._answer)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            shutdown_timeout=STOP_SECONDS,
            max_line_size=HEAD_SIZE,
            max_field_size=HEAD_SIZE,
        )
        self._listening: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises FailedPrecondition."""
        await self._runner.setup()
        try:
            self._listening = await asyncio.get_running_loop().create_server(self._accept, self._host, self.port)
        except OSError as error:
            await self._runner.cleanup()
            raise FailedPrecondition(
                f"serve metrics on {self._host} port {self.port}", cause=error, hint="see [metrics] address"
            ) from error
        self.port = self._listening.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        """Where the metrics are."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}/metrics"

    async def stop(self) -> None:
        """Listen no more."""
        if self._listening is not None:
            self._listening.close()
        await self._runner.cleanup()

    def _accept(self) -> asyncio.BaseProtocol:
        """Who speaks on a new connection."""
        server = self._runner.server
        if server is None or len(server.connections) >= MAX_CONNECTIONS:
            return TurnedAway()
        connection: web.RequestHandler = server()
        asyncio.get_running_loop().call_later(self._life, drop, connection)
        return connection

    async def _answer(self, request: web.Request) -> web.Response:
        await self._gauges.refresh()
        encode, kind = choose_encoder(request.headers.get("Accept", ""))
        body = await asyncio.to_thread(encode, self._registry)
        answer = web.Response(body=body, headers={"Content-Type": kind})
        answer.force_close()
        return answer


def drop(connection: web.RequestHandler) -> None:
    """It has had its time, if it is there still."""
    if connection.transport is not None:
        connection.transport.abort()
