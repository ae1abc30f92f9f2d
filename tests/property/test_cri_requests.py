"""Any request whatever is translated or refused with the field's name; labels, annotations, mounts and limits come back as they went in."""

from __future__ import annotations

import string
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tare.cri import translate_replies, translate_requests
from tare.cri.signals import VALUES
from tare.cri.v1 import api_pb2 as pb
from tare.errors import InvalidArgument
from tare.runtime.records import ContainerRecord, ContainerState, PodRecord, PodState

ANY = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], deadline=None)
STRINGS = st.one_of(
    st.sampled_from(
        ["", "/", "/a", "..", "a/../b", "/x/../y", "a\0b", "0-3", "3-0", "localhost/", "localhost/p", "memory.max"]
    ),
    st.sampled_from(
        ["rwm", "sha256:" + "0" * 64, "unconfined", "a=b", "2MB", "127.0.0.1", "CAP_KILL", "net.core.x", "\n"]
    ),
    st.text(max_size=20),
)
INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
    FieldDescriptor.TYPE_ENUM: (-(1 << 31), (1 << 31) - 1),
}


def scalars(kind: int) -> st.SearchStrategy[Any]:
    """Values of a field that is no message; small numbers and the ends of the range are likely."""
    if kind == FieldDescriptor.TYPE_STRING:
        return STRINGS
    if kind == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=8)
    if kind == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    low, high = INTEGERS[kind]
    return st.integers(max(low, -2), 3) | st.sampled_from([low, high]) | st.integers(low, high)


def message_class(descriptor: Any) -> type[Message]:
    """The class of a message's descriptor."""
    return GetMessageClass(descriptor)


@st.composite
def messages(draw: st.DrawFn, kind: type[Message], depth: int = 5) -> Message:
    """Any message of the type, with some of its fields set to anything."""
    message = kind()
    fields = [field for field in message.DESCRIPTOR.fields if depth or field.message_type is None]
    for field in draw(st.lists(st.sampled_from(fields), unique_by=lambda f: f.name, max_size=6)) if fields else []:
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            getattr(message, field.name).update(draw(st.dictionaries(STRINGS, STRINGS, max_size=2)))
        elif field.is_repeated:
            of = messages(message_class(entry), depth - 1) if entry is not None else scalars(field.type)
            getattr(message, field.name).extend(draw(st.lists(of, max_size=2)))
        elif entry is not None:
            getattr(message, field.name).CopyFrom(draw(messages(message_class(entry), depth - 1)))
        else:
            setattr(message, field.name, draw(scalars(field.type)))
    return message


def pod_request() -> pb.RunPodSandboxRequest:
    """The least that is valid."""
    return pb.RunPodSandboxRequest(config=pb.PodSandboxConfig(metadata=pb.PodSandboxMetadata(name="pod")))


def container_request() -> pb.CreateContainerRequest:
    """The least that is valid."""
    return pb.CreateContainerRequest(
        config=pb.ContainerConfig(metadata=pb.ContainerMetadata(name="one"), image=pb.ImageSpec(image="busybox"))
    )


def pod_status(request: pb.RunPodSandboxRequest) -> pb.PodSandboxStatus:
    """What a client reads back of the pod that it asked for."""
    config = translate_requests.pod_config(request)
    record = PodRecord(id="p", config=config, handler="", state=PodState.READY, created_at=1)
    return translate_replies.pod_status(record)


def container_status(request: pb.CreateContainerRequest) -> pb.ContainerStatus:
    """What a client reads back of the container that it asked for."""
    config = translate_requests.container_config(request)
    record = ContainerRecord(
        id="c",
        pod_id="p",
        config=config,
        image_id="sha256:1",
        image_ref="busybox@sha256:2",
        state=ContainerState.CREATED,
        created_at=1,
        resources=config.resources,
    )
    return translate_replies.container_status(record)


@ANY
@given(messages(pb.PodSandboxConfig))
def test_any_pod_is_translated_or_refused(config: pb.PodSandboxConfig) -> None:
    bare, valid = pb.RunPodSandboxRequest(config=config), pod_request()
    valid.config.MergeFrom(config)
    for request in (bare, valid):
        try:
            pod_status(request).SerializeToString()
        except InvalidArgument as error:
            assert error.doing.startswith("check config.")
            assert error.cause


@ANY
@given(messages(pb.ContainerConfig))
def test_any_container_is_translated_or_refused(config: pb.ContainerConfig) -> None:
    bare, valid = pb.CreateContainerRequest(config=config), container_request()
    valid.config.MergeFrom(config)
    for request in (bare, valid):
        try:
            container_status(request).SerializeToString()
        except InvalidArgument as error:
            assert error.doing.startswith("check config.")
            assert error.cause


