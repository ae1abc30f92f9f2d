"""Requests → records: what a client asks of pods, containers and registries, checked field by field. Pure; raises InvalidArgument naming the field.

A field's name is its path in the request, so that a client finds it: "config.linux.resources.cpu_period".
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import Final

from tare.cri import checks
from tare.cri.signals import NUMBERS
from tare.cri.translate_common import (
    apparmor,
    groups,
    id_mappings,
    image_ref,
    namespaces,
    resources,
    seccomp,
    selinux,
    user_and_group,
)
from tare.cri.v1 import api_pb2 as pb
from tare.images.auth import RegistryAuth
from tare.runtime.records import (
    Capabilities,
    ContainerConfig,
    ContainerMetadata,
    ContainerSecurity,
    Device,
    DnsConfig,
    Mount,
    PodConfig,
    PodMetadata,
    PodSecurity,
    PortMapping,
    Propagation,
    Resources,
)

# Linux keeps 64 bytes of a hostname (uname(2)).
HOSTNAME: Final = re.compile(r"[A-Za-z0-9._-]{0,64}")
SYSCTL: Final = re.compile(r"[A-Za-z0-9_:-]+([./][A-Za-z0-9_:-]+)+")
CAPABILITY: Final = re.compile(r"[A-Za-z_]+")
PROTOCOLS: Final = {pb.TCP: "tcp", pb.UDP: "udp", pb.SCTP: "sctp"}
MAX_PORT: Final = 65535


def pod_config(request: pb.RunPodSandboxRequest | pb.CreateContainerRequest) -> PodConfig:
    """The pod that a request describes."""
    if isinstance(request, pb.RunPodSandboxRequest):
        message, field, given = request.config, "config", request.HasField("config")
    else:
        message, field, given = request.sandbox_config, "sandbox_config", request.HasField("sandbox_config")
    if not given:
        raise checks.refuse(field, "it is missing")
    linux = message.linux
    return PodConfig(
        metadata=_pod_metadata(message, f"{field}.metadata"),
        hostname=_hostname(message.hostname, f"{field}.hostname"),
        log_directory=checks.optional_absolute(message.log_directory, f"{field}.log_directory"),
        dns=_dns(message.dns_config, f"{field}.dns_config") if message.HasField("dns_config") else None,
        port_mappings=tuple(
            _port_mapping(item, f"{field}.port_mappings[{index}]") for index, item in enumerate(message.port_mappings)
        ),
        labels=dict(message.labels),
        annotations=dict(message.annotations),
        cgroup_parent=checks.upward_free(linux.cgroup_parent, f"{field}.linux.cgroup_parent"),
        security=_pod_security(linux.security_context, f"{field}.linux.security_context"),
        sysctls=_sysctls(linux, f"{field}.linux.sysctls"),
        overhead=resources(linux.overhead, f"{field}.linux.overhead") if linux.HasField("overhead") else None,
        resources=resources(linux.resources, f"{field}.linux.resources") if linux.HasField("resources") else None,
    )


def _pod_metadata(config: pb.PodSandboxConfig, field: str) -> PodMetadata:
    """Only the name must be there: tools make pods without a UID or a namespace."""
    if not config.HasField("metadata"):
        raise checks.refuse(field, "it is missing")
    return PodMetadata(
        name=checks.present(config.metadata.name, f"{field}.name"),
        uid=checks.text(config.metadata.uid, f"{field}.uid"),
        namespace=checks.text(config.metadata.namespace, f"{field}.namespace"),
        attempt=config.metadata.attempt,
    )


def _hostname(value: str, field: str) -> str:
    if not HOSTNAME.fullmatch(value):
        raise checks.refuse(field, f"{value!r} is not a hostname of at most 64 letters, digits, dots and hyphens")
    return value


def _dns(message: pb.DNSConfig, field: str) -> DnsConfig:
    return DnsConfig(
        servers=checks.words(message.servers, f"{field}.servers"),
        searches=checks.words(message.searches, f"{field}.searches"),
        options=checks.words(message.options, f"{field}.options"),
    )


def _port_mapping(message: pb.PortMapping, field: str) -> PortMapping:
    if message.protocol not in PROTOCOLS:
        raise checks.refuse(f"{field}.protocol", f"{message.protocol} is no protocol that this runtime knows")
    if message.host_ip:
        try:
            ipaddress.ip_address(message.host_ip)
        except ValueError as error:
            raise checks.refuse(f"{field}.host_ip", f"{message.host_ip!r} is not an IP address") from error
    return PortMapping(
        protocol=PROTOCOLS[message.protocol],
        container_port=checks.within(message.container_port, 0, MAX_PORT, f"{field}.container_port"),
        host_port=checks.within(message.host_port, 0, MAX_PORT, f"{field}.host_port"),
        host_ip=message.host_ip,
    )


def _pod_security(message: pb.LinuxSandboxSecurityContext, field: str) -> PodSecurity:
    user, group = user_and_group(message, field, named=False)
    supplemental, policy = groups(message, field)
    return PodSecurity(
        namespaces=namespaces(message.namespace_options, f"{field}.namespace_options", target=False),
        selinux=selinux(message.selinux_options, f"{field}.selinux_options")
        if message.HasField("selinux_options")
        else None,
        run_as_user=user,
        run_as_group=group,
        readonly_rootfs=message.readonly_rootfs,
        supplemental_groups=supplemental,
        supplemental_groups_policy=policy,
        privileged=message.privileged,
        seccomp=seccomp(message, field),
        apparmor=apparmor(message, field),
    )


def _sysctls(linux: pb.LinuxPodSandboxConfig, field: str) -> dict[str, str]:
    """Names in sysctl's dotted form or the kernel's with slashes; neither can climb out of /proc/sys."""
    for name, value in linux.sysctls.items():
        if not SYSCTL.fullmatch(name):
            raise checks.refuse(field, f"{name!r} is not the name of a sysctl such as net.core.somaxconn")
        checks.text(value, f"{field}[{name}]")
    return dict(linux.sysctls)


def container_config(request: pb.CreateContainerRequest) -> ContainerConfig:
    """The container that a request describes."""
    message = request.config
    if not request.HasField("config") or not message.HasField("metadata"):
        raise checks.refuse("config.metadata", "it is missing")
    if not message.HasField("image"):
        raise checks.refuse("config.image", "it is missing")
    linux = message.linux
    return ContainerConfig(
        metadata=ContainerMetadata(
            name=checks.present(message.metadata.name, "config.metadata.name"), attempt=message.metadata.attempt
        ),
        image=image_ref(message.image, "config.image"),
        command=checks.texts(message.command, "config.command"),
        args=checks.texts(message.args, "config.args"),
        working_dir=checks.optional_absolute(message.working_dir, "config.working_dir"),
        envs=_envs(message.envs),
        mounts=tuple(_mount(item, f"config.mounts[{index}]") for index, item in enumerate(message.mounts)),
        devices=tuple(_device(item, f"config.devices[{index}]") for index, item in enumerate(message.devices)),
        cdi_devices=tuple(checks.present(item.name, "config.CDI_devices.name") for item in message.CDI_devices),
        labels=dict(message.labels),
        annotations=dict(message.annotations),
        log_path=checks.inside(message.log_path, "config.log_path"),
        stdin=message.stdin,
        stdin_once=message.stdin_once,
        tty=message.tty,
        stop_signal=stop_signal(message.stop_signal),
        resources=resources(linux.resources, "config.linux.resources") if linux.HasField("resources") else Resources(),
        security=_container_security(linux.security_context, "config.linux.security_context"),
    )


def restored_pod(request: pb.RestorePodRequest) -> PodConfig | None:
    """The pod that a restore is to make; None where that is for the checkpoint to say."""
    return pod_config(pb.RunPodSandboxRequest(config=request.config)) if request.HasField("config") else None


def restored_containers(request: pb.RestorePodRequest) -> tuple[ContainerConfig, ...]:
    """Its containers. Their images are in the checkpoint, whatever is said of them here."""
    found: dict[str, ContainerConfig] = {}
    for index, message in enumerate(request.container_configs):
        given = pb.ContainerConfig()
        given.CopyFrom(message)
        given.image.image = given.image.image or "checkpoint"
        config = container_config(pb.CreateContainerRequest(config=given))
        if config.metadata.name in found:
            raise checks.refuse(f"container_configs[{index}].metadata.name", f"{config.metadata.name} is there twice")
        found[config.metadata.name] = config
    return tuple(found.values())


def stop_signal(value: int) -> int:
    """Linux's number of a CRI signal; 0 where the image's or the default one is wanted."""
    if value != pb.SIGNAL_RUNTIME_DEFAULT and value not in NUMBERS:
        raise checks.refuse("config.stop_signal", f"{value} is no signal that this runtime knows")
    return NUMBERS.get(value, 0)


def _envs(messages: Iterable[pb.KeyValue]) -> tuple[tuple[str, bytes], ...]:
    found = tuple((message.key, message.value) for message in messages)
    for index, (key, value) in enumerate(found):
        if not key or "=" in key or "\0" in key:
            raise checks.refuse(f"config.envs[{index}].key", f"{key!r} cannot be the name of an environment variable")
        if b"\0" in value:
            raise checks.refuse(f"config.envs[{index}].value", f"the value of {key} holds a NUL byte")
    return found


def _mount(message: pb.Mount, field: str) -> Mount:
    checks.absolute(message.container_path, f"{field}.container_path")
    if not any(part not in ("", ".") for part in message.container_path.split("/")):
        raise checks.refuse(f"{field}.container_path", "nothing can be mounted over the container's root")
    by_image = message.HasField("image") and bool(message.image.image)
    if by_image and message.host_path:
        raise checks.refuse(f"{field}.host_path", "it is set, and so is image", "set one of them")
    if not by_image:
        checks.absolute(message.host_path, f"{field}.host_path")
    propagation = checks.choice(Propagation, message.propagation, f"{field}.propagation")
    if message.recursive_read_only and not (message.readonly and propagation is Propagation.PRIVATE):
        raise checks.refuse(f"{field}.recursive_read_only", "it needs readonly and private propagation")
    uids = id_mappings(message.uidMappings, f"{field}.uidMappings")
    gids = id_mappings(message.gidMappings, f"{field}.gidMappings")
    if bool(uids) != bool(gids):
        raise checks.refuse(field, "uidMappings and gidMappings are set both or not at all")
    return Mount(
        container_path=message.container_path,
        host_path=message.host_path,
        readonly=message.readonly,
        recursive_read_only=message.recursive_read_only,
        selinux_relabel=message.selinux_relabel,
        propagation=propagation,
        uid_mappings=uids,
        gid_mappings=gids,
        image=image_ref(message.image, f"{field}.image") if by_image else None,
        image_sub_path=checks.inside(message.image_sub_path, f"{field}.image_sub_path"),
        options=checks.words(message.mount_options, f"{field}.mount_options"),
    )


def _device(message: pb.Device, field: str) -> Device:
    permissions = message.permissions or "rwm"
    if not set(permissions) <= set("rwm"):
        raise checks.refuse(f"{field}.permissions", f"{permissions!r} has letters other than r, w and m")
    return Device(
        container_path=checks.absolute(message.container_path, f"{field}.container_path"),
        host_path=checks.absolute(message.host_path, f"{field}.host_path"),
        permissions=permissions,
    )


def _container_security(message: pb.LinuxContainerSecurityContext, field: str) -> ContainerSecurity:
    username = checks.text(message.run_as_username, f"{field}.run_as_username")
    user, group = user_and_group(message, field, named=bool(username))
    if username and user is not None:
        raise checks.refuse(f"{field}.run_as_username", "it is set, and so is run_as_user", "set one of them")
    supplemental, policy = groups(message, field)
    return ContainerSecurity(
        capabilities=_capabilities(message.capabilities, f"{field}.capabilities"),
        privileged=message.privileged,
        namespaces=namespaces(message.namespace_options, f"{field}.namespace_options", target=True)
        if message.HasField("namespace_options")
        else None,
        selinux=selinux(message.selinux_options, f"{field}.selinux_options")
        if message.HasField("selinux_options")
        else None,
        run_as_user=user,
        run_as_group=group,
        run_as_username=username,
        readonly_rootfs=message.readonly_rootfs,
        supplemental_groups=supplemental,
        supplemental_groups_policy=policy,
        no_new_privs=message.no_new_privs,
        masked_paths=tuple(checks.absolute(item, f"{field}.masked_paths") for item in message.masked_paths),
        readonly_paths=tuple(checks.absolute(item, f"{field}.readonly_paths") for item in message.readonly_paths),
        seccomp=seccomp(message, field),
        apparmor=apparmor(message, field),
    )


def _capabilities(message: pb.Capability, field: str) -> Capabilities:
    lists = {
        name: tuple(getattr(message, name))
        for name in ("add_capabilities", "drop_capabilities", "add_ambient_capabilities")
    }
    for name, values in lists.items():
        for value in values:
            if not CAPABILITY.fullmatch(value):
                raise checks.refuse(f"{field}.{name}", f"{value!r} is not the name of a capability")
    return Capabilities(
        add=lists["add_capabilities"],
        drop=lists["drop_capabilities"],
        add_ambient=lists["add_ambient_capabilities"],
    )


def registry_auth(request: pb.PullImageRequest) -> RegistryAuth | None:
    """Credentials, None where the request has none or only empty ones."""
    auth = request.auth
    if not (auth.username or auth.password or auth.auth or auth.identity_token or auth.registry_token):
        return None
    return RegistryAuth(
        username=auth.username,
        password=auth.password,
        auth=auth.auth,
        server_address=auth.server_address,
        identity_token=auth.identity_token,
        registry_token=auth.registry_token,
    )


def image_name(request: pb.ImageStatusRequest | pb.PullImageRequest | pb.RemoveImageRequest) -> str:
    """What the request calls the image, never empty."""
    return checks.present(request.image.image, "image.image")


def identifier(value: str, field: str) -> str:
    """An ID of a pod or container, or the beginning of one; never empty."""
    return checks.present(value, field)


def command(request: pb.ExecSyncRequest) -> tuple[str, ...]:
    """The command and its arguments; there must be a command."""
    if not request.cmd:
        raise checks.refuse("cmd", "it is empty")
    checks.present(request.cmd[0], "cmd[0]")
    return checks.texts(request.cmd, "cmd")


def pod_ranges(value: str) -> tuple[str, ...]:
    """The ranges of addresses in a list with commas, as a kubelet has them of both families; none of an empty one."""
    found = tuple(value.split(",")) if value else ()
    for item in found:
        try:
            ipaddress.ip_network(item)
        except ValueError as error:
            raise checks.refuse("runtime_config.network_config.pod_cidr", str(error)) from error
    return found


def timeout(value: int) -> float:
    """Seconds, not negative."""
    if value < 0:
        raise checks.refuse("timeout", f"{value} seconds are less than none")
    return float(value)
