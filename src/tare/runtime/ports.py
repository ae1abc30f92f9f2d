"""What pods and containers need from the rooms below, each interface as narrow as its use; drivers fit by shape.

`Parts` is all of it together: what every operation's steps work with.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tare.config import RuntimeConfig
from tare.runtime.arrivals import Arrivals
from tare.runtime.labels import Kernel
from tare.runtime.plugins import Plugins
from tare.runtime.store import Store
from tare.state.operations import Operations

if TYPE_CHECKING:
    from tare.cgroups.layout import Layout
    from tare.cgroups.manager import Cgroup
    from tare.handlers.builtin import ExitRecord, PodNamespaces, Process, SourceInfo
    from tare.handlers.criu_dump import Outside
    from tare.handlers.criu_restore import Restoring
    from tare.handlers.plans import Mappings
    from tare.images.records import ImageRecord
    from tare.network.attach import Attachment
    from tare.network.wishes import Wishes
    from tare.runtime.handlers import Ability
    from tare.runtime.records import PodConfig
    from tare.storage.overlay import Overlay, Usage


class Handler(Protocol):
    """Makes processes. Raises StartFailed where a container's own settings are at fault, Unavailable where a process of Tare's was lost."""

    async def pod_namespaces(
        self,
        pod_id: str,
        *,
        kinds: frozenset[str],
        hostname: str,
        sysctls: dict[str, str],
        mappings: Mappings | None = None,
    ) -> PodNamespaces:
        """New namespaces of these kinds ("user", "net", "ipc", "uts", "pid"), pinned; one of "user" has these mappings, and owns the others."""

    async def remove_pod_namespaces(self, pod_id: str, pause: Process | None) -> None:
        """Let them go. Idempotent; also after a start that nobody knows the outcome of."""

    async def check_sources(self, paths: Sequence[tuple[str, bool]]) -> Sequence[SourceInfo]:
        """What is at each path of the node; (path, True) makes a directory where nothing is."""

    async def propagation(self, paths: Sequence[str]) -> Sequence[SourceInfo]:
        """How the mounts spread that paths of the node are on."""

    async def relabel(self, paths: Sequence[tuple[str, str]]) -> Sequence[SourceInfo]:
        """Give each path of the node, with all below it, an SELinux label."""

    async def start(
        self,
        container_id: str,
        spec: dict[str, Any],
        *,
        handler: str,
        overlay: Overlay,
        cgroup: Cgroup,
        tty_sink: Callable[[int], Awaitable[None]] | None,
        on_created: Callable[[Process], Awaitable[None] | None] | None,
        place: Callable[[Process], Awaitable[None]] | None,
    ) -> Process:
        """A container's main process, past its exec, by the runtime handler of that name; `on_created` is told before that, and awaited.

        With `place` it waits, before all else, until that has put it into its cgroups.
        """

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
        tty_sink: Callable[[int], Awaitable[None]] | None = None,
    ) -> Process:
        """A further process in a container, past its exec; `tty_sink` is told of its terminal's master, where it has one."""

    async def terminal(self, container_id: str) -> int | None:
        """The master of a container's terminal, which is the caller's; None where nobody has it."""

    def root_of(self, process: Process) -> int:
        """The PID of an exec's own process, for which another may stand in."""

    async def release(self, container_id: str) -> None:
        """Take away what is kept of a container's run beside its process. Idempotent; also after a start that nobody knows the outcome of."""

    def bundles(self) -> Sequence[str]:
        """IDs of containers of which something is kept."""

    def on_lost(self, call: Callable[[], None]) -> None:
        """Have `call` called where a launcher died over a command."""

    def live_commands(self) -> set[Process]:
        """Commands of the node that are waited for."""

    async def end_stray_commands(self, made_before: int | None) -> None:
        """End those that nobody waits for; only those made before a time (clock ticks since boot), if one is given."""

    def choose(self, name: str, config: PodConfig) -> str:
        """The runtime handler for a pod that asks for one by this name. Raises InvalidArgument, FailedPrecondition."""

    async def look(self) -> None:
        """See what the programs of runtime handlers can do that are new or have changed."""

    def abilities(self) -> Sequence[Ability]:
        """What those beside the built-in handler can do that can be used."""

    def missing(self) -> str | None:
        """Which of them cannot be used, and why; None where all can."""

    async def wait(self, process: Process) -> ExitRecord:
        """How it ended, once it has."""

    def signal(self, process: Process, number: int) -> bool:
        """False when it is gone."""

    def alive(self, process: Process) -> bool:
        """Whether it has not ended."""

    async def trouble(self) -> str | None:
        """Why no process can be made now, or None."""

    def launcher_start_time(self) -> int:
        """When whatever makes processes now started (clock ticks since boot): what it has made is younger."""

    async def came_to_run(self, process: Process) -> bool:
        """Whether a process that an earlier daemon started came past its exec. It may have ended since."""

    def forget(self, process: Process) -> None:
        """Its end is on record elsewhere now."""


