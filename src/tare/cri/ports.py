"""What the CRI face needs from the rooms below, as narrow interfaces; `runtime.service.Runtime` and `images.service.ImageService` fit them.

The rooms below do not import this module. They fit by shape: values that come back are read by attribute only, so any
frozen dataclass with these fields will do.

Rules for every method that takes an ID of a pod or container: the ID or any prefix of it that is unique is accepted; a
prefix that fits several raises InvalidArgument. Errors are `TareError`s. The face never passes an empty ID.

When a caller leaves: `run_pod`, `create_container` and `exec_sync` are cancelled with their call. The first two go on by
themselves all the same (shield what they await), and learn by it that nobody took the result; `exec_sync` kills what it
started. Every other method that changes something is run to its end in a task of its own, whether its caller stays or not.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from tare.images.auth import RegistryAuth
from tare.images.records import ImageRecord, Usage
from tare.runtime.events import Event
from tare.runtime.records import ContainerConfig, ContainerRecord, PodConfig, PodRecord, Resources
from tare.runtime.stats import ContainerStats, PodDetails, PodStats


class PodView(Protocol):
    """A pod and its containers, seen at one moment."""

    @property
    def record(self) -> PodRecord:
        """The pod."""

    @property
    def containers(self) -> Sequence[ContainerRecord]:
        """Its containers in any state, oldest first."""


class ExecResult(Protocol):
    """What a command inside a container wrote and how it ended."""

    @property
    def stdout(self) -> bytes:
        """What it wrote, cut where both streams together would pass 16 MiB less 64 KiB: a kubelet takes no longer message."""

    @property
    def stderr(self) -> bytes:
        """As `stdout`."""

    @property
    def exit_code(self) -> int:
        """0–255; 128 + signal where a signal ended it."""


class Condition(Protocol):
    """One of RuntimeReady and NetworkReady, or another that a kubelet passes by."""

    @property
    def type(self) -> str:
        """ "RuntimeReady" or "NetworkReady"."""

    @property
    def status(self) -> bool:
        """Whether it holds."""

    @property
    def reason(self) -> str:
        """One word in CamelCase, "" where it holds."""

    @property
    def message(self) -> str:
        """Why it does not hold, in plain words; "" where it does."""


class HandlerInfo(Protocol):
    """A way of running pods, and what it can do."""

    @property
    def name(self) -> str:
        """As RuntimeClass names it, never empty."""

    @property
    def recursive_read_only(self) -> bool:
        """Whether a mount can be made read-only with all that is mounted under it."""

    @property
    def user_namespaces(self) -> bool:
        """Whether a pod can have a user namespace."""


class Features(Protocol):
    """What holds for every handler."""

    @property
    def supplemental_groups_policy(self) -> bool:
        """Whether the policy Strict is obeyed."""

    @property
    def user_namespaces_host_network(self) -> bool:
        """Whether a pod with a user namespace can have the node's network."""

    @property
    def mount_options(self) -> bool:
        """Whether `Mount.options` are applied."""


class StatsPort(Protocol):
    """What the runtime measures. Its answers are of now; nothing is sampled in between."""

    @property
    def cgroup_version(self) -> int:
        """1 or 2: whose counters there are."""

    async def container(self, container_id: str) -> ContainerStats:
        """A container in any state. Raises NotFound."""

    async def containers(self, records: Sequence[ContainerRecord]) -> Sequence[ContainerStats]:
        """Each of these, in their order."""

    async def pod(self, pod_id: str) -> PodStats:
        """A pod in any state. Raises NotFound."""

    async def pods(self, records: Sequence[PodRecord]) -> Sequence[PodStats]:
        """Each of these, in their order."""

    async def details(self) -> Sequence[PodDetails]:
        """All that metrics tell, of the pods that are READY."""


class CheckpointPort(Protocol):
    """Checkpoints. Where a caller leaves, what is being done is given up and undone."""

    async def checkpoint_container(self, container_id: str, location: str, timeout: float) -> None:
        """An archive of a running container at the absolute path `location`, within so many seconds (0: however long it takes)."""

    async def checkpoint_pod(
        self, pod_id: str, location: str, container_ids: Sequence[str], options: Mapping[str, str]
    ) -> None:
        """These containers of a pod (all that run, where none is named), in the directory `location`."""

    async def restore_pod(
        self,
        location: str,
        config: PodConfig | None,
        handler: str,
        containers: Sequence[ContainerConfig],
        options: Mapping[str, str],
    ) -> tuple[str, Mapping[str, str]]:
        """A new pod's ID, and those of its containers by name, which are CREATED. What is not given is as in the checkpoint."""


