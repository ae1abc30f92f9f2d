"""What pods and containers need from the rooms below, each interface as narrow as its use; drivers fit by shape.

`Parts` is all of it together: what every operation's steps work with.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tare.config import RuntimeConfig
from tare.runtime.store import Store
from tare.state.operations import Operations

if TYPE_CHECKING:
    from tare.cgroups.manager import Cgroup
    from tare.handlers.builtin import ExitRecord, PodNamespaces, Process, SourceInfo
    from tare.images.records import ImageRecord
    from tare.network.attach import Attachment
    from tare.storage.overlay import Overlay


class Handler(Protocol):
    """Makes processes. Raises StartFailed where a container's own settings are at fault, Unavailable where a process of Tare's was lost."""

    async def pod_namespaces(
        self, pod_id: str, *, kinds: frozenset[str], hostname: str, sysctls: dict[str, str]
    ) -> PodNamespaces:
        """New namespaces of these kinds ("net", "ipc", "uts", "pid"), pinned."""

    async def remove_pod_namespaces(self, pod_id: str, pause: Process | None) -> None:
        """Let them go. Idempotent; also after a start that nobody knows the outcome of."""

    async def check_sources(self, paths: Sequence[tuple[str, bool]]) -> Sequence[SourceInfo]:
        """What is at each path of the node; (path, True) makes a directory where nothing is."""

    async def start(
        self,
        container_id: str,
        spec: dict[str, Any],
        *,
        overlay: Overlay,
        cgroup: Cgroup,
        tty_sink: Callable[[int], Awaitable[None]] | None,
        on_created: Callable[[Process], None] | None,
    ) -> Process:
        """A container's main process, past its exec; `on_created` is told before that."""

    async def exec(
        self,
        exec_id: str,
        target: Process,
        process: dict[str, Any],
        *,
        cgroup: Cgroup,
        stdin: int,
        stdout: int,
        stderr: int,
    ) -> Process:
        """A further process in a container, past its exec."""

    async def wait(self, process: Process) -> ExitRecord:
        """How it ended, once it has."""

    def signal(self, process: Process, number: int) -> bool:
        """False when it is gone."""

    def alive(self, process: Process) -> bool:
        """Whether it has not ended."""

    def launcher_start_time(self) -> int:
        """When whatever makes processes now started (clock ticks since boot): what it has made is younger."""

    async def came_to_run(self, process: Process) -> bool:
        """Whether a process that an earlier daemon started came past its exec. It may have ended since."""

    def forget(self, process: Process) -> None:
        """Its end is on record elsewhere now."""


class Network(Protocol):
    """Gives pods their addresses."""

    async def attach(self, pod_id: str, netns: int, netlink: socket.socket) -> Attachment:
        """An interface in the pod's network namespace."""

    async def detach(self, pod_id: str) -> None:
        """Undo it. Idempotent."""

    async def recover(self, pods: set[str]) -> None:
        """Let go of what belongs to no pod of these."""

    def status(self) -> str | None:
        """Why there is no network, or None."""


class Images(Protocol):
    """What containers stand on."""

    def find(self, reference: str) -> ImageRecord | None:
        """The image, or None."""

    def layer_paths(self, record: ImageRecord) -> tuple[Path, ...]:
        """Its layers' directories, top first."""

    async def check_trust(self, image: ImageRecord, asked: str) -> None:
        """Raises SignatureValidationFailed where the policy does not allow the image to who asks for it by that name."""


class Cgroups(Protocol):
    """Groups of containers."""

    def resolve_parent(self, cgroup_parent: str, default: str) -> str:
        """The path that a pod's cgroup_parent names."""

    def missing_groups(self, path: str) -> tuple[str, ...]:
        """What `make_parent` is going to make, deepest first."""

    def make_parent(self, path: str) -> bool:
        """Make it where it does not exist; whether it was made."""

    async def remove_parent(self, path: str) -> bool:
        """Remove an empty one that was made; whether it is gone."""

    def create(self, path: str, resources: Mapping[str, object]) -> Cgroup:
        """A container's group, with its limits."""

    def open(self, path: str) -> Cgroup:
        """The same, made before."""

    async def remove(self, path: str) -> None:
        """Remove it. Idempotent."""

    async def kill(self, path: str) -> None:
        """Kill all in it. Idempotent."""

    def processes(self, path: str) -> list[int]:
        """Who is in it."""

    def oom_kills(self, path: str) -> int:
        """How many of it the kernel killed for want of memory."""

    def exists(self, path: str) -> bool:
        """Whether there is such a group."""

    def warm(self) -> bool:
        """Make joining a group cheap for a moment, at the price of a wait here; whether it can be dear."""


class Snapshots(Protocol):
    """Writable layers."""

    async def prepare(self, container_id: str, lowers: tuple[Path, ...]) -> Overlay:
        """Make one. Idempotent."""

    def get(self, container_id: str, lowers: tuple[Path, ...]) -> Overlay:
        """One that was made."""

    async def remove(self, container_id: str) -> None:
        """Delete it. Idempotent."""

    def list(self) -> list[str]:
        """Whose there are."""

    async def collect(self) -> None:
        """Delete what is left of removals that were cut off."""


class Logs(Protocol):
    """Moves containers' output."""

    async def add(
        self, group: str, container_id: str, log_path: str, *, tty: int | None, stdin: bool, max_line: int
    ) -> None:
        """Serve a container. Idempotent."""

    async def reopen(self, group: str, container_id: str) -> None:
        """Open its log file anew."""

    async def drain(self, group: str, container_id: str, timeout: float) -> bool:
        """Wait until all that it wrote is in its log; False where the time was not enough."""

    async def remove(self, group: str, container_id: str) -> None:
        """Serve it no more. Idempotent."""


class Exits(Protocol):
    """Waits for containers' ends (`exits`)."""

    def watch(self, container_id: str) -> None:
        """From now on, a container that RUNS."""

    def unwatch_pod(self, pod_id: str) -> None:
        """From now on, a pod whose PID namespace is ended on purpose."""

    async def kill(self, container_id: str, doing: str) -> None:
        """End it, and wait until its end is on record."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything that an operation's steps work with. `run` is the run directory; `seccomp` compiles a profile and remembers it."""

    run: Path
    config: RuntimeConfig
    store: Store
    operations: Operations
    handler: Handler
    network: Network
    images: Images
    cgroups: Cgroups
    snapshots: Snapshots
    logs: Logs
    seccomp: Callable[[Mapping[str, Any]], Awaitable[object]]
    exits: Exits

    def pod_directory(self, pod_id: str) -> Path:
        """Where a pod's files and pinned namespaces are."""
        return self.run / "pods" / pod_id
