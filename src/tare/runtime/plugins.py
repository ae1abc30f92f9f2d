"""What plugins of the node (NRI) are asked and told, from the side of pods and containers: the interface, and when it is used.

    asked    its failure is the operation's: a pod or a container is not made, not started, not changed
    told     its failure is logged

With no plugin `active` is False, and that is looked at before anything is put together for one. What NRI's own messages and rules are is
`tare.nri`'s, which fits `Plugins`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tare.runtime.ports import Parts
    from tare.runtime.records import ContainerRecord, PodRecord, Resources
    from tare.runtime.store import PodFacts, Store


class Moment(enum.Enum):
    """When plugins have a say; the value is NRI's name for it."""

    RUN_POD = "RunPodSandbox"
    UPDATE_POD = "UpdatePodSandbox"
    POD_UPDATED = "PostUpdatePodSandbox"
    STOP_POD = "StopPodSandbox"
    REMOVE_POD = "RemovePodSandbox"
    CREATED = "PostCreateContainer"
    START = "StartContainer"
    STARTED = "PostStartContainer"
    UPDATED = "PostUpdateContainer"
    STOPPED = "StopContainer"
    REMOVED = "RemoveContainer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What it is about: a pod, or a container in it with its OCI configuration. `unborn`: the container is not on record yet."""

    pod: PodRecord
    facts: PodFacts | None = None
    container: ContainerRecord | None = None
    spec: Mapping[str, Any] = field(default_factory=dict)
    pid: int = 0
    unborn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Adjusted:
    """A container's configuration as plugins want it; `resources` are its limits, `cgroup` where its group is to be.

    `devices` are CDI's names, `sources` what its new mounts bind, `shared` those whose mounts are to spread back, or to spread here.
    """

    spec: dict[str, Any]
    resources: Resources
    cgroup: str
    devices: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    spreading: tuple[tuple[str, str], ...] = ()


class Plugins(Protocol):
    """Those that are connected, as one."""

    active: bool

    def titles(self) -> Sequence[str]:
        """What they are called, in the order in which they are asked."""

    async def making(self, thing: str) -> None:
        """A pod or a container is about to be put to the plugins, and not yet on record: one that connects now waits for it, or it for that one."""

    def made(self, thing: str) -> None:
        """It is on record, or will not be. Idempotent."""

    async def ask(
        self, moment: Moment, subject: Subject, wanted: Resources | None = None, overhead: Resources | None = None
    ) -> None:
        """Raises PluginFailed in the words of the plugin that does not want it."""

    async def tell(self, moment: Moment, subject: Subject) -> None:
        """Never raises; a plugin's failure is logged."""

    async def adjust(self, subject: Subject, cgroup: str) -> Adjusted | None:
        """A container that is being made, as the plugins want it; None where none wants anything. Raises as `ask`, and for what cannot be done."""

    async def change(self, subject: Subject, wanted: Resources) -> Resources:
        """The limits that a container is to be given, as the plugins want them. Raises as `ask`."""

    def ended(self, subject: Subject) -> None:
        """A container has ended: plugins are told, and what they want of others is done, in the background."""


def of_pod(store: Store, pod: PodRecord) -> Subject:
    """A pod that is on record, or was."""
    return Subject(pod=pod, facts=store.pod_facts.get(pod.id))


def of_container(store: Store, record: ContainerRecord) -> Subject:
    """A container that is on record, with its pod."""
    pod = store.pods[record.pod_id]
    facts = store.container_facts.get(record.id)
    return Subject(
        pod=pod,
        facts=store.pod_facts.get(pod.id),
        container=record,
        spec=store.plan(record.id).spec,
        pid=facts.process.pid if facts is not None else 0,
    )


async def ask_pod(
    parts: Parts, moment: Moment, pod: PodRecord, wanted: Resources | None = None, overhead: Resources | None = None
) -> None:
    """About a pod on record, if there are plugins. Raises as `Plugins.ask`."""
    if parts.plugins.active:
        await parts.plugins.ask(moment, of_pod(parts.store, pod), wanted, overhead)


async def tell_pod(parts: Parts, moment: Moment, pod: PodRecord | None) -> None:
    """Of a pod, likewise; nothing where there is none."""
    if parts.plugins.active and pod is not None:
        await parts.plugins.tell(moment, of_pod(parts.store, pod))


async def tell_container(parts: Parts, moment: Moment, container_id: str) -> None:
    """Of a container on record, likewise."""
    if parts.plugins.active and (record := parts.store.containers.get(container_id)) is not None:
        await parts.plugins.tell(moment, of_container(parts.store, record))


async def ask_limits(parts: Parts, record: ContainerRecord, wanted: Resources) -> Resources:
    """The limits that a container is to be given, as plugins want them. Raises as `Plugins.change`."""
    if not parts.plugins.active:
        return wanted
    return await parts.plugins.change(of_container(parts.store, record), wanted)


def ended(parts: Parts, record: ContainerRecord) -> None:
    """A container's end is on record: plugins hear of it in the background."""
    if parts.plugins.active:
        parts.plugins.ended(of_container(parts.store, record))


def removal(parts: Parts, record: ContainerRecord) -> Subject | None:
    """What plugins will be told of a container that is about to be removed; None where there are none."""
    return of_container(parts.store, record) if parts.plugins.active else None


async def tell_removed(parts: Parts, subject: Subject | None) -> None:
    """It is gone; one that never ran has ended by that."""
    if subject is None:
        return
    if subject.container is not None and not subject.container.finished_at and not subject.pid:
        await parts.plugins.tell(Moment.STOPPED, subject)
    await parts.plugins.tell(Moment.REMOVED, subject)