@ANY
@given(st.dictionaries(st.text(), st.text()), st.dictionaries(st.text(), st.text()))
def test_labels_and_annotations_come_back(labels: dict[str, str], annotations: dict[str, str]) -> None:
    pod, container = pod_request(), container_request()
    for config in (pod.config, container.config):
        config.labels.update(labels)
        config.annotations.update(annotations)
    for status in (pod_status(pod), container_status(container)):
        assert dict(status.labels) == labels
        assert dict(status.annotations) == annotations


NAMES = st.text(string.ascii_letters + string.digits + "._- é", min_size=1, max_size=12).filter(
    lambda s: s not in (".", "..")
)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))
MAPPINGS = st.lists(
    st.builds(
        pb.IDMapping,
        host_id=st.integers(0, 1 << 20),
        container_id=st.integers(0, 1 << 20),
        length=st.integers(1, 1 << 16),
    ),
    min_size=1,
    max_size=2,
)


@st.composite
def mounts(draw: st.DrawFn) -> pb.Mount:
    """Valid mounts of host paths and of images."""
    mount = pb.Mount(
        container_path=draw(PATHS) + draw(st.sampled_from(["", "/", "//"])),
        readonly=draw(st.booleans()),
        selinux_relabel=draw(st.booleans()),
        mount_options=draw(st.lists(st.sampled_from(["noexec", "nosuid", "nodev"]), max_size=2)),
    )
    if draw(st.booleans()):
        mount.image.image = "busybox"
        mount.image_sub_path = draw(st.sampled_from(["", "a/b"]))
    else:
        mount.host_path = draw(PATHS)
        mount.propagation = draw(
            st.sampled_from([pb.PROPAGATION_PRIVATE, pb.PROPAGATION_HOST_TO_CONTAINER, pb.PROPAGATION_BIDIRECTIONAL])
        )
    if mount.readonly and mount.propagation == pb.PROPAGATION_PRIVATE:
        mount.recursive_read_only = draw(st.booleans())
    if draw(st.booleans()):
        mount.uidMappings.extend(draw(MAPPINGS))
        mount.gidMappings.extend(draw(MAPPINGS))
    return mount


@ANY
@given(st.lists(mounts(), max_size=4))
def test_mounts_come_back(wanted: list[pb.Mount]) -> None:
    request = container_request()
    request.config.mounts.extend(wanted)
    assert list(container_status(request).mounts) == wanted


@st.composite
def limits(draw: st.DrawFn) -> pb.LinuxContainerResources:
    """Valid limits."""
    memory = draw(st.just(0) | st.integers(4096, (1 << 63) - 1))
    return pb.LinuxContainerResources(
        cpu_period=draw(st.just(0) | st.integers(1000, 1_000_000)),
        cpu_quota=draw(st.sampled_from([-1, 0]) | st.integers(1000, 1 << 40)),
        cpu_shares=draw(st.integers(0, 262144)),
        memory_limit_in_bytes=memory,
        memory_swap_limit_in_bytes=draw(st.sampled_from([-1, 0]) | st.integers(max(memory, 4096), (1 << 63) - 1)),
        oom_score_adj=draw(st.integers(-1000, 1000)),
        cpuset_cpus=draw(st.sampled_from(["", "0", "0-3", "0,2-5,9"])),
        cpuset_mems=draw(st.sampled_from(["", "0"])),
        hugepage_limits=draw(
            st.lists(
                st.builds(pb.HugepageLimit, page_size=st.just("2MB"), limit=st.integers(0, (1 << 64) - 1)), max_size=2
            )
        ),
        unified=draw(st.dictionaries(st.sampled_from(["memory.high", "pids.max", "hugetlb.2MB.max"]), st.just("max"))),
    )


@ANY
@given(limits())
def test_limits_come_back(wanted: pb.LinuxContainerResources) -> None:
    request = container_request()
    request.config.linux.resources.CopyFrom(wanted)
    assert container_status(request).resources.linux == wanted


@ANY
@given(st.sampled_from(pb.Signal.values()))
def test_signals_come_back_or_are_aliases(value: int) -> None:
    number = translate_requests.stop_signal(value)
    assert (number == 0) == (value == pb.SIGNAL_RUNTIME_DEFAULT)
    shown = VALUES.get(number, pb.SIGNAL_RUNTIME_DEFAULT)
    assert translate_requests.stop_signal(shown) == number
