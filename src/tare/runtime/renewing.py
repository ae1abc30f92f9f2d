"""A running container made anew from another image: in the same pod, with all else as it was.

    create the new ─► stop the old ─► start the new ─► remove the old
                                        │ fails
                                        └► remove the new ─► create and start one of the old image ─► remove the old

Until the new one exists the old one runs undisturbed. Whatever is cut off in between leaves containers that CRI shows, never none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from tare.errors import FailedPrecondition, TareError, describe
from tare.runtime.records import ContainerConfig, ContainerRecord, ContainerState, PodConfig, PodRecord

log = logging.getLogger(__name__)


class Pod(Protocol):
    """A pod with its containers."""

    @property
    def record(self) -> PodRecord:
        """The pod."""

    @property
    def containers(self) -> Sequence[ContainerRecord]:
        """Its containers in any state."""


class Containers(Protocol):
    """What `Runtime` does with containers."""

    def container_status(self, container_id: str) -> ContainerRecord:
        """Raises NotFound."""

    def pod_status(self, pod_id: str) -> Pod:
        """Raises NotFound."""

    async def create_container(self, pod_id: str, config: ContainerConfig, pod_config: PodConfig) -> str:
        """Its ID."""

    async def start_container(self, container_id: str) -> None:
        """It RUNS."""

    async def stop_container(self, container_id: str, timeout: float) -> None:
        """It does not."""

    async def remove_container(self, container_id: str) -> None:
        """It is gone."""


@dataclass(frozen=True, slots=True)
class Renewed:
    """The container that runs now; with `trouble` it is of the old image, because one of the new did not start."""

    id: str
    trouble: str = ""


def again(containers: Containers, record: ContainerRecord, image_id: str) -> ContainerConfig:
    """The container's configuration with this image, as the next attempt."""
    config = record.config
    name = config.metadata.name
    known = containers.pod_status(record.pod_id).containers
    attempt = max(c.config.metadata.attempt for c in known if c.config.metadata.name == name) + 1
    image = replace(config.image, image=image_id, image_ref="")
    return replace(config, metadata=replace(config.metadata, attempt=attempt), image=image)


async def renew(containers: Containers, container_id: str, image_id: str, timeout: float) -> Renewed:
    """Make a container anew; the old one is given `timeout` seconds to end. Raises NotFound, FailedPrecondition and what creating raises.

    Where neither the new image nor the old one starts, what starting the old one failed with is raised, and no such container runs.
    """
    old = containers.container_status(container_id)
    if old.state is not ContainerState.RUNNING:
        raise FailedPrecondition(
            f"renew container {old.id}", cause=f"it is {old.state.name}", hint="only what runs is renewed"
        )
    pod = containers.pod_status(old.pod_id).record
    new = await containers.create_container(pod.id, again(containers, old, image_id), pod.config)
    await containers.stop_container(old.id, timeout)
    try:
        await containers.start_container(new)
    except (TareError, OSError) as error:
        trouble = describe(error)
        log.warning("container %s did not start from its new image, the old one is used again: %s", new, trouble)
        await containers.remove_container(new)
        new = await containers.create_container(pod.id, again(containers, old, old.image_id), pod.config)
        await containers.start_container(new)
        await containers.remove_container(old.id)
        return Renewed(new, trouble)
    await containers.remove_container(old.id)
    return Renewed(new)