class Network(Protocol):
    """Gives pods their addresses."""

    async def attach(self, pod_id: str, netns: int, netlink: socket.socket, wishes: Wishes) -> Attachment:
        """An interface in the pod's network namespace; what a failed attempt leaves is taken away by `detach`."""

    async def detach(self, pod_id: str) -> None:
        """Undo it. Idempotent."""

    async def recover(self, pods: set[str]) -> None:
        """Let go of what belongs to no pod of these."""

    async def use_ranges(self, ranges: Sequence[str]) -> None:
        """Give new pods addresses from these ranges. Raises InvalidArgument, FailedPrecondition."""

    async def look(self) -> None:
        """See anew what `status` and `describe` tell."""

    def status(self) -> str | None:
        """Why there is no network, or None."""

    def describe(self) -> Mapping[str, object]:
        """What there is, for people."""

    async def path(self, pod_id: str, netns: str) -> Mapping[str, object]:
        """A pod's way through the node, whose namespace is pinned at `netns`, JSON-able; `troubles` says what is not as it was made."""

    async def close(self) -> None:
        """Finish, or leave to the next daemon, what is under way."""


class Images(Protocol):
    """What containers stand on."""

    def find(self, reference: str) -> ImageRecord | None:
        """The image, or None."""

    def layer_paths(self, record: ImageRecord) -> tuple[Path, ...]:
        """Its layers' directories, top first."""

    async def check_trust(self, image: ImageRecord, asked: str) -> None:
        """Raises SignatureValidationFailed where the policy does not allow the image to who asks for it by that name."""


class Cgroups(Protocol):
    """Groups of containers. `driver` is who makes them, "cgroupfs" or "systemd"; `found` says where they are.

    `skipped` counts what was limited and is not there.
    """

    driver: str
    skipped: dict[str, int]
    found: Layout

    def trouble(self) -> str | None:
        """Which limits cannot be applied on this node, in words, or None."""

    def resolve_parent(self, cgroup_parent: str, default: str) -> str:
        """The path that a pod's cgroup_parent names."""

    def missing_groups(self, path: str) -> tuple[str, ...]:
        """What `make_parent` is going to make, deepest first."""

    async def make_parent(self, path: str) -> bool:
        """Make it where it does not exist; whether it was made."""

    async def remove_parent(self, path: str) -> bool:
        """Remove an empty one that was made; whether it is gone."""

    def container_path(self, parent: str, container_id: str) -> str:
        """Where a container's group is, in its pod's."""

    def prepare(self, path: str, resources: Mapping[str, object]) -> Cgroup:
        """A container's group, with its limits; or what is known of one that can only be made around its process (`placing`)."""

    def placing(self, path: str, resources: Mapping[str, object]) -> Callable[[int], Awaitable[None]] | None:
        """What makes the group around the process (its PID) that waits at its barrier; None where the process joins it by itself."""

    def watch(self, path: str) -> None:
        """Keep count of OOM kills in a group that may vanish when it is empty. Idempotent."""

    async def update(self, path: str, resources: Mapping[str, object]) -> tuple[str, ...]:
        """Change its limits; what this node does not have is returned."""

    def open(self, path: str) -> Cgroup:
        """The same, made before."""

    def leaf(self, path: str, main: int) -> Cgroup:
        """The same for an exec, with a group of its own inside of it, where there can be one: then its path is another."""

    async def clear_leaf(self, path: str) -> None:
        """Let an exec's own group go, but nothing that is in it. Idempotent."""

    async def remove(self, path: str) -> None:
        """Remove it. Idempotent."""

    async def kill(self, path: str) -> None:
        """Kill all in it. Idempotent."""

    async def freeze(self, path: str, timeout: float) -> None:
        """All in it stands still. Raises DeadlineExceeded, NotFound."""

    async def thaw(self, path: str, timeout: float) -> None:
        """All in it goes on. Raises DeadlineExceeded, NotFound."""

    def processes(self, path: str) -> list[int]:
        """Who is in it."""

    def oom_kills(self, path: str) -> int:
        """How many of it the kernel killed for want of memory."""

    def exists(self, path: str) -> bool:
        """Whether there is such a group."""

    def warm(self) -> bool:
        """Make joining a group cheap for a moment, at the price of a wait here; whether it can be dear."""


