"""What there is at the moment when Prometheus asks: pods, containers, helpers' health, queues. Nothing is looked at in between.

tare_pods                  state                      tare_helper_up             helper    "keeper", "launcher": whether it answers
tare_containers            state                      tare_logger_up             group     … and each logger that serves containers
tare_images                                           tare_logger_containers     group
tare_image_pull_bytes      (a counter)                tare_logger_lost_lines     group     for want of room, not yet told in the logs
tare_queue_length          queue, see `queues`        tare_operations_stuck                could not be undone; their intents are kept
tare_event_subscribers                                tare_launcher_start_time_seconds     another one, where it has changed
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from tare.cri.dispatch import Lasting
from tare.handlers import health
from tare.observe.sources import Sources, queues
from tare.runtime.records import ContainerState, PodState


def by_state(
    states: Iterable[PodState] | Iterable[ContainerState], every: Iterable[Any]
) -> list[tuple[list[str], int]]:
    """How many are in each state."""
    counted = Counter(states)
    return [([state.name.lower()], counted[state]) for state in every]


def gauge(name: str, text: str, labels: Iterable[str], values: Iterable[tuple[list[str], float]]) -> Metric:
    """A family with these samples: (values of the labels, value)."""
    family = GaugeMetricFamily(f"tare_{name}", text, labels=list(labels))
    for given, value in values:
        family.add_metric(given, value)
    return family


class Gauges(Collector):
    """The families as of the last `refresh`, which belongs to the event loop; they are collected anywhere."""

    def __init__(self, sources: Sources, lasting: Lasting) -> None:
        self._sources = sources
        self._lasting = lasting
        self._families: list[Metric] = []

    def collect(self) -> Iterable[Metric]:
        """As of the last look."""
        return self._families

    def describe(self) -> Iterable[Metric]:
        """Nothing before the first look: nobody else has these names."""
        return ()

    async def refresh(self) -> None:
        """Look. Helpers that do not answer are waited for, for two seconds."""
        self._families = [*self._held(), *await self._helpers(), *await self._loggers()]

    def _held(self) -> Iterable[Metric]:
        """What memory has."""
        sources, store = self._sources, self._sources.store
        stuck = sum(bool(intent.failures) for intent in sources.operations.pending())
        received = CounterMetricFamily("tare_image_pull_bytes", "Bytes of blobs that came from registries.")
        received.add_metric([], sources.images.workers.received)
        pods = by_state((pod.state for pod in store.pods.values()), PodState)
        containers = by_state((item.state for item in store.containers.values()), ContainerState)
        waiting = [([name], count) for name, count in queues(sources, self._lasting).items()]
        return (
            gauge("pods", "Pods, by state.", ("state",), pods),
            gauge("containers", "Containers, by state.", ("state",), containers),
            gauge("images", "Images.", (), [([], len(sources.images.list()))]),
            received,
            gauge("queue_length", "What waits, by what for.", ("queue",), waiting),
            gauge("operations_stuck", "Operations that could not be undone or finished.", (), [([], stuck)]),
            gauge("event_subscribers", "Who follows events.", (), [([], store.journal.followers)]),
        )

    async def _helpers(self) -> Iterable[Metric]:
        troubles = await self._sources.handler.troubles()
        up = [([name], name not in troubles) for name in ("keeper", "launcher")]
        ticks = self._sources.handler.launcher_start_time()
        began = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
        return (
            gauge("helper_up", "Whether the process answers.", ("helper",), up),
            gauge(
                "launcher_start_time_seconds",
                "When the launcher of now began.",
                (),
                [([], round(began, 1))] * bool(ticks),
            ),
        )

    async def _loggers(self) -> Iterable[Metric]:
        found = await health.loggers(self._sources.run)
        served = [([item.group], item.containers) for item in found]
        lost = [([item.group], item.lost_lines) for item in found if item.lost_lines is not None]
        return (
            gauge(
                "logger_up",
                "Whether the logger of a group answers.",
                ("group",),
                [([item.group], item.trouble is None) for item in found],
            ),
            gauge("logger_containers", "Containers whose output a logger moves.", ("group",), served),
            gauge("logger_lost_lines", "Lines that found no room and are not yet told in the logs.", ("group",), lost),
        )
