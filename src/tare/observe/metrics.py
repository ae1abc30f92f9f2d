"""What is counted of the daemon's own work, in Prometheus' terms. Imported only where a metrics address is set.

    tare_call_seconds                 service, method, code            gRPC calls, from their arrival to their answer's end
    tare_calls                        service, method                  … that are under way
    tare_operation_seconds            operation, code                  RunPodSandbox, PullImage … as a whole, whoever waits for it
    tare_operation_step_seconds       operation, step, code            … and each of its steps; "undo STEP" is what takes one back
    tare_image_pull_seconds           code                             pulls

What there is at the moment of the question (pods, helpers' health, queues, bytes pulled) is in `gauges`.
"""

from __future__ import annotations

from typing import Final

from prometheus_client import CollectorRegistry, Gauge, Histogram, Info, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from tare import __version__

SHORT: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
LONG: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 1280.0)
PULL: Final = "PullImage"


class Metrics:
    """Fits `watch.Meter`."""

    def __init__(self) -> None:
        # One more series for each histogram, of which nobody makes use.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self._calls = Histogram(
            "tare_call_seconds",
            "gRPC calls, from their arrival to the end of their answer.",
            ("service", "method", "code"),
            buckets=SHORT,
            registry=self.registry,
        )
        self._open = Gauge(
            "tare_calls", "gRPC calls that are under way.", ("service", "method"), registry=self.registry
        )
        self._operations = Histogram(
            "tare_operation_seconds",
            "Operations of several steps as a whole, undoing included.",
            ("operation", "code"),
            buckets=SHORT,
            registry=self.registry,
        )
        self._steps = Histogram(
            "tare_operation_step_seconds",
            "Steps of operations, and what takes them back.",
            ("operation", "step", "code"),
            buckets=SHORT,
            registry=self.registry,
        )
        self._pulls = Histogram(
            "tare_image_pull_seconds", "Pulls of images.", ("code",), buckets=LONG, registry=self.registry
        )
        Info("tare_build", "Which version this is.", registry=self.registry).info({"version": __version__})
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def begun(self, service: str, method: str) -> None:
        """A call is under way."""
        self._open.labels(service, method).inc()

    def ended(self, service: str, method: str, outcome: str, seconds: float) -> None:
        """It is over."""
        self._open.labels(service, method).dec()
        self._calls.labels(service, method, outcome).observe(seconds)

    def operation(self, name: str, outcome: str, seconds: float) -> None:
        """An operation is over."""
        self._operations.labels(name, outcome).observe(seconds)
        if name == PULL:
            self._pulls.labels(outcome).observe(seconds)

    def step(self, operation: str, step: str, outcome: str, seconds: float) -> None:
        """A step of one is."""
        self._steps.labels(operation, step, outcome).observe(seconds)
