"""CreateContainer as a list of steps.

    checkpoint ─ image ─ volumes ─ user ─ sources ─ propagation ─ confinement ─ labels ─ profile ─ spec ─ plugins
        ─ checked ─ snapshot ─ files ─ record       undone when it fails

`checkpoint`, `checked` and `files` are for a container that is restored (`restoring`).

All that can be checked without a process is checked here, and what it comes to is kept with the record (`Plan`), so that a
start needs nothing else, also after a restart of the daemon or the removal of the image.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from tare.errors import FailedPrecondition, InvalidArgument, NotFound
from tare.handlers.checking import check_edited
from tare.images.names import origin
from tare.runtime import adjusting, cdi, devices, labels, lifecycle, restoring, seccomp_profile, signals, volumes
from tare.runtime.bounds import kernel_errors, twice
from tare.runtime.plugins import Moment, Subject
from tare.runtime.pods import hostname_of
from tare.runtime.ports import Parts
from tare.runtime.records import (
    ContainerConfig,
    ContainerRecord,
    ContainerState,
    NamespaceMode,
    PodConfig,
    PodRecord,
    Propagation,
    Resources,
)
from tare.runtime.spec import DeviceNode, PodSurroundings, container_spec
from tare.runtime.store import Plan
from tare.runtime.users import FILE_LIMIT, ResolvedUser, resolve_user
from tare.runtime.volumes import ImageVolume
from tare.state.operations import Operation, Step
from tare.storage import union

if TYPE_CHECKING:
    from tare.images.records import ImageRecord
    from tare.runtime.checkpoint_archive import Described

PROFILE_LIMIT = 4 << 20
NEVER_LABELLED = frozenset(
    ("/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/opt", "/proc", "/root", "/run", "/sbin", "/sys", "/tmp", "/usr",
     "/var", "/var/lib", "/var/log", "/var/run")
)  # fmt: skip
"""Directories that the node itself works with."""


@dataclass(slots=True, kw_only=True)
class Creation:
    """A container on its way: `request` is None when it is being undone after a crash, from `names` alone. One that is restored is `described` by
    its checkpoint, and stands on the image `base`."""

    parts: Parts
    id: str
    request: Request | None = None
    image: ImageRecord | None = None
    lowers: tuple[Path, ...] = ()
    volumes: dict[str, ImageVolume] = field(default_factory=dict)
    user: ResolvedUser | None = None
    seccomp: Mapping[str, Any] | None = None
    apparmor: str = ""
    label: labels.Labels = field(default_factory=labels.Labels)
    plan: Plan | None = None
    resources: Resources | None = None
    described: Described | None = None
    base: str = ""
    chosen: bool = False  # its group, by a plugin

    @property
    def names(self) -> dict[str, str]:
        """What recovery needs to find all of it again."""
        return {"container": self.id}

    @property
    def reference(self) -> str:
        """The image that it stands on, as it was asked for."""
        image = self.asked.config.image
        return self.base or image.user_specified_image or image.image

    @property
    def asked(self) -> Request:
        """The request, which a container being made has."""
        assert self.request is not None
        return self.request


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for, in which pod. `pod_config` is the caller's copy of the pod's configuration: its log directory counts."""

    pod: PodRecord
    config: ContainerConfig
    pod_config: PodConfig

    @property
    def log_path(self) -> str:
        """The log file's absolute path; "" where none is wanted."""
        if not self.config.log_path or not self.pod_config.log_directory:
            return ""
        return os.path.join(self.pod_config.log_directory, self.config.log_path)


def begin(parts: Parts, container_id: str, pod: PodRecord, config: ContainerConfig, pod_config: PodConfig) -> Creation:
    """A container to be made."""
    return Creation(parts=parts, id=container_id, request=Request(pod=pod, config=config, pod_config=pod_config))


def restore(parts: Parts, names: Mapping[str, str]) -> Creation:
    """The creation that an intent speaks of."""
    return Creation(parts=parts, id=names["container"])


