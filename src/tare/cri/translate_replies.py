"""Records → replies: pods, containers and images as CRI shows them. Pure; labels, annotations and paths come back byte for byte."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

import msgspec

from tare.cri.signals import VALUES
from tare.cri.v1 import api_pb2 as pb
from tare.images.records import ImageRecord
from tare.runtime.events import Event, Kind
from tare.runtime.records import (
    ContainerRecord,
    ContainerState,
    IdMapping,
    ImageRef,
    Mount,
    NamespaceOptions,
    PodMetadata,
    PodRecord,
    PodState,
    Resources,
    UserNamespace,
)

# As many digits as a 32-bit ID has: whatever an image says here must not break a list of all images.
NUMERIC_ID: Final = re.compile(r"[0-9]{1,10}")
EVENT_TYPES: Final = {
    Kind.CREATED: pb.CONTAINER_CREATED_EVENT,
    Kind.STARTED: pb.CONTAINER_STARTED_EVENT,
    Kind.STOPPED: pb.CONTAINER_STOPPED_EVENT,
    Kind.DELETED: pb.CONTAINER_DELETED_EVENT,
}
POD_STATES: Final = {PodState.READY: pb.SANDBOX_READY, PodState.NOTREADY: pb.SANDBOX_NOTREADY}
CONTAINER_STATES: Final = {
    ContainerState.CREATED: pb.CONTAINER_CREATED,
    ContainerState.RUNNING: pb.CONTAINER_RUNNING,
    ContainerState.EXITED: pb.CONTAINER_EXITED,
    ContainerState.UNKNOWN: pb.CONTAINER_UNKNOWN,
}


def pod_item(record: PodRecord) -> pb.PodSandbox:
    """A pod in a list. Numbers and no names of enums, and no message that is copied into another: lists are long, and asked for often."""
    config = record.config
    item = pb.PodSandbox(
        id=record.id,
        state=POD_STATES[record.state],
        created_at=record.created_at,
        labels=config.labels,
        annotations=config.annotations,
        runtime_handler=record.handler,
    )
    metadata = item.metadata
    metadata.name, metadata.uid = config.metadata.name, config.metadata.uid
    metadata.namespace, metadata.attempt = config.metadata.namespace, config.metadata.attempt
    return item


def pod_status(record: PodRecord) -> pb.PodSandboxStatus:
    """A pod in full. The network's first address is the primary one; none with the node's network."""
    return pb.PodSandboxStatus(
        id=record.id,
        metadata=_pod_metadata(record.config.metadata),
        state=f"SANDBOX_{record.state.name}",
        created_at=record.created_at,
        network=pb.PodSandboxNetworkStatus(
            ip=record.ips[0] if record.ips else "",
            additional_ips=[pb.PodIP(ip=ip) for ip in record.ips[1:]],
        ),
        linux=pb.LinuxPodSandboxStatus(
            namespaces=pb.Namespace(options=_namespaces(record.config.security.namespaces)),
        ),
        labels=record.config.labels,
        annotations=record.config.annotations,
        runtime_handler=record.handler,
    )


def _pod_metadata(metadata: PodMetadata) -> pb.PodSandboxMetadata:
    return pb.PodSandboxMetadata(
        name=metadata.name, uid=metadata.uid, namespace=metadata.namespace, attempt=metadata.attempt
    )


def _namespaces(options: NamespaceOptions) -> pb.NamespaceOption:
    return pb.NamespaceOption(
        network=options.network.name,
        pid=options.pid.name,
        ipc=options.ipc.name,
        target_id=options.target_id,
        userns_options=_user_namespace(options.user) if options.user else None,
    )


def _user_namespace(user: UserNamespace) -> pb.UserNamespace:
    return pb.UserNamespace(mode=user.mode.name, uids=_id_mappings(user.uids), gids=_id_mappings(user.gids))


def _id_mappings(mappings: Iterable[IdMapping]) -> list[pb.IDMapping]:
    return [pb.IDMapping(host_id=m.host_id, container_id=m.container_id, length=m.length) for m in mappings]


def container_item(record: ContainerRecord) -> pb.Container:
    """A container in a list, made as `pod_item`."""
    config = record.config
    item = pb.Container(
        id=record.id,
        pod_sandbox_id=record.pod_id,
        image_ref=record.image_ref,
        state=CONTAINER_STATES[record.state],
        created_at=record.created_at,
        labels=config.labels,
        annotations=config.annotations,
        image_id=record.image_id,
    )
    item.metadata.name, item.metadata.attempt = config.metadata.name, config.metadata.attempt
    image = config.image
    item.image.image = _shown_name(image)
    item.image.user_specified_image, item.image.image_ref = image.user_specified_image, image.image_ref
    item.image.runtime_handler = image.runtime_handler
    if image.annotations:
        item.image.annotations.update(image.annotations)
    return item


def container_status(record: ContainerRecord) -> pb.ContainerStatus:
    """A container in full."""
    user = pb.LinuxContainerUser(uid=record.user.uid, gid=record.user.gid, supplemental_groups=record.user.groups)
    return pb.ContainerStatus(
        id=record.id,
        metadata=_container_metadata(record),
        state=f"CONTAINER_{record.state.name}",
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
        exit_code=record.exit_code,
        image=_shown_image(record.config.image),
        image_ref=record.image_ref,
        reason=record.reason,
        message=record.message,
        labels=record.config.labels,
        annotations=record.config.annotations,
        mounts=[_mount(item) for item in record.config.mounts],
        log_path=record.log_path,
        resources=pb.ContainerResources(linux=resources(record.resources)),
        image_id=record.image_id,
        user=pb.ContainerUser(linux=user),
        stop_signal=VALUES.get(record.stop_signal, pb.SIGNAL_RUNTIME_DEFAULT),
    )


def event(value: Event) -> pb.ContainerEventResponse:
    """An event, with the pod and its containers in full."""
    return pb.ContainerEventResponse(
        container_id=value.id,
        container_event_type=EVENT_TYPES[value.kind],
        created_at=value.at,
        pod_sandbox_status=pod_status(value.pod),
        containers_statuses=[container_status(record) for record in value.containers],
    )


def _container_metadata(record: ContainerRecord) -> pb.ContainerMetadata:
    return pb.ContainerMetadata(name=record.config.metadata.name, attempt=record.config.metadata.attempt)


def _image(image: ImageRef) -> pb.ImageSpec:
    return pb.ImageSpec(
        image=image.image,
        annotations=image.annotations,
        user_specified_image=image.user_specified_image,
        runtime_handler=image.runtime_handler,
        image_ref=image.image_ref,
    )


def _shown_image(image: ImageRef) -> pb.ImageSpec:
    """The image under `_shown_name`."""
    reply = _image(image)
    reply.image = _shown_name(image)
    return reply


def _shown_name(image: ImageRef) -> str:
    """The name that a person gave the image: a kubelet asks by ID, and shows this field as the container's image."""
    by_id = image.image.startswith("sha256:") and image.user_specified_image
    return image.user_specified_image if by_id else image.image


