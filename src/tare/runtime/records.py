"""What Tare knows of pods and containers: frozen values, made in `cri/translate` from requests and kept by `state/`.

Shapes follow CRI v1's messages with the Windows and deprecated fields left out; protobuf types never come this far.
Integers keep CRI's units: nanoseconds since the epoch for times, bytes for sizes, microseconds for CPU periods.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class NamespaceMode(enum.IntEnum):
    """CRI NamespaceMode."""

    POD = 0
    CONTAINER = 1
    NODE = 2
    TARGET = 3


class Propagation(enum.IntEnum):
    """CRI MountPropagation."""

    PRIVATE = 0
    HOST_TO_CONTAINER = 1
    BIDIRECTIONAL = 2


class ProfileType(enum.IntEnum):
    """CRI SecurityProfile.ProfileType."""

    RUNTIME_DEFAULT = 0
    UNCONFINED = 1
    LOCALHOST = 2


class GroupsPolicy(enum.IntEnum):
    """CRI SupplementalGroupsPolicy."""

    MERGE = 0
    STRICT = 1


class PodState(enum.IntEnum):
    """CRI PodSandboxState."""

    READY = 0
    NOTREADY = 1


class ContainerState(enum.IntEnum):
    """CRI ContainerState."""

    CREATED = 0
    RUNNING = 1
    EXITED = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class IdMapping:
    """`length` IDs from `container_id` on are `host_id` and following outside."""

    host_id: int
    container_id: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UserNamespace:
    """CRI UserNamespace: `mode` POD with mappings, or NODE."""

    mode: NamespaceMode = NamespaceMode.NODE
    uids: tuple[IdMapping, ...] = ()
    gids: tuple[IdMapping, ...] = ()

    @property
    def root(self) -> tuple[int, int]:
        """UID and GID, on the node, of the pod's root."""
        return self.uids[0].host_id, self.gids[0].host_id


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceOptions:
    """CRI NamespaceOption; `target_id` is a container's ID where `pid` is TARGET."""

    network: NamespaceMode = NamespaceMode.POD
    pid: NamespaceMode = NamespaceMode.POD
    ipc: NamespaceMode = NamespaceMode.POD
    target_id: str = ""
    user: UserNamespace | None = None

    @property
    def mapped(self) -> UserNamespace | None:
        """The user namespace of a pod that has one of its own."""
        return self.user if self.user is not None and self.user.mode is NamespaceMode.POD else None