async def find_image(creation: Creation) -> None:
    """The image, held from now on, so that its layers are not collected before the container is on record."""
    asked = creation.asked
    reference = creation.base or asked.config.image.image
    image = creation.parts.images.find(reference)
    if image is None:
        raise NotFound(
            f"create container {asked.config.metadata.name}",
            cause=f"there is no image {reference}",
            hint="pull it first",
        )
    creation.parts.store.hold_layers(creation.id, image.chain_ids)
    if image.artifact_type:
        cause = f"{reference} is an OCI artifact ({image.artifact_type}), not a container image"
        raise InvalidArgument(
            f"create container {asked.config.metadata.name}", cause=cause, hint="mount it as an image volume"
        )
    await creation.parts.images.check_trust(image, creation.reference)
    creation.image = image
    creation.lowers = creation.parts.images.layer_paths(image)


async def let_image_go(creation: Creation) -> None:
    """Its layers may be collected."""
    creation.parts.store.let_layers_go(creation.id)


async def find_volumes(creation: Creation) -> None:
    """The images that are mounted, held like the container's own."""
    assert creation.image is not None
    layers = list(creation.image.chain_ids)
    for mount in creation.asked.config.mounts:
        if mount.image is None:
            continue
        record = volumes.find(creation.parts.images, mount)
        layers += record.chain_ids
        creation.parts.store.hold_layers(creation.id, layers)
        creation.volumes[mount.container_path] = await volumes.look(creation.parts.images, mount, record)


async def find_user(creation: Creation) -> None:
    """Who the process runs as, by the image's own passwd and group files."""
    assert creation.image is not None
    security = creation.asked.config.security
    with kernel_errors("read /etc/passwd and /etc/group in the image"):
        passwd = union.read(creation.lowers, "/etc/passwd", FILE_LIMIT)
        group = union.read(creation.lowers, "/etc/group", FILE_LIMIT)
    creation.user = resolve_user(
        passwd=passwd,
        group=group,
        image_user=creation.image.config.user,
        run_as_user=security.run_as_user,
        run_as_username=security.run_as_username,
        run_as_group=security.run_as_group,
        supplemental_groups=security.supplemental_groups,
        policy=security.supplemental_groups_policy,
    )


async def check_sources(creation: Creation) -> None:
    """What the mounts bind is there, or is made, unless the settings have it refused."""
    parts, config = creation.parts, creation.asked.config
    refused = parts.config.refuse_missing_sources
    wanted = [(m.host_path, not is_refused(m.host_path, refused)) for m in config.mounts if m.host_path]
    if not wanted:
        return
    for source in await twice(lambda: parts.handler.check_sources(wanted)):
        if not source.errno:
            continue
        doing = f"create container {config.metadata.name}"
        cause = f"mount source {source.path}: {os.strerror(source.errno)}"
        if source.errno == errno.ENOENT:
            raise FailedPrecondition(doing, cause=cause, hint="the settings have it refused where it is missing")
        raise InvalidArgument(doing, cause=cause)


async def check_propagation(creation: Creation) -> None:
    """Mounts spread to and from where the request says so: the kernel would only pass it over where a source's mount does not."""
    parts, config = creation.parts, creation.asked.config
    wanted = [mount for mount in config.mounts if mount.propagation is not Propagation.PRIVATE and mount.host_path]
    if not wanted:
        return
    doing = f"create container {config.metadata.name}"
    found = await twice(lambda: parts.handler.propagation([mount.host_path for mount in wanted]))
    for mount, source in zip(wanted, found, strict=True):
        if source.errno:
            raise InvalidArgument(doing, cause=f"mount source {source.path}: {os.strerror(source.errno)}")
        needed = ("shared",) if mount.propagation is Propagation.BIDIRECTIONAL else ("shared", "slave")
        if source.propagation not in needed:
            cause = f"mount source {source.path} is on a mount that is {source.propagation}, not {' or '.join(needed)}"
            raise FailedPrecondition(doing, cause=cause, hint="make that one shared: mount --make-rshared")


def is_refused(path: str, refused: Sequence[str]) -> bool:
    """Whether a missing source is refused: its path is one of these, or below one."""
    return any(PurePath(os.path.normpath(path)).is_relative_to(os.path.normpath(entry)) for entry in refused)


