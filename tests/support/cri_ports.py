"""The ports of `tare.cri`, kept by dictionaries: what the CRI face is tested on where no container needs to run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

from tare.cgroups.stats import Counters
from tare.cri.dispatch import Watch
from tare.cri.server import Server
from tare.cri.v1 import api_pb2_grpc
from tare.errors import FailedPrecondition, InvalidArgument, NotFound, TareError
from tare.images.auth import RegistryAuth
from tare.images.records import ImageConfig, ImageRecord, Usage
from tare.runtime.events import Event, Journal
from tare.runtime.records import (
    ContainerConfig,
    ContainerRecord,
    ContainerState,
    PodConfig,
    PodRecord,
    PodState,
    Resources,
)
from tare.runtime.stats import ContainerStats, FileSystem, PodDetails, PodStats
from tare.storage.sizes import Size

R = TypeVar("R")


@dataclass(frozen=True)
class View:
    """Fits PodView."""

    record: PodRecord
    containers: list[ContainerRecord]


@dataclass(frozen=True)
class Result:
    """Fits ExecResult."""

    stdout: bytes
    stderr: bytes
    exit_code: int


@dataclass(frozen=True)
class Held:
    """Fits Condition."""

    type: str
    status: bool = True
    reason: str = ""
    message: str = ""


@dataclass(frozen=True)
class Handler:
    """Fits HandlerInfo."""

    name: str
    recursive_read_only: bool = False
    user_namespaces: bool = False


@dataclass(frozen=True)
class Can:
    """Fits Features."""

    supplemental_groups_policy: bool = True
    user_namespaces_host_network: bool = False
    mount_options: bool = False


@dataclass(frozen=True)
class MemoryCheckpoints:
    """Fits CheckpointPort: notes what it is called with."""

    runtime: MemoryRuntime

    async def checkpoint_container(self, container_id: str, location: str, timeout: float) -> None:
        self.runtime.calls.append(("checkpoint_container", container_id, location, timeout))
        await self.runtime._pass_gate()

    async def checkpoint_pod(
        self, pod_id: str, location: str, container_ids: Sequence[str], options: Mapping[str, str]
    ) -> None:
        self.runtime.calls.append(("checkpoint_pod", pod_id, location, tuple(container_ids), dict(options)))

    async def restore_pod(
        self,
        location: str,
        config: PodConfig | None,
        handler: str,
        containers: Sequence[ContainerConfig],
        options: Mapping[str, str],
    ) -> tuple[str, Mapping[str, str]]:
        self.runtime.calls.append(("restore_pod", location, config, handler, tuple(containers), dict(options)))
        return "restored", {item.metadata.name: f"{item.metadata.name}-id" for item in containers}


@dataclass
class MemoryRuntime:
    """Fits RuntimePort. `gate` holds up whatever takes time, `entered` says that it was reached; `fault` is raised by the next status."""

    pods: dict[str, PodRecord] = field(default_factory=dict)
    containers: dict[str, ContainerRecord] = field(default_factory=dict)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    entered: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    finished: asyncio.Event = field(default_factory=asyncio.Event)
    fault: BaseException | None = None
    driver: str = "cgroupfs"
    journal: Journal = field(default_factory=Journal)

    @property
    def stats(self) -> MemoryStats:
        return MemoryStats(self)

    @property
    def checkpoints(self) -> MemoryCheckpoints:
        return MemoryCheckpoints(self)

    def __post_init__(self) -> None:
        self.gate.set()

    async def _pass_gate(self) -> None:
        self.entered.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        self.finished.set()

    async def run_pod(self, config: PodConfig, handler: str) -> str:
        await self._pass_gate()
        pod_id = f"{len(self.pods):02x}" * 32
        self.pods[pod_id] = PodRecord(
            id=pod_id, config=config, handler=handler, state=PodState.READY, created_at=1, ips=("10.0.0.2",)
        )
        return pod_id

    async def stop_pod(self, pod_id: str) -> None:
        await self._pass_gate()
        if found := find(self.pods, pod_id):
            self.pods[found.id] = replace(found, state=PodState.NOTREADY)

    async def remove_pod(self, pod_id: str) -> None:
        if found := find(self.pods, pod_id):
            del self.pods[found.id]

    def pod_status(self, pod_id: str) -> View:
        pod = known(self.pods, pod_id, "pod")
        return View(pod, [item for item in self.containers.values() if item.pod_id == pod.id])

    def list_pods(self) -> Sequence[PodRecord]:
        return list(self.pods.values())

    async def create_container(self, pod_id: str, config: ContainerConfig, pod_config: PodConfig) -> str:
        self.calls.append(("create_container", pod_id, pod_config))
        pod = known(self.pods, pod_id, "pod")
        container_id = f"{len(self.containers) + 0xA0:02x}" * 32
        self.containers[container_id] = ContainerRecord(
            id=container_id,
            pod_id=pod.id,
            config=config,
            image_id="sha256:11",
            image_ref="busybox@sha256:22",
            state=ContainerState.CREATED,
            created_at=2,
        )
        return container_id

    def _move(self, record: ContainerRecord, state: ContainerState) -> None:
        self.containers[record.id] = replace(record, state=state)

    async def start_container(self, container_id: str) -> None:
        await self._pass_gate()
        record = known(self.containers, container_id, "container")
        if record.state is not ContainerState.CREATED:
            raise FailedPrecondition(f"start container {record.id}", cause=f"it is {record.state.name}")
        self._move(record, ContainerState.RUNNING)

    async def stop_container(self, container_id: str, timeout: float) -> None:
        self.calls.append(("stop_container", container_id, timeout))
        if found := find(self.containers, container_id):
            self._move(found, ContainerState.EXITED)

    async def remove_container(self, container_id: str) -> None:
        if found := find(self.containers, container_id):
            del self.containers[found.id]

    def list_containers(self) -> Sequence[ContainerRecord]:
        return list(self.containers.values())

    def container_status(self, container_id: str) -> ContainerRecord:
        if self.fault is not None:
            raise self.fault
        return known(self.containers, container_id, "container")

    async def update_container(self, container_id: str, wanted: Resources) -> None:
        self.calls.append(("update_container", known(self.containers, container_id, "container").id, wanted))

    async def update_pod(self, pod_id: str, wanted: Resources, overhead: Resources | None) -> None:
        self.calls.append(("update_pod", known(self.pods, pod_id, "pod").id, wanted, overhead))

    async def use_pod_ranges(self, ranges: Sequence[str]) -> None:
        self.calls.append(("use_pod_ranges", *ranges))

    def events(self) -> AsyncGenerator[Event]:
        return self.journal.follow()

    async def exec_sync(self, container_id: str, command: tuple[str, ...], timeout: float) -> Result:
        self.calls.append(("exec_sync", container_id, command, timeout))
        await self._pass_gate()
        return Result(stdout=b"\xff" + command[0].encode(), stderr=b"", exit_code=3)

    async def reopen_log(self, container_id: str) -> None:
        self.calls.append(("reopen_log", known(self.containers, container_id, "container").id))

    async def conditions(self) -> Sequence[Held]:
        return [Held("RuntimeReady"), Held("NetworkReady", False, "NetworkNotReady", "no bridge")]

    def handlers(self) -> Sequence[Handler]:
        return [Handler("builtin", recursive_read_only=True), Handler("runc", user_namespaces=True)]

    def default_handler(self) -> str:
        return "builtin"

    def features(self) -> Can:
        return Can()

    def cgroup_driver(self) -> str:
        return self.driver

    def node_info(self) -> Mapping[str, object]:
        return {"unsupported": {"userNamespaces": "no room"}}

    async def pod_info(self, pod_id: str) -> Mapping[str, object]:
        return {"netns": Path("/run/netns/x"), "id": pod_id}

    def container_info(self, container_id: str) -> Mapping[str, object]:
        return {"pid": 42, "id": container_id}


@dataclass
class MemoryStats:
    """Fits StatsPort: everything uses a little, and what does not run uses nothing."""

    runtime: MemoryRuntime
    cgroup_version: int = 2

    async def container(self, container_id: str) -> ContainerStats:
        return measured(self.runtime.container_status(container_id))

    async def containers(self, records: Sequence[ContainerRecord]) -> Sequence[ContainerStats]:
        return [measured(record) for record in records]

    async def pod(self, pod_id: str) -> PodStats:
        return self._pod(self.runtime.pod_status(pod_id).record)

    async def pods(self, records: Sequence[PodRecord]) -> Sequence[PodStats]:
        return [self._pod(record) for record in records]

    def _pod(self, record: PodRecord) -> PodStats:
        inside = [item for item in self.runtime.containers.values() if item.pod_id == record.id]
        return PodStats(
            record=record,
            at=7,
            counters=Counters(cpu=11),
            nano_cores=None,
            interfaces=None,
            processes=2,
            containers=tuple(measured(item) for item in inside if item.state is ContainerState.RUNNING),
        )

    async def details(self) -> Sequence[PodDetails]:
        disk = FileSystem(major=8, minor=0, bytes=1, inodes=1, inodes_free=1)
        return [
            PodDetails(record=record, at=7, interfaces=(), containers=(), file_system=disk)
            for record in self.runtime.pods.values()
        ]


def measured(record: ContainerRecord) -> ContainerStats:
    """Eleven nanoseconds of CPU, for one that runs."""
    running = record.state is ContainerState.RUNNING
    return ContainerStats(
        record=record,
        at=7,
        counters=Counters(cpu=11) if running else Counters(),
        nano_cores=None,
        size=Size(bytes=4096, inodes=1, at=5),
        file_system="/var/lib/tare",
    )


@dataclass
class MemoryImages:
    """Fits ImagePort. A pull brings an image unless `failure` is set."""

    records: list[ImageRecord] = field(default_factory=list)
    failure: TareError | None = None
    auth: RegistryAuth | None = None

    def list(self) -> Sequence[ImageRecord]:
        return self.records

    def find(self, reference: str) -> ImageRecord | None:
        if reference != reference.lower():
            raise InvalidArgument(f"read image reference {reference}", cause="a repository has no capitals")
        found = [item for item in self.records if reference == item.id or reference in item.repo_tags]
        return found[0] if found else None

    async def pull(self, reference: str, auth: RegistryAuth | None) -> ImageRecord:
        self.auth = auth
        if self.failure is not None:
            raise self.failure
        record = ImageRecord(
            id="sha256:" + "1" * 64, repo_tags=(reference,), repo_digests=(), size=7, config=ImageConfig(), chain_ids=()
        )
        self.records.append(record)
        return record

    async def remove(self, reference: str) -> None:
        found = self.find(reference)
        self.records = [item for item in self.records if item != found]

    async def filesystems(self) -> tuple[Usage, Usage]:
        return tuple(Usage(path="/var/lib/tare", bytes=size, inodes=3) for size in (4096, 8192))  # type: ignore[return-value]


def find(records: Mapping[str, R], wanted: str) -> R | None:
    """The record with this ID or the only one whose ID begins so."""
    found = [record for key, record in records.items() if key.startswith(wanted)]
    return found[0] if len(found) == 1 else None


def known(records: Mapping[str, R], wanted: str, kind: str) -> R:
    """As `find`, or NotFound."""
    record = find(records, wanted)
    if record is None:
        raise NotFound(f"find {kind} {wanted}", cause="there is none")
    return record


class Client:
    """Both stubs over one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.runtime: Any = api_pb2_grpc.RuntimeServiceStub(channel)  # type: ignore[no-untyped-call]
        self.images: Any = api_pb2_grpc.ImageServiceStub(channel)  # type: ignore[no-untyped-call]


@asynccontextmanager
async def serving(
    path: Path, runtime: MemoryRuntime, images: MemoryImages | None = None, watch: Watch | None = None
) -> AsyncIterator[Client]:
    """A server on `path` and a client connected to it."""
    told = {"config": {"root": Path("/var/lib/tare")}}
    server = Server(path, runtime, images or MemoryImages(), told, watch=watch)
    await server.start()
    try:
        options = [("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(f"unix:{path}", options) as channel:
            yield Client(channel)
    finally:
        await server.stop(1.0)