@dataclass(frozen=True, slots=True, kw_only=True)
class SecurityProfile:
    """A seccomp or AppArmor profile; `localhost_ref` is a path or a name where the type is LOCALHOST."""

    type: ProfileType = ProfileType.RUNTIME_DEFAULT
    localhost_ref: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class SELinuxOptions:
    """An SELinux context in its four parts; all empty means none asked for."""

    user: str = ""
    role: str = ""
    type: str = ""
    level: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class HugepageLimit:
    """`page_size` as the cgroup file names it ("2MB"), `limit` in bytes."""

    page_size: str
    limit: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """CRI LinuxContainerResources, verbatim. Zero or empty means not set; `cpu_quota` −1 and `memory_swap_limit` −1 mean no limit.

    `more` is what CRI does not have and plugins (NRI) set, by its path below OCI's linux.resources ("memory.reservation", "pids.limit").
    """

    cpu_period: int = 0
    cpu_quota: int = 0
    cpu_shares: int = 0
    memory_limit: int = 0
    oom_score_adj: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    hugepage_limits: tuple[HugepageLimit, ...] = ()
    unified: dict[str, str] = field(default_factory=dict)
    memory_swap_limit: int = 0
    more: dict[str, int | bool] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsConfig:
    """What goes into resolv.conf."""

    servers: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PortMapping:
    """`protocol` is "tcp", "udp" or "sctp"; `host_port` 0 means not published."""

    protocol: str
    container_port: int
    host_port: int = 0
    host_ip: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodMetadata:
    """What makes a pod's name unique: a kubelet raises `attempt` each time it makes the sandbox anew."""

    name: str
    uid: str
    namespace: str
    attempt: int = 0

    @property
    def key(self) -> str:
        """The name under which the pod is reserved."""
        return f"{self.name}_{self.namespace}_{self.uid}_{self.attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PodSecurity:
    """CRI LinuxSandboxSecurityContext."""

    namespaces: NamespaceOptions = NamespaceOptions()
    selinux: SELinuxOptions | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    readonly_rootfs: bool = False
    supplemental_groups: tuple[int, ...] = ()
    supplemental_groups_policy: GroupsPolicy = GroupsPolicy.MERGE
    privileged: bool = False
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PodConfig:
    """CRI PodSandboxConfig."""

    metadata: PodMetadata
    hostname: str = ""
    log_directory: str = ""
    dns: DnsConfig | None = None
    port_mappings: tuple[PortMapping, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    cgroup_parent: str = ""
    security: PodSecurity = PodSecurity()
    sysctls: dict[str, str] = field(default_factory=dict)
    overhead: Resources | None = None
    resources: Resources | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRef:
    """CRI ImageSpec: `image` is what the client sent to name it (an ID, a tag or a digest), `image_ref` the ID that it turned out to have."""

    image: str
    user_specified_image: str = ""
    annotations: dict[str, str] = field(default_factory=dict)
    runtime_handler: str = ""
    image_ref: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """CRI Mount. Either `host_path` or `image` names the source."""

    container_path: str
    host_path: str = ""
    readonly: bool = False
    recursive_read_only: bool = False
    selinux_relabel: bool = False
    propagation: Propagation = Propagation.PRIVATE
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()
    image: ImageRef | None = None
    image_sub_path: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """CRI Device; `permissions` is a subset of "rwm"."""

    container_path: str
    host_path: str
    permissions: str = "rwm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """Names with or without CAP_, any case; "ALL" stands for all of them."""

    add: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    add_ambient: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSecurity:
    """CRI LinuxContainerSecurityContext. `masked_paths` and `readonly_paths` are used as they come (the kubelet sends the defaults)."""

    capabilities: Capabilities = Capabilities()
    privileged: bool = False
    namespaces: NamespaceOptions | None = None
    selinux: SELinuxOptions | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    run_as_username: str = ""
    readonly_rootfs: bool = False
    supplemental_groups: tuple[int, ...] = ()
    supplemental_groups_policy: GroupsPolicy = GroupsPolicy.MERGE
    no_new_privs: bool = False
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    seccomp: SecurityProfile | None = None
    apparmor: SecurityProfile | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerMetadata:
    """A container's name within its pod; `attempt` counts restarts."""

    name: str
    attempt: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerConfig:
    """CRI ContainerConfig. `envs` values are bytes, as in CRI."""

    metadata: ContainerMetadata
    image: ImageRef
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    envs: tuple[tuple[str, bytes], ...] = ()
    mounts: tuple[Mount, ...] = ()
    devices: tuple[Device, ...] = ()
    cdi_devices: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    log_path: str = ""
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    stop_signal: int = 0
    resources: Resources = Resources()
    security: ContainerSecurity = ContainerSecurity()


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Who a container's process runs as."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PodRecord:
    """A pod as it is kept in state.db. `ips` is empty with host network; `handler` is "" for the default one."""

    id: str
    config: PodConfig
    handler: str
    state: PodState
    created_at: int
    ips: tuple[str, ...] = ()
    cgroup_parent: str = ""
    owns_cgroup_parent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerRecord:
    """A container as it is kept in state.db.

    `exit_code` is 0–255 (128 + signal), `reason` one of Completed, Error, OOMKilled, StartError, Unknown once EXITED.
    `stop_signal` is the signal's number on Linux. `config` is as the client sent it, with what its image volumes turned out to be,
    `resources` as last accepted. `layers` are the chain IDs of the image layers that it stands on, bottom first, and of its image volumes'.
    """

    id: str
    pod_id: str
    config: ContainerConfig
    image_id: str
    image_ref: str
    state: ContainerState
    created_at: int
    started_at: int = 0
    finished_at: int = 0
    exit_code: int = 0
    reason: str = ""
    message: str = ""
    log_path: str = ""
    user: User = User()
    stop_signal: int = 15
    resources: Resources = Resources()
    snapshot: str = ""
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessFact:
    """A process of this boot. `start_time` is field 22 of /proc/PID/stat (clock ticks since boot); PIDs are acted on only when it agrees."""

    pid: int
    start_time: int
