"""The pods and containers that there are: in memory for every read, written through to the two databases.

    state.db   pods             PodRecord        what lasts: a reboot changes states, not records
               containers       ContainerRecord
               plans            Plan             the static half of a container, kept from CreateContainer for StartContainer
    boot.db    pod_facts        PodFacts         what exists of a pod in this boot
               container_facts  ContainerFacts   what exists of a container in this boot
               offers           Offer            pods and containers whose caller has not had the answer yet

Every change of a state is an event (`events`), told when it is on record. Nothing here touches anything but memory and the
databases, and nothing waits.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tare.errors import AlreadyExists, InternalError, InvalidArgument, NotFound
from tare.runtime.events import CONTAINER_KINDS, POD_KINDS, Journal, Kind
from tare.runtime.records import ContainerMetadata, ContainerRecord, PodRecord, ProcessFact
from tare.state.database import Database

T = TypeVar("T", PodRecord, ContainerRecord)


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFacts:
    """What was made for a pod in this boot: `pins`, its namespaces' paths by kind; `pause`, the process that is PID 1 of a
    shared PID namespace; `group`, the logger that serves its containers; `cgroups`, the groups made for it, deepest first."""

    pins: dict[str, str] = field(default_factory=dict)
    pause: ProcessFact | None = None
    group: str = ""
    cgroups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerFacts:
    """A started container's process, and where it is."""

    process: ProcessFact
    cgroup: str
    group: str
    owns_pid_namespace: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpointed:
    """What a container is restored from: CRIU's `images`, and the directory where it may `work`; the keys of mounts that are to be given
    (`external`) and of its streams ("": none that is inherited); whether TCP connections go on (`established`), or are closed; whether there
    are `objects` of System V in the IPC namespace."""

    images: str
    work: str
    external: tuple[str, ...] = ()
    streams: tuple[str, str, str] = ("", "", "")
    established: bool = True
    objects: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The static half of a container: its OCI configuration, where its cgroup is to be, its layers' directories, top first, and the checkpoint
    that it is restored from, if it is.

    The configuration is kept as text of its own: an environment may hold bytes that are no UTF-8 (surrogates, in the
    configuration), which ASCII JSON can carry.
    """

    document: str
    cgroup: str
    lowers: tuple[str, ...] = ()
    checkpoint: Checkpointed | None = None

    @classmethod
    def of(cls, spec: Mapping[str, Any], cgroup: str, lowers: Iterable[Path]) -> Plan:
        """The plan of a configuration."""
        return cls(document=json.dumps(spec), cgroup=cgroup, lowers=tuple(str(path) for path in lowers))

    @property
    def spec(self) -> dict[str, Any]:
        """The OCI configuration, made anew at each call."""
        spec: dict[str, Any] = json.loads(self.document)
        return spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """When the thing was made, in ns since the epoch."""

    made_at: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView:
    """A pod and its containers, oldest first, seen at one moment."""

    record: PodRecord
    containers: tuple[ContainerRecord, ...]


def container_key(pod_id: str, metadata: ContainerMetadata) -> str:
    """The name under which a container is reserved: unique within its pod."""
    return f"{metadata.name}_{metadata.attempt}_{pod_id}"


class Store:
    """Pods and containers. Names are held from `reserve_…` until the thing is dropped or the reservation released."""

    def __init__(self, state: Database, boot: Database) -> None:
        self.journal = Journal()
        self.listeners: list[Callable[[Kind, str, PodRecord], None]] = []  # told of all that the journal is told of
        self._state = state
        self._boot = boot
        self._pods = state.table("pods", PodRecord)
        self._containers = state.table("containers", ContainerRecord)
        self._plans = state.table("plans", Plan)
        self._pod_facts = boot.table("pod_facts", PodFacts)
        self._container_facts = boot.table("container_facts", ContainerFacts)
        self._offers = boot.table("offers", Offer)
        self.pods = dict(self._pods.items())
        self.containers = dict(self._containers.items())
        self.pod_facts = dict(self._pod_facts.items())
        self.container_facts = dict(self._container_facts.items())
        self._names = {record.config.metadata.key: record.id for record in self.pods.values()}
        self._names |= {container_key(c.pod_id, c.config.metadata): c.id for c in self.containers.values()}
        self._pending_layers: dict[str, frozenset[str]] = {}
        self._members: dict[str, dict[str, None]] = {}
        for record in sorted(self.containers.values(), key=lambda record: record.created_at):
            self._members.setdefault(record.pod_id, {})[record.id] = None

    # Looking

    def pod(self, pod_id: str, doing: str) -> PodRecord:
        """The pod with this ID or unique prefix. Raises NotFound, or InvalidArgument for a prefix of several."""
        record = self.find_pod(pod_id, doing)
        if record is None:
            raise NotFound(f"{doing} pod {pod_id}", cause="there is no pod with that ID")
        return record

    def find_pod(self, pod_id: str, doing: str) -> PodRecord | None:
        """The pod with this ID or unique prefix, or None. Raises InvalidArgument for a prefix of several."""
        return _find(self.pods, pod_id, f"{doing} pod")

    def container(self, container_id: str, doing: str) -> ContainerRecord:
        """The container with this ID or unique prefix. Raises NotFound, or InvalidArgument for a prefix of several."""
        record = self.find_container(container_id, doing)
        if record is None:
            raise NotFound(f"{doing} container {container_id}", cause="there is no container with that ID")
        return record

    def find_container(self, container_id: str, doing: str) -> ContainerRecord | None:
        """The container with this ID or unique prefix, or None. Raises InvalidArgument for a prefix of several."""
        return _find(self.containers, container_id, f"{doing} container")

    def view(self, record: PodRecord) -> PodView:
        """The pod with its containers."""
        containers = (self.containers.get(member) for member in self._members.get(record.id, ()))
        return PodView(record=record, containers=tuple(c for c in containers if c is not None))

    def members(self, pod_id: str) -> list[str]:
        """IDs of a pod's containers, oldest first, those that are being made included."""
        return list(self._members.get(pod_id, ()))

    def holder(self, name: str) -> str | None:
        """The ID that holds a name."""
        return self._names.get(name)

    def plan(self, container_id: str) -> Plan:
        """A container's static half."""
        plan = self._plans.get(container_id)
        if plan is None:
            raise InternalError(f"read the plan of container {container_id}", cause="state.db has none")
        return plan

    def layers(self) -> set[str]:
        """Chain IDs of every layer that a container stands on, or is about to."""
        standing = {layer for record in self.containers.values() for layer in record.layers}
        return standing.union(*self._pending_layers.values())

    def hold_layers(self, container_id: str, layers: Iterable[str]) -> None:
        """A container that is being made stands on these layers (until it is on record, or let go)."""
        self._pending_layers[container_id] = frozenset(layers)

    def let_layers_go(self, container_id: str) -> None:
        """It is on record, or will not be made."""
        self._pending_layers.pop(container_id, None)

    def offered(self) -> list[tuple[str, float]]:
        """IDs of what nobody has claimed, and how many seconds ago it was made."""
        now = time.time_ns()
        return [(key, (now - offer.made_at) / 1e9) for key, offer in self._offers.items()]

    # Names

    def reserve_pod(self, name: str, pod_id: str) -> None:
        """Hold a pod's name. Raises AlreadyExists, naming the holder."""
        self._reserve(name, pod_id, "run pod")

    def reserve_container(self, name: str, container_id: str, pod_id: str) -> None:
        """Hold a container's name, and count it among its pod's. Raises AlreadyExists, naming the holder."""
        self._reserve(name, container_id, "create container")
        self._members.setdefault(pod_id, {})[container_id] = None

    def _reserve(self, name: str, holder: str, doing: str) -> None:
        taken = self._names.setdefault(name, holder)
        if taken != holder:
            raise AlreadyExists(f"{doing} {name}", cause=f"the name is held by {taken}")

    def release_pod(self, name: str, pod_id: str) -> None:
        """Let go of a reserved name whose pod was not made."""
        if pod_id not in self.pods and self._names.get(name) == pod_id:
            del self._names[name]

    def release_container(self, name: str, container_id: str, pod_id: str) -> None:
        """Let go of a reserved name whose container was not made."""
        if container_id in self.containers:
            return
        if self._names.get(name) == container_id:
            del self._names[name]
        self._leave(pod_id, container_id)

    # Writing

    def add_pod(self, record: PodRecord, facts: PodFacts) -> None:
        """A new pod, offered to its caller."""
        self._names[record.config.metadata.key] = record.id
        with self._boot.transaction():
            self.put_pod_facts(record.id, facts)
            self._offers.put(record.id, Offer(made_at=record.created_at))
        self.put_pod(record)

    def put_pod(self, record: PodRecord) -> None:
        """A pod as it is now."""
        self._pods.put(record.id, record)
        before = self.pods.get(record.id)
        self.pods[record.id] = record
        if before is None or before.state is not record.state:
            for kind in POD_KINDS[record.state]:
                self._tell(kind, record.id, record)

    def put_pod_facts(self, pod_id: str, facts: PodFacts) -> None:
        """What exists of a pod now."""
        self._pod_facts.put(pod_id, facts)
        self.pod_facts[pod_id] = facts

    def drop_pod_facts(self, pod_id: str) -> None:
        """Nothing exists of the pod any more."""
        self._pod_facts.delete(pod_id)
        self.pod_facts.pop(pod_id, None)

    def drop_pod(self, pod_id: str) -> None:
        """The pod is no more. Nothing happens where it is unknown."""
        self._pods.delete(pod_id)
        with self._boot.transaction():
            self.drop_pod_facts(pod_id)
            self._offers.delete(pod_id)
        record = self.pods.pop(pod_id, None)
        if record is not None:
            self._names.pop(record.config.metadata.key, None)
            self._tell(Kind.DELETED, pod_id, record)

    def add_container(self, record: ContainerRecord, plan: Plan) -> None:
        """A new container, offered to its caller."""
        name = container_key(record.pod_id, record.config.metadata)
        self._names[name] = record.id
        self._members.setdefault(record.pod_id, {})[record.id] = None
        self._offers.put(record.id, Offer(made_at=record.created_at))
        self.put_planned(record, plan)

    def put_container(self, record: ContainerRecord) -> None:
        """A container as it is now."""
        self._containers.put(record.id, record)
        self._changed(record)

    def _changed(self, record: ContainerRecord) -> None:
        before = self.containers.get(record.id)
        self.containers[record.id] = record
        if before is None or before.state is not record.state:
            self._tell(CONTAINER_KINDS[record.state], record.id, self.pods.get(record.pod_id))

    def _tell(self, kind: Kind, thing: str, pod: PodRecord | None) -> None:
        """It is an event, of a pod that there is (was, for its own end)."""
        if pod is not None:
            self.journal.add(kind, thing, pod, self.view(pod).containers)
            for listener in self.listeners:
                listener(kind, thing, pod)

    def put_planned(self, record: ContainerRecord, plan: Plan) -> None:
        """A container as it is now, its static half included."""
        with self._state.transaction():
            self._plans.put(record.id, plan)
            self._containers.put(record.id, record)
        self._changed(record)

    def put_container_facts(self, container_id: str, facts: ContainerFacts) -> None:
        """What exists of a started container."""
        self._container_facts.put(container_id, facts)
        self.container_facts[container_id] = facts

    def drop_container_facts(self, container_id: str) -> None:
        """Nothing of the container's run exists any more."""
        self._container_facts.delete(container_id)
        self.container_facts.pop(container_id, None)

    def drop_container(self, container_id: str) -> None:
        """The container is no more. Nothing happens where it is unknown."""
        with self._state.transaction():
            self._containers.delete(container_id)
            self._plans.delete(container_id)
        with self._boot.transaction():
            self.drop_container_facts(container_id)
            self._offers.delete(container_id)
        record = self.containers.pop(container_id, None)
        if record is not None:
            self._names.pop(container_key(record.pod_id, record.config.metadata), None)
            self._leave(record.pod_id, container_id)
            self._tell(Kind.DELETED, container_id, self.pods.get(record.pod_id))

    def claim(self, thing: str) -> None:
        """The caller has the answer about this pod or container."""
        self._offers.delete(thing)

    def _leave(self, pod_id: str, container_id: str) -> None:
        members = self._members.get(pod_id, {})
        members.pop(container_id, None)
        if not members:
            self._members.pop(pod_id, None)


def _find(records: Mapping[str, T], prefix: str, doing: str) -> T | None:
    record = records.get(prefix)
    if record is not None or not prefix:
        return record
    fitting: Collection[str] = [key for key in records if key.startswith(prefix)]
    if len(fitting) > 1:
        raise InvalidArgument(
            f"{doing} {prefix}", cause=f"{len(fitting)} IDs begin with {prefix}", hint="give more of it"
        )
    return next((records[key] for key in fitting), None)
