"""Requests → records: the parts that pods and containers share (resources, namespaces, profiles, users, images). Pure; raises InvalidArgument."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from tare.cri import checks
from tare.cri.v1 import api_pb2 as pb
from tare.runtime.records import (
    GroupsPolicy,
    HugepageLimit,
    IdMapping,
    ImageRef,
    NamespaceMode,
    NamespaceOptions,
    ProfileType,
    Resources,
    SecurityProfile,
    SELinuxOptions,
    UserNamespace,
)

ALL_IDS: Final = 1 << 32
NO_LIMIT: Final = -1
# What the kernel takes: microseconds in kernel/sched, one page of memory at least, proc_pid_oom_score_adj(5).
CPU_PERIOD: Final = (1_000, 1_000_000)
CPU_QUOTA: Final = (1_000, (1 << 44) - 1)
MAX_CPU_SHARES: Final = 262_144
MEMORY: Final = (4_096, (1 << 63) - 1)
OOM_SCORE_ADJ: Final = (-1_000, 1_000)
PAGE_SIZE: Final = re.compile(r"[1-9][0-9]{0,9}(KB|MB|GB)")
UNIFIED_KEY: Final = re.compile(r"[a-z0-9_]+(\.[A-Za-z0-9_]+)+")
LOCALHOST: Final = "localhost/"
OLD_PROFILES: Final = {
    "runtime/default": ProfileType.RUNTIME_DEFAULT,
    "docker/default": ProfileType.RUNTIME_DEFAULT,
    "unconfined": ProfileType.UNCONFINED,
}


def resources(message: pb.LinuxContainerResources, field: str) -> Resources:
    """Limits within what the kernel takes."""
    memory = checks.set_within(message.memory_limit_in_bytes, *MEMORY, f"{field}.memory_limit_in_bytes", "bytes")
    return Resources(
        cpu_period=checks.set_within(message.cpu_period, *CPU_PERIOD, f"{field}.cpu_period", "µs"),
        cpu_quota=_or_no_limit(message.cpu_quota, CPU_QUOTA, f"{field}.cpu_quota", "µs"),
        cpu_shares=checks.within(message.cpu_shares, 0, MAX_CPU_SHARES, f"{field}.cpu_shares"),
        memory_limit=memory,
        oom_score_adj=checks.within(message.oom_score_adj, *OOM_SCORE_ADJ, f"{field}.oom_score_adj"),
        cpuset_cpus=checks.cpuset(message.cpuset_cpus, f"{field}.cpuset_cpus"),
        cpuset_mems=checks.cpuset(message.cpuset_mems, f"{field}.cpuset_mems"),
        hugepage_limits=_hugepage_limits(message.hugepage_limits, f"{field}.hugepage_limits"),
        unified=_unified(message, f"{field}.unified"),
        memory_swap_limit=_swap(message.memory_swap_limit_in_bytes, memory, f"{field}.memory_swap_limit_in_bytes"),
    )


def _or_no_limit(value: int, limits: tuple[int, int], field: str, unit: str) -> int:
    if value == NO_LIMIT:
        return value
    return checks.set_within(value, *limits, field, unit)


def _swap(value: int, memory: int, field: str) -> int:
    swap = _or_no_limit(value, MEMORY, field, "bytes")
    if 0 < swap < memory:
        raise checks.refuse(field, f"{swap} is less than the memory limit of {memory}, which it includes")
    return swap


def _hugepage_limits(messages: Iterable[pb.HugepageLimit], field: str) -> tuple[HugepageLimit, ...]:
    found = tuple(HugepageLimit(page_size=message.page_size, limit=message.limit) for message in messages)
    for index, item in enumerate(found):
        if not PAGE_SIZE.fullmatch(item.page_size):
            raise checks.refuse(f"{field}[{index}].page_size", f"{item.page_size!r} is not a size such as 2MB or 1GB")
    return found


def _unified(message: pb.LinuxContainerResources, field: str) -> dict[str, str]:
    for key, value in message.unified.items():
        if not UNIFIED_KEY.fullmatch(key):
            raise checks.refuse(field, f"{key!r} is not the name of a cgroup file such as memory.high")
        checks.text(value, f"{field}[{key}]")
    return dict(message.unified)


def id_mappings(messages: Iterable[pb.IDMapping], field: str) -> tuple[IdMapping, ...]:
    """Mappings that are not empty and stay within 32 bits on both sides."""
    found = tuple(IdMapping(host_id=m.host_id, container_id=m.container_id, length=m.length) for m in messages)
    for index, item in enumerate(found):
        if not item.length or max(item.host_id, item.container_id) + item.length > ALL_IDS:
            raise checks.refuse(f"{field}[{index}]", f"a mapping of {item.length} IDs is empty or passes 32 bits")
    return found


def user_namespace(message: pb.UserNamespace, field: str) -> UserNamespace:
    """Mode POD needs one mapping of uids and one of gids, mode NODE has none, and no other mode has a meaning."""
    mode = checks.choice(NamespaceMode, message.mode, f"{field}.mode")
    uids, gids = id_mappings(message.uids, f"{field}.uids"), id_mappings(message.gids, f"{field}.gids")
    if mode not in (NamespaceMode.POD, NamespaceMode.NODE):
        raise checks.refuse(f"{field}.mode", f"a user namespace cannot be {mode.name}", "POD or NODE")
    if mode is NamespaceMode.NODE and (uids or gids):
        raise checks.refuse(field, "the node's user namespace takes no mappings")
    if mode is NamespaceMode.POD:
        _whole_mapping(uids, f"{field}.uids")
        _whole_mapping(gids, f"{field}.gids")
    return UserNamespace(mode=mode, uids=uids, gids=gids)


def _whole_mapping(mappings: tuple[IdMapping, ...], field: str) -> None:
    """One range that begins with the container's root, as a kubelet gives it: without a root, nothing in the pod could be set up."""
    if len(mappings) != 1:
        raise checks.refuse(field, f"a pod's user namespace has one mapping, not {len(mappings)}")
    if mappings[0].container_id:
        raise checks.refuse(f"{field}[0].container_id", "ID 0 of the container is not mapped")


