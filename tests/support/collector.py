"""An OpenTelemetry collector that keeps what it is sent: OTLP over gRPC on a port of the loopback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

WAIT_SECONDS = 30.0


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Spans as they came."""

    port: int = 0
    spans: list[trace_pb2.Span] = field(default_factory=list)
    resources: list[dict[str, str]] = field(default_factory=list)

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        """OTLP's one method."""
        for group in request.resource_spans:
            self.resources.append({item.key: item.value.string_value for item in group.resource.attributes})
            self.spans += [span for scope in group.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def wait(self, done: Callable[[list[trace_pb2.Span]], bool]) -> list[trace_pb2.Span]:
        """All spans, once they are what is waited for."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not done(spans := list(self.spans)):
            assert time.monotonic() < deadline, sorted(span.name for span in spans)
            time.sleep(0.02)
        return spans


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that listens."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