class Criu(Protocol):
    """Dumps and restores containers (`handlers.checkpointer`)."""

    async def require(self, doing: str) -> None:
        """Raises FailedPrecondition where it is not there, or too old."""

    async def outlive(self) -> None:
        """What an earlier daemon has had dumped is dumped."""

    def strangers(self, target: Process, processes: Collection[int]) -> list[int]:
        """Which of a container's processes are not below its first one."""

    async def dump(
        self,
        target: Process,
        spec: Mapping[str, Any],
        *,
        cgroup: Cgroup,
        fifos: Path,
        directory: Path,
        doing: str,
    ) -> Outside:
        """Have a container that stands still written down in a directory."""

    async def restore(
        self,
        container_id: str,
        spec: Mapping[str, Any],
        what: Restoring,
        *,
        overlay: Overlay,
        cgroup: Cgroup,
        freeze: Callable[[], Awaitable[None]],
        place: Callable[[Process], Awaitable[None]] | None,
    ) -> Process:
        """Its first process; all of them stand still (`freeze` is called for that)."""

    def check_mounts(self, spec: Mapping[str, Any], external: Sequence[str], doing: str) -> None:
        """Raises InvalidArgument where the configuration does not say what is to be at one of these mounts."""


class Checkpoints(Protocol):
    """Directories of checkpoints (`storage.checkpoints`)."""

    def taken(self, name: str) -> Path:
        """Where one is put together."""

    def restored(self, container_id: str) -> Path:
        """Where what a container is restored from is."""

    async def make(self, directory: Path) -> None:
        """Make one, empty."""

    async def remove(self, directory: Path) -> None:
        """Delete one. Idempotent."""

    def list_taken(self) -> Sequence[str]:
        """What is being put together, or was."""

    def list_restored(self) -> Sequence[str]:
        """Containers of which there is something."""

    async def collect(self) -> None:
        """Delete what is left of removals that were cut off."""


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

    def count(self, container_id: str) -> tuple[Usage, float]:
        """What one takes, counted now, and how many seconds of CPU time that took. Blocks."""

    @property
    def file_system(self) -> Path:
        """A path on the file system that they lie on."""

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

    async def attach(self, group: str, container_id: str) -> socket.socket:
        """A socket that gets a copy of all that it says from now on."""

    async def end_input(self, group: str, container_id: str) -> None:
        """Its stdin is over once nobody else writes to it. Idempotent."""

    async def drain(self, group: str, container_id: str, timeout: float) -> bool:
        """Wait until all that it wrote is in its log; False where the time was not enough."""

    async def remove(self, group: str, container_id: str) -> None:
        """Serve it no more. Idempotent."""


class Devices(Protocol):
    """What vendors describe on the node (`cdi`). Its calls touch the file system: make them in a thread."""

    def inject(self, spec: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        """An OCI configuration with these devices in it. Raises InvalidArgument, NotFound, FailedPrecondition."""

    def problems(self) -> Sequence[str]:
        """What is wrong with the files that describe them."""


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
    """Everything that an operation's steps work with.

    `run` is the run directory; `seccomp` compiles a profile and remembers it; `confinement` looks at what AppArmor and SELinux enforce.
    """

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
    confinement: Callable[[], Kernel]
    cdi: Devices
    criu: Criu
    checkpoints: Checkpoints
    exits: Exits
    plugins: Plugins
    arrivals: Arrivals = field(default_factory=Arrivals)

    def pod_directory(self, pod_id: str) -> Path:
        """Where a pod's files and pinned namespaces are."""
        return self.run / "pods" / pod_id