def namespaces(message: pb.NamespaceOption, field: str, *, target: bool) -> NamespaceOptions:
    """Each namespace's mode; TARGET for PID only, and only where `target` allows it."""
    modes = {
        name: checks.choice(NamespaceMode, getattr(message, name), f"{field}.{name}")
        for name in ("network", "pid", "ipc")
    }
    for name, mode in modes.items():
        if mode is NamespaceMode.TARGET and not (name == "pid" and target):
            raise checks.refuse(f"{field}.{name}", "TARGET is for the PID namespace of a container only")
    if modes["pid"] is NamespaceMode.TARGET and not message.target_id:
        raise checks.refuse(f"{field}.target_id", "it is empty, but the PID namespace is TARGET")
    user = (
        user_namespace(message.userns_options, f"{field}.userns_options")
        if message.HasField("userns_options")
        else None
    )
    options = NamespaceOptions(**modes, target_id=checks.text(message.target_id, f"{field}.target_id"), user=user)
    if options.mapped and options.pid is NamespaceMode.NODE:
        cause = (
            "the node's PID namespace cannot go with a user namespace: the kernel gives it no /proc of those processes"
        )
        raise checks.refuse(f"{field}.pid", cause)
    return options


def selinux(message: pb.SELinuxOption, field: str) -> SELinuxOptions:
    """The four parts of a context."""
    return SELinuxOptions(
        user=checks.text(message.user, f"{field}.user"),
        role=checks.text(message.role, f"{field}.role"),
        type=checks.text(message.type, f"{field}.type"),
        level=checks.text(message.level, f"{field}.level"),
    )


Security = pb.LinuxSandboxSecurityContext | pb.LinuxContainerSecurityContext


def seccomp(context: Security, field: str) -> SecurityProfile | None:
    """The profile of `seccomp`, else of the deprecated `seccomp_profile_path`, else None."""
    new = context.HasField("seccomp")
    profile = (
        _profile(context.seccomp, f"{field}.seccomp")
        if new
        else _old_profile(context.seccomp_profile_path, f"{field}.seccomp_profile_path")
    )
    if profile and profile.type is ProfileType.LOCALHOST:
        checks.absolute(profile.localhost_ref, f"{field}.{'seccomp.localhost_ref' if new else 'seccomp_profile_path'}")
    return profile


def apparmor(context: Security, field: str) -> SecurityProfile | None:
    """The profile of `apparmor`, else of the deprecated `apparmor_profile` that containers have, else None."""
    if context.HasField("apparmor"):
        return _profile(context.apparmor, f"{field}.apparmor")
    if isinstance(context, pb.LinuxContainerSecurityContext):
        return _old_profile(context.apparmor_profile, f"{field}.apparmor_profile")
    return None


def _profile(message: pb.SecurityProfile, field: str) -> SecurityProfile:
    kind = checks.choice(ProfileType, message.profile_type, f"{field}.profile_type")
    if kind is not ProfileType.LOCALHOST:
        return SecurityProfile(type=kind)
    name = message.localhost_ref.removeprefix(LOCALHOST)
    return SecurityProfile(type=kind, localhost_ref=checks.present(name, f"{field}.localhost_ref"))


def _old_profile(value: str, field: str) -> SecurityProfile | None:
    """Kubernetes' annotation values, which the deprecated fields hold: "runtime/default", "unconfined", "localhost/NAME"."""
    if not value:
        return None
    if value in OLD_PROFILES:
        return SecurityProfile(type=OLD_PROFILES[value])
    if not value.startswith(LOCALHOST):
        raise checks.refuse(field, f"{value!r} is no profile", "runtime/default, unconfined or localhost/NAME")
    name = checks.present(value.removeprefix(LOCALHOST), field)
    return SecurityProfile(type=ProfileType.LOCALHOST, localhost_ref=name)


def user_and_group(context: Security, field: str, *, named: bool) -> tuple[int | None, int | None]:
    """Numeric user and group. A group alone is an error by CRI's rule; `named` says that the user is given by name."""
    user = (
        checks.user_id(context.run_as_user.value, f"{field}.run_as_user") if context.HasField("run_as_user") else None
    )
    group = None
    if context.HasField("run_as_group"):
        group = checks.user_id(context.run_as_group.value, f"{field}.run_as_group")
        if user is None and not named:
            raise checks.refuse(f"{field}.run_as_group", "it is set but no user is", "set run_as_user as well")
    return user, group


def groups(context: Security, field: str) -> tuple[tuple[int, ...], GroupsPolicy]:
    """Supplementary groups and what to do with those of the image."""
    found = tuple(
        checks.user_id(value, f"{field}.supplemental_groups[{index}]")
        for index, value in enumerate(context.supplemental_groups)
    )
    policy = checks.choice(GroupsPolicy, context.supplemental_groups_policy, f"{field}.supplemental_groups_policy")
    return found, policy


def image_ref(message: pb.ImageSpec, field: str) -> ImageRef:
    """An image by name; whether the name is well formed is for the image store to say."""
    return ImageRef(
        image=checks.present(message.image, f"{field}.image"),
        user_specified_image=message.user_specified_image,
        annotations=dict(message.annotations),
        runtime_handler=message.runtime_handler,
    )
