"""What the settings ask for of metrics and traces, put together. What they do not ask for is not imported, and is nowhere on a call's path."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from tare.config import Config, TracingConfig
from tare.errors import FailedPrecondition
from tare.observe.logs import nothing
from tare.observe.watch import Watch

if TYPE_CHECKING:
    from tare.cri.dispatch import Lasting
    from tare.observe.endpoint import Endpoint
    from tare.observe.metrics import Metrics
    from tare.observe.sources import Sources
    from tare.observe.tracing import Tracing

log = logging.getLogger(__name__)


class Observers:
    """`watch` is told of calls and operations, or is None where nobody wants to know. Raises FailedPrecondition for what is not installed."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._tracing = tracing(config.tracing) if config.tracing.endpoint else None
        self._metrics = metrics() if config.metrics.address else None
        wanted = self._tracing is not None or self._metrics is not None
        self.watch = Watch(self._metrics, self._tracing) if wanted else None
        self._endpoint: Endpoint | None = None

    @property
    def trace_ids(self) -> Callable[[], Mapping[str, str]]:
        """What tells the IDs of the trace that the work at hand belongs to."""
        if self._tracing is None:
            return nothing
        from tare.observe.tracing import ids

        return ids

    async def start(self, sources: Sources, lasting: Lasting) -> None:
        """Let Prometheus ask, if it is to. Raises FailedPrecondition."""
        if self._metrics is None:
            return
        from tare.observe.endpoint import Endpoint
        from tare.observe.gauges import Gauges

        endpoint = Endpoint(self._metrics.registry, Gauges(sources, lasting), *self._config.metrics.place())
        await endpoint.start()
        self._endpoint = endpoint
        log.info("metrics at %s", endpoint.url)

    async def stop(self) -> None:
        """No more questions: the parts of the daemon are about to go."""
        if self._endpoint is not None:
            await self._endpoint.stop()

    async def close(self) -> None:
        """Send what is left of traces, for some seconds at most."""
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)


def metrics() -> Metrics:
    """Counters that nobody has counted with yet."""
    from tare.observe.metrics import Metrics

    return Metrics()


def tracing(config: TracingConfig) -> Tracing:
    """A tracer for the collector of the settings. Raises FailedPrecondition."""
    try:
        from tare.observe.tracing import Tracing
    except ImportError as error:
        hint = "pip install 'tare[tracing]', or leave [tracing] endpoint out"
        raise FailedPrecondition("trace with OpenTelemetry", cause=error, hint=hint) from error
    return Tracing(config)