async def find_confinement(creation: Creation) -> None:
    """The AppArmor profile and the SELinux labels: the container's, or else its pod's. Raises InvalidArgument, FailedPrecondition."""
    pod, security = creation.asked.pod, creation.asked.config.security
    with kernel_errors("see what AppArmor and SELinux enforce"):
        node = await asyncio.to_thread(creation.parts.confinement)
    creation.apparmor = labels.apparmor_profile(security.apparmor, node, privileged=security.privileged)
    wanted = security.selinux or pod.config.security.selinux
    creation.label = labels.selinux_labels(wanted, node, privileged=security.privileged, seed=pod.id)


async def relabel_sources(creation: Creation) -> None:
    """What the mounts bind gets the label of the container's files, where the request says so and SELinux is on."""
    config, label = creation.asked.config, creation.label.mount
    paths = [mount.host_path for mount in config.mounts if mount.host_path and mount.selinux_relabel and label]
    doing = f"create container {config.metadata.name}"
    for path in paths:
        if os.path.normpath("/" + path.lstrip("/")) in NEVER_LABELLED:
            cause = f"mount source {path}: the node itself would not work with the label of a container's files"
            raise InvalidArgument(doing, cause=cause)
    for source in await twice(lambda: creation.parts.handler.relabel([(path, label) for path in paths])):
        if source.errno:
            raise InvalidArgument(doing, cause=f"label mount source {source.path}: {os.strerror(source.errno)}")


async def find_profile(creation: Creation) -> None:
    """The seccomp profile, which must be one that can be compiled (once: it is remembered by its content)."""
    security = creation.asked.config.security
    path = seccomp_profile.localhost_path(security)
    try:
        text = await asyncio.to_thread(read_profile, path) if path is not None else None
    except OSError as error:
        raise InvalidArgument(f"read seccomp profile {path}", cause=error) from error
    creation.seccomp = seccomp_profile.choose_profile(security, text)
    if creation.seccomp is not None:
        await creation.parts.seccomp(creation.seccomp)


def read_profile(path: str) -> bytes:
    """A profile's file, refused where it is no plain file or unreasonably long."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > PROFILE_LIMIT:
            raise OSError(errno.EFBIG, f"not a regular file of at most {PROFILE_LIMIT} bytes", path)
        return file.read()


async def make_spec(creation: Creation) -> None:
    """The OCI configuration. Raises InvalidArgument where the request and the image do not come to one (no command, for one)."""
    assert creation.image is not None and creation.user is not None
    parts, asked = creation.parts, creation.asked
    pod, config = asked.pod, asked.config
    facts = parts.store.pod_facts[pod.id]
    cgroup = parts.cgroups.container_path(pod.cgroup_parent, creation.id)
    spec = container_spec(
        pod=pod.config,
        surroundings=PodSurroundings(
            pins={kind: Path(path) for kind, path in facts.pins.items()},
            directory=parts.pod_directory(pod.id),
            hostname=hostname_of(pod.config),
        ),
        container=config,
        image=creation.image.config,
        user=creation.user.user,
        home=creation.user.home,
        cgroup_path=cgroup,
        rootfs=parts.run / "rootfs",
        devices=await find_devices(config),
        seccomp=creation.seccomp,
        target_pid=target_of(creation),
        volumes={path: volume.option for path, volume in creation.volumes.items()},
        annotations=config.annotations,
        apparmor=creation.apparmor,
        labels=creation.label,
    )
    if names := cdi.requested(config):
        spec = await asyncio.to_thread(parts.cdi.inject, spec, names)
        check_edited(f"give the container CDI devices {', '.join(names)}", spec)
    creation.plan = Plan.of(spec, cgroup, creation.lowers)


async def find_devices(config: ContainerConfig) -> tuple[DeviceNode, ...]:
    """The node's devices that the container gets: all of them where it is privileged, and those that it names."""
    nodes: tuple[DeviceNode, ...] = ()
    if config.security.privileged:
        nodes += await asyncio.to_thread(devices.host_devices)
    if config.devices:
        nodes += await asyncio.to_thread(devices.device_nodes, config.devices)
    return nodes


def target_of(creation: Creation) -> int | None:
    """The main process whose PID namespace is shared, where the request names a target. Raises FailedPrecondition, NotFound."""
    asked, store = creation.asked, creation.parts.store
    options = asked.config.security.namespaces
    if options is None or options.pid is not NamespaceMode.TARGET:
        return None
    target = store.container(options.target_id, "share the PID namespace of")
    if target.pod_id != asked.pod.id:
        raise InvalidArgument(f"share the PID namespace of container {target.id}", cause="it is in another pod")
    facts = store.container_facts.get(target.id)
    if target.state is not ContainerState.RUNNING or facts is None:
        raise FailedPrecondition(
            f"share the PID namespace of container {target.id}", cause=f"it is {target.state.name}"
        )
    return facts.process.pid


