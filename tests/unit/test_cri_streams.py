"""The six lists in streams, each of five thousand items, over a real gRPC channel: all, none twice, in pieces that a kubelet takes, and an end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tare.cri.v1 import api_pb2 as pb
from tare.images.records import ImageConfig, ImageRecord
from tare.runtime.records import (
    ContainerConfig,
    ContainerMetadata,
    ContainerState,
    ImageRef,
    PodConfig,
    PodMetadata,
)
from tests.support.cri_ports import MemoryImages, MemoryRuntime, serving

COUNT = 5000
KEYS = [f"{number:064x}" for number in range(COUNT)]
KUBELET_MESSAGE = 16 << 20
Items = Callable[[Any], Iterable[str]]


async def crowd() -> MemoryRuntime:
    """So many pods, each with a container that runs."""
    runtime = MemoryRuntime()
    first = await runtime.run_pod(PodConfig(metadata=PodMetadata(name="p", uid="u", namespace="n")), "")
    config = ContainerConfig(metadata=ContainerMetadata(name="c"), image=ImageRef(image="i"))
    made = await runtime.create_container(first, config, runtime.pods[first].config)
    pod = runtime.pods.pop(first)
    container = replace(runtime.containers.pop(made), state=ContainerState.RUNNING)
    runtime.pods.update({key: replace(pod, id=key) for key in KEYS})
    runtime.containers.update({key: replace(container, id=key, pod_id="f" * 64) for key in KEYS})
    return runtime


def images() -> MemoryImages:
    """So many images."""
    record = ImageRecord(id="", repo_tags=(), repo_digests=(), size=1, config=ImageConfig(), chain_ids=())
    return MemoryImages(records=[replace(record, id=key) for key in KEYS])


@pytest.mark.parametrize(
    ("method", "items"),
    [
        ("StreamPodSandboxes", lambda piece: (item.id for item in piece.pod_sandboxes)),
        ("StreamContainers", lambda piece: (item.id for item in piece.containers)),
        ("StreamContainerStats", lambda piece: (item.attributes.id for item in piece.container_stats)),
        ("StreamPodSandboxStats", lambda piece: (item.attributes.id for item in piece.pod_sandbox_stats)),
        ("StreamPodSandboxMetrics", lambda piece: (item.pod_sandbox_id for item in piece.pod_sandbox_metrics)),
        ("StreamImages", lambda piece: (item.id for item in piece.images)),
    ],
)
def test_five_thousand_items_come_once_each_and_then_the_end(tmp_path: Path, method: str, items: Items) -> None:
    async def play() -> list[Any]:
        async with serving(tmp_path / "s", await crowd(), images()) as client:
            service = client.images if method == "StreamImages" else client.runtime
            # The loop ends with the stream's own end: anything else would be an error, or a wait.
            return [piece async for piece in getattr(service, method)(getattr(pb, f"{method}Request")())]

    pieces = asyncio.run(asyncio.wait_for(play(), 60))
    assert sorted(item for piece in pieces for item in items(piece)) == KEYS
    assert len(pieces) >= 20 and max(piece.ByteSize() for piece in pieces) < KUBELET_MESSAGE
