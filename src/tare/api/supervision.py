"""The service tare.v1.Supervision, beside CRI's: containers of `tare run` that are restarted, or whose health is looked at."""

from __future__ import annotations

import asyncio
import json

from tare.api.v1 import tare_pb2 as pb
from tare.images.service import ImageService
from tare.runtime import health
from tare.runtime.service import Runtime
from tare.runtime.supervise import Execute, ReadConfig, Supervisor, View


def probing(runtime: Runtime) -> Execute:
    """What runs a probe of a container's health: its exit code, and what it said."""

    async def execute(container_id: str, command: tuple[str, ...], timeout: float) -> tuple[int, bytes]:
        done = await runtime.exec_sync(container_id, command, timeout)
        return done.exit_code, done.stdout + done.stderr

    return execute


def checks_of(images: ImageService) -> ReadConfig:
    """What says how an image wants its containers' health looked at."""

    async def check(image_id: str) -> health.Check:
        document = await asyncio.to_thread(images.store.content.read, image_id)
        return health.of_image(json.loads(document))

    return check


class Supervision:
    """Over one supervisor."""

    lasting: frozenset[str] = frozenset()

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def Supervised(self, request: pb.SupervisedRequest) -> pb.SupervisedReply:
        """All of them."""
        return pb.SupervisedReply(containers=map(container, self._supervisor.views()))


def container(view: View) -> pb.SupervisedContainer:
    """One as a message."""
    probes = (
        pb.Probe(
            started_at=probe.started_at, finished_at=probe.finished_at, exit_code=probe.exit_code, output=probe.output
        )
        for probe in view.probes
    )
    return pb.SupervisedContainer(
        pod_id=view.pod_id,
        container_id=view.row.container_id,
        policy=view.row.policy,
        restarts=view.row.restarts,
        state=view.state,
        next_start=view.next_start,
        health=view.row.health,
        failing_streak=view.row.streak,
        probes=probes,
    )
