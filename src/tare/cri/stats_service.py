"""The part of CRI's RuntimeService that measures: statistics of containers and pods, and metrics.

Lists are of containers that run and of pods that are READY. Asked for one by its ID, the answer is what there is: of a container
that does not run, its writable layer. A stream has the same as its list, in pieces.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

from tare.cri import filters
from tare.cri import translate_requests as requests
from tare.cri import translate_stats as replies
from tare.cri.ports import RuntimePort
from tare.cri.v1 import api_pb2 as pb
from tare.runtime import metrics
from tare.runtime.records import ContainerState, PodState
from tare.runtime.stats import PodDetails

STREAM_BATCH = 100
T = TypeVar("T")


class StatsService:
    """CRI's methods on statistics and metrics."""

    def __init__(self, runtime: RuntimePort) -> None:
        self._measured = runtime
        self._devices = metrics.Devices()

    async def ContainerStats(self, request: pb.ContainerStatsRequest) -> pb.ContainerStatsResponse:
        """One container's."""
        container_id = requests.identifier(request.container_id, "container_id")
        return pb.ContainerStatsResponse(
            stats=replies.container_stats(await self._measured.stats.container(container_id))
        )

    async def ListContainerStats(self, request: pb.ListContainerStatsRequest) -> pb.ListContainerStatsResponse:
        """Those of the running containers that fit."""
        return pb.ListContainerStatsResponse(stats=await self._containers(request.filter))

    async def StreamContainerStats(
        self, request: pb.StreamContainerStatsRequest
    ) -> AsyncGenerator[pb.StreamContainerStatsResponse]:
        """The same, in pieces."""
        for batch in batches(await self._containers(request.filter)):
            yield pb.StreamContainerStatsResponse(container_stats=batch)

    async def _containers(self, wanted: pb.ContainerStatsFilter) -> list[pb.ContainerStats]:
        chosen = filters.ContainerFilter(
            id=wanted.id,
            pod_id=wanted.pod_sandbox_id,
            state=ContainerState.RUNNING,
            labels=dict(wanted.label_selector),
        )
        records = chosen.select(self._measured.list_containers())
        return [replies.container_stats(item) for item in await self._measured.stats.containers(records)]

    async def PodSandboxStats(self, request: pb.PodSandboxStatsRequest) -> pb.PodSandboxStatsResponse:
        """One pod's."""
        pod_id = requests.identifier(request.pod_sandbox_id, "pod_sandbox_id")
        return pb.PodSandboxStatsResponse(stats=replies.pod_stats(await self._measured.stats.pod(pod_id)))

    async def ListPodSandboxStats(self, request: pb.ListPodSandboxStatsRequest) -> pb.ListPodSandboxStatsResponse:
        """Those of the READY pods that fit."""
        return pb.ListPodSandboxStatsResponse(stats=await self._pods(request.filter))

    async def StreamPodSandboxStats(
        self, request: pb.StreamPodSandboxStatsRequest
    ) -> AsyncGenerator[pb.StreamPodSandboxStatsResponse]:
        """The same, in pieces."""
        for batch in batches(await self._pods(request.filter)):
            yield pb.StreamPodSandboxStatsResponse(pod_sandbox_stats=batch)

    async def _pods(self, wanted: pb.PodSandboxStatsFilter) -> list[pb.PodSandboxStats]:
        chosen = filters.PodFilter(id=wanted.id, state=PodState.READY, labels=dict(wanted.label_selector))
        records = chosen.select(self._measured.list_pods())
        return [replies.pod_stats(item) for item in await self._measured.stats.pods(records)]

    async def ListMetricDescriptors(self, request: pb.ListMetricDescriptorsRequest) -> pb.ListMetricDescriptorsResponse:
        """All that a list of metrics can have."""
        found = metrics.descriptions(self._measured.stats.cgroup_version)
        return pb.ListMetricDescriptorsResponse(descriptors=[replies.descriptor(item) for item in found])

    async def ListPodSandboxMetrics(self, request: pb.ListPodSandboxMetricsRequest) -> pb.ListPodSandboxMetricsResponse:
        """Of every READY pod and its running containers."""
        return pb.ListPodSandboxMetricsResponse(pod_metrics=[item async for item in self._metrics()])

    async def StreamPodSandboxMetrics(
        self, request: pb.StreamPodSandboxMetricsRequest
    ) -> AsyncGenerator[pb.StreamPodSandboxMetricsResponse]:
        """The same, in pieces."""
        for batch in batches([item async for item in self._metrics()]):
            yield pb.StreamPodSandboxMetricsResponse(pod_sandbox_metrics=batch)

    async def _metrics(self) -> AsyncGenerator[pb.PodSandboxMetrics]:
        for pod in await self._measured.stats.details():
            yield self._of_pod(pod)
            # A pod takes a millisecond or so: other calls get their turn in between.
            await asyncio.sleep(0)

    def _of_pod(self, pod: PodDetails) -> pb.PodSandboxMetrics:
        return pb.PodSandboxMetrics(
            pod_sandbox_id=pod.record.id,
            metrics=replies.metrics(metrics.of_pod(pod)),
            container_metrics=[
                pb.ContainerMetrics(
                    container_id=item.stats.record.id,
                    metrics=replies.metrics(metrics.of_container(pod, item, self._devices.name)),
                )
                for item in pod.containers
            ],
        )


def batches(items: Sequence[T]) -> list[Sequence[T]]:
    """Pieces of a list."""
    return [items[start : start + STREAM_BATCH] for start in range(0, len(items), STREAM_BATCH)]
