"""What `tare run` asks for, as CRI requests (pure, but for the path of a relative volume).

The paths hidden from a container and kept from its writing are the client's to name in CRI; these are the ones that Docker
and the kubelet name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tare.cri.v1 import api_pb2
from tare.errors import InvalidArgument

NAMESPACE = "tare"
RUN_ANNOTATION = (
    "tare/run"  # marks a pod that `tare run` made for one container, and makes its configuration unlike any other's
)
ATTACHED_ANNOTATION = "tare/attached"  # marks one whose `tare run` waits for its end
NETWORK_ANNOTATION = "network.tare.dev/network"  # names the network of a pod
CPU_PERIOD = 100_000
MASKED_PATHS = (
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>[bkmgt]?)(?:i?b)?", re.IGNORECASE)
NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """`tare run`'s options, as they came; `token` is new for each run; `attached`: it waits for the end; `annotations` are the container's."""

    image: str
    token: str
    log_directory: str
    name: str = ""
    command: tuple[str, ...] = ()
    entrypoint: str = ""
    env: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    memory: str = ""
    cpus: float = 0.0
    workdir: str = ""
    user: str = ""
    network: str = "pod"
    hostname: str = ""
    read_only: bool = False
    privileged: bool = False
    cap_add: tuple[str, ...] = ()
    cap_drop: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    attached: bool = True
    runtime: str = ""
    interactive: bool = False
    tty: bool = False

    @property
    def full_name(self) -> str:
        """The name given, or one made from the token."""
        return self.name or f"run-{self.token[:8]}"


def parse_size(text: str) -> int:
    """Bytes of "64m", "1.5GiB", "1048576": powers of 1024. Raises InvalidArgument."""
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgument(f"{text!r} is not a size", hint="write it as 64m, 1.5g or a number of bytes")
    power = "bkmgt".index(match["unit"].lower() or "b")
    return int(float(match["number"]) * 1024**power)


def parse_pairs(items: tuple[str, ...], what: str) -> dict[str, str]:
    """KEY=VALUE items as a dictionary. Raises InvalidArgument."""
    pairs = {}
    for item in items:
        key, mark, value = item.partition("=")
        if not key or not mark:
            raise InvalidArgument(f"{what} {item!r} is not KEY=VALUE")
        pairs[key] = value
    return pairs


def parse_environment(items: tuple[str, ...], outside: Mapping[str, str]) -> dict[str, str]:
    """KEY=VALUE items, or KEY alone to hand on the caller's own value (nothing where it has none). Raises InvalidArgument."""
    pairs = {}
    for item in items:
        key, mark, value = item.partition("=")
        if not key:
            raise InvalidArgument(f"environment variable {item!r} is not KEY=VALUE")
        if mark:
            pairs[key] = value
        elif key in outside:
            pairs[key] = outside[key]
    return pairs


def parse_volume(text: str) -> api_pb2.Mount:
    """SOURCE:DESTINATION[:ro|rw]; a relative source is one below the working directory. Raises InvalidArgument."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(parts) or parts[2:] not in ([], ["ro"], ["rw"]):
        raise InvalidArgument(f"volume {text!r} is not SOURCE:DESTINATION[:ro]")
    if not parts[1].startswith("/"):
        raise InvalidArgument(f"volume {text!r}: the destination must be an absolute path")
    return api_pb2.Mount(host_path=os.path.abspath(parts[0]), container_path=parts[1], readonly=parts[2:] == ["ro"])


def parse_user(text: str) -> dict[str, object]:
    """The security context's fields for NAME, UID or UID:GID. Raises InvalidArgument."""
    user, mark, group = text.partition(":")
    if not user or (mark and not group):
        raise InvalidArgument(f"user {text!r} is not NAME, UID or UID:GID")
    if not user.isdigit():
        if mark:
            raise InvalidArgument(f"user {text!r}: a group can be given with a numeric user only", hint="write UID:GID")
        return {"run_as_username": user}
    fields: dict[str, object] = {"run_as_user": api_pb2.Int64Value(value=int(user))}
    if mark:
        if not group.isdigit():
            raise InvalidArgument(f"user {text!r}: the group must be a number")
        fields["run_as_group"] = api_pb2.Int64Value(value=int(group))
    return fields