async def ask_plugins(creation: Creation) -> None:
    """Those of the node adjust it, and what they want is looked at as what the request wants is."""
    plugins = creation.parts.plugins
    await plugins.making(creation.id)
    if not plugins.active:
        return
    assert creation.plan is not None
    wanted = await plugins.adjust(as_subject(creation), creation.plan.cgroup)
    if wanted is not None:
        name = creation.asked.config.metadata.name
        spec = await adjusting.configuration(creation.parts, name, creation.plan, wanted)
        creation.resources = wanted.resources
        creation.chosen = wanted.cgroup != creation.plan.cgroup
        creation.plan = Plan.of(spec, wanted.cgroup, creation.lowers)


async def tell_plugins(creation: Creation) -> None:
    """They are told that it is not made after all; those of a later daemon have not heard of it."""
    plugins = creation.parts.plugins
    if creation.plan is not None and plugins.active:
        subject = as_subject(creation)
        await plugins.tell(Moment.STOPPED, subject)
        await plugins.tell(Moment.REMOVED, subject)


def as_subject(creation: Creation) -> Subject:
    """The container as plugins see it."""
    assert creation.plan is not None
    pod = creation.asked.pod
    return Subject(
        pod=pod,
        facts=creation.parts.store.pod_facts.get(pod.id),
        container=as_record(creation),
        spec=creation.plan.spec,
        unborn=True,
    )


async def make_snapshot(creation: Creation) -> None:
    """The writable layer."""
    await creation.parts.snapshots.prepare(creation.id, creation.lowers)


async def remove_snapshot(creation: Creation) -> None:
    """It goes."""
    await creation.parts.snapshots.remove(creation.id)


async def record(creation: Creation) -> None:
    """From here on the container exists."""
    assert creation.plan is not None
    if creation.chosen:  # two that were made at once may have been given one group
        group = creation.plan.cgroup
        adjusting.refuse_anothers(creation.parts, f"make container {creation.id} in control group {group!r}", group)
    creation.parts.store.add_container(as_record(creation), creation.plan)


def as_record(creation: Creation) -> ContainerRecord:
    """The container as it is put on record."""
    assert creation.image is not None and creation.user is not None
    asked = creation.asked
    state = lifecycle.container_after(None, lifecycle.ContainerEvent.CREATE, creation.id)
    assert state is not None
    return ContainerRecord(
        id=creation.id,
        pod_id=asked.pod.id,
        config=volumes.resolved(asked.config, creation.volumes),
        image_id=creation.image.id,
        image_ref=origin(creation.image, creation.reference),
        state=state,
        created_at=time.time_ns(),
        log_path=asked.log_path,
        user=creation.user.user,
        stop_signal=signals.stop_signal(asked.config.stop_signal, creation.image.config.stop_signal),
        resources=creation.resources or asked.config.resources,
        snapshot=creation.id,
        layers=(
            *creation.image.chain_ids,
            *(item for volume in creation.volumes.values() for item in volume.chain_ids),
        ),
    )


async def unrecord(creation: Creation) -> None:
    """It does not exist."""
    creation.parts.store.drop_container(creation.id)


CREATE_CONTAINER: Operation[Creation] = Operation(
    "CreateContainer",
    (
        Step("checkpoint", restoring.find_checkpoint, restoring.forget_checkpoint),
        Step("image", find_image, let_image_go),
        Step("volumes", find_volumes),
        Step("user", find_user),
        Step("sources", check_sources),
        Step("propagation", check_propagation),
        Step("confinement", find_confinement),
        Step("labels", relabel_sources),
        Step("profile", find_profile),
        Step("spec", make_spec),
        Step("plugins", ask_plugins, tell_plugins),
        Step("checked", restoring.check_checkpoint),
        Step("snapshot", make_snapshot, remove_snapshot),
        Step("files", restoring.lay_files),
        Step("record", record, unrecord),
    ),
)
