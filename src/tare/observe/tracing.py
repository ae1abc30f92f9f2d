"""Traces by OpenTelemetry, sent to a collector over OTLP: a span for each call, each operation and each of its steps.

    kubelet's span ─traceparent─► runtime.v1.RuntimeService/RunPodSandbox
                                    └─ RunPodSandbox ─┬─ RunPodSandbox namespaces
                                                      ├─ RunPodSandbox network
                                                      └─ …

The caller decides whether its trace is kept; of calls that bring no decision the part `sampling_ratio` is. Spans wait in a bounded queue for a
thread that sends them: a collector that is slow or away costs spans, never a call. Imported only where an endpoint is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Token
from typing import Final

from opentelemetry import context as contexts
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tare import __version__, subject
from tare.config import TracingConfig
from tare.observe.watch import OK, Metadata

EXPORT_SECONDS: Final = (
    3.0  # for one batch; as long, and once more, the end of the daemon may be held up by what is left
)
SECURE: Final = "https://"
TOLD: Final = {
    "pod": "tare.pod.id",
    "container": "tare.container.id",
    "reference": "tare.image.reference",
}  # of an operation's names


class Stretch:
    """A span that is the context's own until it ends."""

    def __init__(self, span: trace.Span, token: Token[Context] | None) -> None:
        self._span = span
        self._token = token

    def end(self, outcome: str, message: str) -> None:
        """Send it."""
        if self._token is not None:
            contexts.detach(self._token)
        for name, value in subject.bound().items():
            if name != "method":
                self._span.set_attribute(f"tare.{name}.id", value)
        if outcome != OK:
            self._span.set_attribute("error.type", outcome)
            self._span.set_status(Status(StatusCode.ERROR, message))
        self._span.end()


class Tracing:
    """Fits `watch.Tracer`."""

    def __init__(self, config: TracingConfig, exporter: SpanExporter | None = None) -> None:
        exporter = exporter or OTLPSpanExporter(
            endpoint=config.endpoint, insecure=not config.endpoint.startswith(SECURE), timeout=EXPORT_SECONDS
        )
        resource = Resource.create({"service.name": config.service_name, "service.version": __version__})
        sampler = ParentBased(TraceIdRatioBased(config.sampling_ratio))
        self._provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tare", __version__)
        self._propagator = TraceContextTextMapPropagator()

    def call(self, service: str, method: str, metadata: Metadata) -> Stretch:
        """A call. It stays the context's own span: what it leaves behind to be done is part of it, and its context ends with it."""
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        parent = self._propagator.extract(carrier)
        attributes = {"rpc.system.name": "grpc", "rpc.method": f"{service}/{method}"}
        span = self._tracer.start_span(f"{service}/{method}", parent, SpanKind.SERVER, attributes)
        contexts.attach(trace.set_span_in_context(span, parent))
        return Stretch(span, None)

    def work(self, name: str, attributes: Mapping[str, str]) -> Stretch:
        """Part of what is under way; what it does itself is part of it."""
        told = {TOLD[key]: value for key, value in attributes.items() if key in TOLD}
        span = self._tracer.start_span(name, attributes=told)
        return Stretch(span, contexts.attach(trace.set_span_in_context(span)))

    def close(self) -> None:
        """Send what is left. Blocks."""
        self._provider.shutdown()


def ids() -> Mapping[str, str]:
    """The IDs of the trace and of the span that is under way, as log lines have them."""
    span = trace.get_current_span().get_span_context()
    if not span.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(span.trace_id), "span_id": trace.format_span_id(span.span_id)}