def _mount(mount: Mount) -> pb.Mount:
    return pb.Mount(
        container_path=mount.container_path,
        host_path=mount.host_path,
        readonly=mount.readonly,
        selinux_relabel=mount.selinux_relabel,
        propagation=f"PROPAGATION_{mount.propagation.name}",
        uidMappings=_id_mappings(mount.uid_mappings),
        gidMappings=_id_mappings(mount.gid_mappings),
        recursive_read_only=mount.recursive_read_only,
        image=_image(mount.image) if mount.image else None,
        image_sub_path=mount.image_sub_path,
        mount_options=mount.options,
    )


def resources(value: Resources) -> pb.LinuxContainerResources:
    """Limits, verbatim."""
    return pb.LinuxContainerResources(
        cpu_period=value.cpu_period,
        cpu_quota=value.cpu_quota,
        cpu_shares=value.cpu_shares,
        memory_limit_in_bytes=value.memory_limit,
        oom_score_adj=value.oom_score_adj,
        cpuset_cpus=value.cpuset_cpus,
        cpuset_mems=value.cpuset_mems,
        hugepage_limits=[
            pb.HugepageLimit(page_size=item.page_size, limit=item.limit) for item in value.hugepage_limits
        ],
        unified=value.unified,
        memory_swap_limit_in_bytes=value.memory_swap_limit,
    )


def image_item(record: ImageRecord) -> pb.Image:
    """An image. Its user is a number or a name, as the image's configuration has it before a colon."""
    user = record.config.user.partition(":")[0]
    numeric = NUMERIC_ID.fullmatch(user) is not None
    return pb.Image(
        id=record.id,
        repo_tags=record.repo_tags,
        repo_digests=record.repo_digests,
        size=record.size,
        uid=pb.Int64Value(value=int(user)) if numeric else None,
        username="" if numeric else user,
        pinned=record.pinned,
        spec=pb.ImageSpec(annotations=record.annotations) if record.annotations else None,
    )


def image_info(record: ImageRecord) -> dict[str, str]:
    """A verbose image status: the OCI image configuration under the names of the image spec, and the layers' chain IDs."""
    config = record.config
    fields = {
        "User": config.user,
        "Env": config.env,
        "Entrypoint": config.entrypoint,
        "Cmd": config.cmd,
        "WorkingDir": config.working_dir,
        "Volumes": {path: {} for path in config.volumes},
        "ExposedPorts": {port: {} for port in config.exposed_ports},
        "StopSignal": config.stop_signal,
        "Labels": config.labels,
    }
    return info(
        {"imageSpec": {"config": {key: value for key, value in fields.items() if value}}, "chainIDs": record.chain_ids}
    )


def info(value: object) -> dict[str, str]:
    """A verbose reply's `info`: one JSON document under "info", where crictl looks for it. Paths and the like become strings."""
    return {"info": msgspec.json.encode(value, enc_hook=str).decode()}