class RuntimePort(Protocol):
    """Pods and containers."""

    @property
    def checkpoints(self) -> CheckpointPort:
        """What is written down of them, and made out of that again."""

    @property
    def stats(self) -> StatsPort:
        """What they use."""

    async def run_pod(self, config: PodConfig, handler: str) -> str:
        """A new pod, READY, by its ID. `handler` "" is the default one; an unknown one raises InvalidArgument.

        A retry with the same metadata and configuration joins a call under way or collects its result; AlreadyExists otherwise.
        """

    async def stop_pod(self, pod_id: str) -> None:
        """Its containers and namespaces end. Nothing happens where it is unknown or stopped."""

    async def remove_pod(self, pod_id: str) -> None:
        """It is stopped first, and its containers are removed. Nothing happens where it is unknown."""

    def pod_status(self, pod_id: str) -> PodView:
        """Raises NotFound."""

    def list_pods(self) -> Sequence[PodRecord]:
        """All of them, newest first; the face filters."""

    async def create_container(self, pod_id: str, config: ContainerConfig, pod_config: PodConfig) -> str:
        """A new container, CREATED, by its ID. Joined and collected as `run_pod` is. Raises NotFound for the pod or the image."""

    async def start_container(self, container_id: str) -> None:
        """It is RUNNING after. Raises NotFound, and FailedPrecondition where it is not CREATED."""

    async def stop_container(self, container_id: str, timeout: float) -> None:
        """It is EXITED after: stop signal, at most `timeout` seconds (0: none), kill. Nothing happens where it is unknown or not running."""

    async def remove_container(self, container_id: str) -> None:
        """It is killed first where it runs. Nothing happens where it is unknown."""

    def list_containers(self) -> Sequence[ContainerRecord]:
        """All of them, newest first; the face filters."""

    def container_status(self, container_id: str) -> ContainerRecord:
        """Raises NotFound."""

    async def update_container(self, container_id: str, wanted: Resources) -> None:
        """The limits that are set hold from now on, all or none. Raises NotFound, and FailedPrecondition where it is EXITED."""

    async def update_pod(self, pod_id: str, wanted: Resources, overhead: Resources | None) -> None:
        """The same of a pod, where its control group is the runtime's own. Raises NotFound, and FailedPrecondition where it is NOTREADY."""

    async def use_pod_ranges(self, ranges: Sequence[str]) -> None:
        """Pods get their addresses from these. Raises FailedPrecondition where that cannot be."""

    def events(self) -> AsyncGenerator[Event]:
        """Every event from this call on. Raises, in their place, that some were lost, or that there will be no more."""

    async def exec_sync(self, container_id: str, command: tuple[str, ...], timeout: float) -> ExecResult:
        """Run `command` (never empty) to its end.

        After `timeout` seconds (0: never) everything it started is killed, and DeadlineExceeded raised. Raises NotFound,
        and FailedPrecondition where the container does not run.
        """

    async def reopen_log(self, container_id: str) -> None:
        """The log file is opened anew at its path. Raises NotFound, and FailedPrecondition where the container does not run."""

    async def conditions(self) -> Sequence[Condition]:
        """RuntimeReady and NetworkReady, as they are now."""

    def handlers(self) -> Sequence[HandlerInfo]:
        """All that can be used."""

    def default_handler(self) -> str:
        """The one of pods that name none; the face lists it, if it can be used, under the empty name too."""

    def features(self) -> Features:
        """What holds for every handler."""

    def cgroup_driver(self) -> str:
        """ "cgroupfs" or "systemd"."""

    def node_info(self) -> Mapping[str, object]:
        """What a verbose status adds, JSON-able: what cannot be done on this node and why. It reads files: call it in a thread."""

    async def pod_info(self, pod_id: str) -> Mapping[str, object]:
        """What a verbose status adds, JSON-able: PIDs, namespaces, the network's path. Raises NotFound."""

    def container_info(self, container_id: str) -> Mapping[str, object]:
        """What a verbose status adds, JSON-able: PID, OCI spec, snapshot. Raises NotFound."""


class ImagePort(Protocol):
    """Images. A `reference` is a tag, a digest, an ID or a unique prefix of an ID; InvalidArgument where it is malformed."""

    def list(self) -> Sequence[ImageRecord]:
        """All of them."""

    def find(self, reference: str) -> ImageRecord | None:
        """None where there is no such image."""

    async def pull(self, reference: str, auth: RegistryAuth | None) -> ImageRecord:
        """The image, whole and unpacked. Any TareError but InvalidArgument is sent as UNKNOWN, its message untouched."""

    async def remove(self, reference: str) -> None:
        """All its tags go. Nothing happens where it is unknown."""

    async def filesystems(self) -> tuple[Usage, Usage]:
        """What images and what writable layers take, as of now or a moment ago. A kubelet asks, and is known by it."""


class Streaming(Protocol):
    """Which streams a caller has, and whether a terminal is between them."""

    @property
    def stdin(self) -> bool:
        """Whether it writes."""

    @property
    def stdout(self) -> bool:
        """Whether it reads output."""

    @property
    def stderr(self) -> bool:
        """Whether it reads errors, apart."""

    @property
    def tty(self) -> bool:
        """Whether there is a terminal."""


class Urls(Protocol):
    """Hands out URLs at which a client streams. Each is good once, for a while. Raises NotFound, FailedPrecondition, ResourceExhausted."""

    def exec(self, container_id: str, command: tuple[str, ...], streams: Streaming) -> str:
        """A command in a running container."""

    def attach(self, container_id: str, streams: Streaming) -> str:
        """A running container's own streams. Raises InvalidArgument where it has a terminal and the caller none, or the other way round."""

    def port_forward(self, pod_id: str, ports: tuple[int, ...]) -> str:
        """A pod's ports."""
