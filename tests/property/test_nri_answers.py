"""Whatever NRI plugins answer: it is done or refused in Tare's own words, and what is done can be shown to the next one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tare.errors import TareError
from tare.nri import adjust, limits, view
from tare.nri.merge import Change, Creation
from tare.nri.v1 import nri_pb2 as pb
from tare.runtime.plugins import Subject
from tare.runtime.records import (
    ContainerConfig,
    ContainerMetadata,
    ContainerRecord,
    ContainerState,
    ImageRef,
    PodConfig,
    PodMetadata,
    PodRecord,
    PodState,
    Resources,
)

TEXTS = st.sampled_from(
    ["", "-", "a", "/a", "-/a", "/a/../b", "/dev/x", "-/dev/x", "c", "b", "p", "rw", "rbind", "bind", "rshared", "tmpfs", "x=y", "\0", "é",
     "network", "-ipc", "user", "mount", "net.core.somaxconn", "kernel.panic", "RLIMIT_NOFILE", "2MB", "0-1", "SCMP_ACT_ALLOW",
     "SCMP_ACT_ERRNO", "SCMP_CMP_EQ", "memory.high", "vendor.com/a=b", "read"]
)  # fmt: skip
NUMBERS = st.sampled_from(
    [0, 1, 2, 7, 19, 64, 4096, 65536, 1 << 31, -1, -(1 << 31), (1 << 31) - 1, (1 << 63) - 1, (1 << 64) - 1]
)
SPEC: dict[str, Any] = {
    "process": {"args": ["sh"], "env": ["A=1"], "user": {"uid": 0, "gid": 0}, "oomScoreAdj": 0},
    "mounts": [{"destination": "/a", "type": "bind", "source": "/x", "options": ["rbind"]}],
    "annotations": {"a": "v"},
    "linux": {
        "namespaces": [{"type": "mount"}, {"type": "network", "path": "/n"}, {"type": "ipc", "path": "/i"}],
        "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 2}],
        "cgroupsPath": "/p/c",
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
    },
}
POD = PodRecord(
    id="p",
    config=PodConfig(metadata=PodMetadata(name="p", uid="u", namespace="n")),
    handler="",
    state=PodState.READY,
    created_at=1,
)
RECORD = ContainerRecord(
    id="c",
    pod_id="p",
    config=ContainerConfig(metadata=ContainerMetadata(name="c"), image=ImageRef(image="i")),
    image_id="i",
    image_ref="i",
    state=ContainerState.CREATED,
    created_at=1,
)
RANGES = {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_ENUM: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
}


def fill(message: Message, draw: Callable[[Any], Any]) -> None:
    """Some of the fields, of any value."""
    for field in message.DESCRIPTOR.fields:
        if not draw(st.integers(0, 2)):
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entries = getattr(message, field.name)
            for key in draw(st.lists(TEXTS, max_size=2)):
                if field.message_type.fields_by_name["value"].message_type is not None:
                    fill(entries[key], draw)
                else:
                    entries[key] = draw(TEXTS)
        elif field.message_type is not None and field.is_repeated:
            for _ in range(draw(st.integers(1, 2))):
                fill(getattr(message, field.name).add(), draw)
        elif field.message_type is not None:
            getattr(message, field.name).SetInParent()
            fill(getattr(message, field.name), draw)
        elif field.is_repeated:
            getattr(message, field.name).extend([scalar(field, draw) for _ in range(draw(st.integers(1, 2)))])
        else:
            setattr(message, field.name, scalar(field, draw))


def scalar(field: Any, draw: Callable[[Any], Any]) -> Any:
    """A value that the field can hold."""
    if field.type == FieldDescriptor.TYPE_STRING:
        return draw(TEXTS)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return draw(st.booleans())
    low, high = RANGES[field.type]
    return min(max(draw(NUMBERS), low), high)


@st.composite
def answers(draw: st.DrawFn) -> pb.CreateContainerResponse:
    """Anything that a plugin may say of a new container, with a part of it left out so that more than the first fault is found."""
    answer = pb.CreateContainerResponse()
    fill(answer, draw)
    linux = answer.adjust.linux
    for part, name in [(answer.adjust, item.name) for item in answer.adjust.DESCRIPTOR.fields] + [
        (linux, item.name) for item in linux.DESCRIPTOR.fields
    ]:
        if draw(st.integers(0, 3)):
            part.ClearField(name)
    return answer


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(answers())
def test_an_adjustment_is_done_or_refused(answer: pb.CreateContainerResponse) -> None:
    subject = Subject(pod=POD, container=RECORD, spec=SPEC, unborn=True)
    creation = Creation(pb.CreateContainerRequest(pod=view.pod(POD, None), container=view.container(subject)))
    with contextlib.suppress(TareError):
        creation.add(answer, "10-a")
        creation.request.SerializeToString()
        done = adjust.adjusted(SPEC, creation.adjust, Resources(), "/p/c")
        shown = view.container(Subject(pod=POD, container=RECORD, spec=done.spec, unborn=True))
        assert shown.id == "c" and limits.message(done.resources).ByteSize() >= 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_an_update_is_one_or_is_refused(data: st.DataObject) -> None:
    answer = pb.UpdateContainerResponse()
    fill(answer, data.draw)
    change = Change(pb.UpdateContainerRequest(container=pb.Container(id="a")))
    with contextlib.suppress(TareError):
        change.add(answer, "10-a")
        for update in change.updates.found.values():
            limits.of_update(update.linux.resources)
        if change.limits is not None:
            limits.of_update(change.limits)