def resources(options: RunOptions) -> api_pb2.LinuxContainerResources:
    """The limits. Raises InvalidArgument."""
    limits = api_pb2.LinuxContainerResources()
    if options.memory:
        limits.memory_limit_in_bytes = parse_size(options.memory)
    if options.cpus < 0:
        raise InvalidArgument(f"{options.cpus:g} CPUs cannot be had", hint="give a number above 0")
    if options.cpus:
        limits.cpu_period = CPU_PERIOD
        limits.cpu_quota = int(options.cpus * CPU_PERIOD)
        limits.cpu_shares = max(2, int(options.cpus * 1024))
    return limits


def namespaces(options: RunOptions) -> api_pb2.NamespaceOption:
    """The node's network or one of its own; PIDs of its own in either case."""
    network = api_pb2.NODE if options.network == "host" else api_pb2.POD
    return api_pb2.NamespaceOption(network=network, pid=api_pb2.CONTAINER, ipc=api_pb2.POD)


def pod_config(options: RunOptions) -> api_pb2.PodSandboxConfig:
    """The pod around the container. A name given is its uid too, so that the runtime itself refuses a second one of that name.

    Raises InvalidArgument.
    """
    name = options.full_name
    if not NAME.fullmatch(name):
        raise InvalidArgument(f"name {name!r} may hold only letters, digits, '_', '.' and '-'")
    if options.network == "host" and options.hostname:
        raise InvalidArgument("a container on the host's network has the host's name", hint="leave out --hostname")
    security = api_pb2.LinuxSandboxSecurityContext(
        namespace_options=namespaces(options), privileged=options.privileged, seccomp=seccomp(options)
    )
    return api_pb2.PodSandboxConfig(
        metadata=api_pb2.PodSandboxMetadata(name=name, uid=options.name or options.token, namespace=NAMESPACE),
        hostname="" if options.network == "host" else options.hostname or name,
        log_directory=options.log_directory,
        labels=parse_pairs(options.labels, "label"),
        annotations=annotations_of(options),
        linux=api_pb2.LinuxPodSandboxConfig(security_context=security),
    )


def annotations_of(options: RunOptions) -> dict[str, str]:
    """What the pod says of itself: how it came about, and which network it is for where that is not the usual one."""
    named = {} if options.network in ("pod", "host") else {NETWORK_ANNOTATION: options.network}
    return {RUN_ANNOTATION: options.token, **({ATTACHED_ANNOTATION: "true"} if options.attached else {}), **named}


def container_config(options: RunOptions) -> api_pb2.ContainerConfig:
    """The container. Raises InvalidArgument."""
    environment = parse_environment(options.env, options.environment)
    return api_pb2.ContainerConfig(
        metadata=api_pb2.ContainerMetadata(name=options.full_name),
        image=api_pb2.ImageSpec(image=options.image, user_specified_image=options.image),
        command=[options.entrypoint] if options.entrypoint else [],
        args=options.command,
        working_dir=options.workdir,
        envs=[api_pb2.KeyValue(key=key, value=os.fsencode(value)) for key, value in environment.items()],
        mounts=[parse_volume(volume) for volume in options.volumes],
        labels=parse_pairs(options.labels, "label"),
        annotations=options.annotations,
        log_path="0.log",
        stdin=options.interactive,
        stdin_once=options.interactive and options.attached,
        tty=options.tty,
        linux=api_pb2.LinuxContainerConfig(resources=resources(options), security_context=security_context(options)),
    )


def security_context(options: RunOptions) -> api_pb2.LinuxContainerSecurityContext:
    """The container's rights. Raises InvalidArgument."""
    context = api_pb2.LinuxContainerSecurityContext(
        privileged=options.privileged,
        namespace_options=namespaces(options),
        readonly_rootfs=options.read_only,
        capabilities=api_pb2.Capability(add_capabilities=options.cap_add, drop_capabilities=options.cap_drop),
        seccomp=seccomp(options),
        **parse_user(options.user) if options.user else {},  # type: ignore[arg-type]
    )
    if not options.privileged:
        context.masked_paths.extend(MASKED_PATHS)
        context.readonly_paths.extend(READONLY_PATHS)
    return context


def seccomp(options: RunOptions) -> api_pb2.SecurityProfile:
    """The runtime's own profile, none for a privileged container."""
    kind = api_pb2.SecurityProfile.Unconfined if options.privileged else api_pb2.SecurityProfile.RuntimeDefault
    return api_pb2.SecurityProfile(profile_type=kind)
