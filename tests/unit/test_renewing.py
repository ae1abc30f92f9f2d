"""What `tare update --restart` does to one container, step by step, with a runtime that only remembers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from tare.errors import FailedPrecondition, InvalidArgument
from tare.runtime import renewing
from tare.runtime.records import (
    ContainerConfig,
    ContainerMetadata,
    ContainerRecord,
    ContainerState,
    ImageRef,
    PodConfig,
    PodMetadata,
    PodRecord,
    PodState,
)

POD = PodRecord(
    id="pod", config=PodConfig(metadata=PodMetadata(name="p", uid="u", namespace="n")), handler="", state=PodState.READY,
    created_at=1,
)  # fmt: skip
CONFIG = ContainerConfig(
    metadata=ContainerMetadata(name="web", attempt=2),
    image=ImageRef(image="sha256:old", user_specified_image="app:1", image_ref="sha256:old"),
    command=("serve",),
)
OLD = ContainerRecord(
    id="old",
    pod_id="pod",
    config=CONFIG,
    image_id="sha256:old",
    image_ref="",
    state=ContainerState.RUNNING,
    created_at=1,
)


@dataclass(frozen=True)
class View:
    record: PodRecord
    containers: Sequence[ContainerRecord]


@dataclass
class Remembering:
    """`broken` images do not start; those in `refused` cannot be made containers of."""

    broken: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    known: dict[str, ContainerRecord] = field(default_factory=lambda: {"old": OLD})
    done: list[str] = field(default_factory=list)

    def container_status(self, container_id: str) -> ContainerRecord:
        return self.known[container_id]

    def pod_status(self, pod_id: str) -> View:
        return View(POD, list(self.known.values()))

    async def create_container(self, pod_id: str, config: ContainerConfig, pod_config: PodConfig) -> str:
        if config.image.image in self.refused:
            raise InvalidArgument("create container")
        assert (pod_id, pod_config, config.image.user_specified_image) == ("pod", POD.config, "app:1")
        assert replace(config, metadata=CONFIG.metadata, image=CONFIG.image) == CONFIG
        name = f"{config.image.image}-{config.metadata.attempt}"
        self.known[name] = replace(OLD, id=name, config=config, state=ContainerState.CREATED)
        self.done.append(f"create {name}")
        return name

    async def start_container(self, container_id: str) -> None:
        self.done.append(f"start {container_id}")
        if self.known[container_id].config.image.image in self.broken:
            raise FailedPrecondition("start container", cause="no such program")

    async def stop_container(self, container_id: str, timeout: float) -> None:
        self.done.append(f"stop {container_id} {timeout:g}")

    async def remove_container(self, container_id: str) -> None:
        del self.known[container_id]
        self.done.append(f"remove {container_id}")


def test_the_new_takes_the_place_of_the_old() -> None:
    runtime = Remembering()
    renewed = asyncio.run(renewing.renew(runtime, "old", "sha256:new", 3.0))
    assert renewed == renewing.Renewed("sha256:new-3")
    assert runtime.done == ["create sha256:new-3", "stop old 3", "start sha256:new-3", "remove old"]


def test_one_that_does_not_start_gives_way_to_the_old_image() -> None:
    runtime = Remembering(broken={"sha256:new"})
    renewed = asyncio.run(renewing.renew(runtime, "old", "sha256:new", 0.0))
    assert renewed.id == "sha256:old-3" and "no such program" in renewed.trouble
    assert list(runtime.known) == ["sha256:old-3"]


def test_one_that_cannot_be_made_leaves_the_old_alone() -> None:
    runtime = Remembering(refused={"sha256:new"})
    with pytest.raises(InvalidArgument):
        asyncio.run(renewing.renew(runtime, "old", "sha256:new", 0.0))
    assert runtime.done == []


def test_where_neither_starts_both_are_there_to_be_looked_at() -> None:
    runtime = Remembering(broken={"sha256:new", "sha256:old"})
    with pytest.raises(FailedPrecondition):
        asyncio.run(renewing.renew(runtime, "old", "sha256:new", 0.0))
    assert list(runtime.known) == ["old", "sha256:old-3"]


def test_what_does_not_run_is_not_renewed() -> None:
    runtime = Remembering(known={"old": replace(OLD, state=ContainerState.EXITED)})
    with pytest.raises(FailedPrecondition, match="it is EXITED"):
        asyncio.run(renewing.renew(runtime, "old", "sha256:new", 0.0))
    assert runtime.done == []
