"""Requests that make no sense, for every method of CRI, against a real daemon.

Each is answered in a second, with a code that says whose fault it is; the daemon lives, says nothing of unexpected errors, and
keeps nothing. What a request may name on the node is chosen so that a node is not harmed by one that is granted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tare.cri.v1 import api_pb2 as pb
from tests.support.node import Node, busy_node

pytestmark = pytest.mark.root

METHODS = [method for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods]
EXAMPLES = 12
SECONDS = 1.0
REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNKNOWN,  # PullImage, and nothing else
    grpc.StatusCode.UNIMPLEMENTED,
}
# Handles TERM, so that a stop with a long grace is none.
MAIN = ("sh", "-c", "trap exit TERM; while :; do sleep 0.02; done")
SETTINGS = '[runtime]\nrefuse_missing_sources = ["/"]\n'
TEXTS = (
    "",
    "a",
    "a/b",
    "../../x",
    "/",
    "/nonexistent/tare-fuzz",
    "a\0b",
    "\U0001f40b" * 40,
    "x" * 5000,
    "a=b",
    "-1",
    "%s%n",
)
NUMBERS = {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with busy_node("fuzz", settings=SETTINGS) as node:
        yield node


@dataclass(frozen=True)
class Known:
    """What there is for a request to be about: IDs, and requests that would be granted."""

    ids: tuple[str, ...]
    images: tuple[str, ...]
    sound: dict[str, Message]


@pytest.fixture
def known(node: Node) -> Iterator[Known]:
    """A pod with a running container and one that is not started; all of the node is gone afterwards."""
    node.pull()  # RemoveImage may have hit it
    pod = node.run_pod("fuzzed")
    running = node.start(node.create(pod, "main", *MAIN))
    created = node.create(pod, "other", "true")
    sound: dict[str, Message] = {
        "RunPodSandbox": pb.RunPodSandboxRequest(config=node.pod_config("made")),
        "CreateContainer": pb.CreateContainerRequest(
            pod_sandbox_id=pod, config=node.container_config("made", "true"), sandbox_config=node.pod_config("fuzzed")
        ),
        "UpdateContainerResources": pb.UpdateContainerResourcesRequest(container_id=running),
    }
    yield Known((pod, running, created, created[:3], ""), (node.image, "127.0.0.1:1/x:y", "UPPER", "sha256:12"), sound)
    node.remove_all()
    assert node.settled() == []


def values(field: FieldDescriptor, known: Known, depth: int) -> st.SearchStrategy[Any]:
    """What may stand in a field, sense or not."""
    if field.message_type is not None:
        return messages(field.message_type, known, depth - 1)
    if field.enum_type is not None:
        return st.sampled_from([*(item.number for item in field.enum_type.values), -1, 99])
    if field.type == FieldDescriptor.TYPE_STRING:
        pool = [*TEXTS]
        if field.name.endswith("id") or field.name.endswith("ids"):
            pool += known.ids * 3
        if field.name == "image":
            return st.sampled_from(known.images)
        return st.sampled_from(pool)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return st.binary(max_size=20)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return st.booleans()
    if field.type in NUMBERS:
        low, high = NUMBERS[field.type]
        return st.sampled_from([0, 1, 7, 100_000, low, high])
    return st.floats(allow_nan=False)


def messages(kind: Descriptor, known: Known, depth: int = 6) -> st.SearchStrategy[Message]:
    """Messages of a type, each field there or not."""
    fields = {}
    for field in kind.fields if depth > 0 else ():
        value = values(field, known, depth)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name
            keys = (values(entry[name], known, depth) for name in ("key", "value"))
            value = st.dictionaries(*keys, max_size=3)
        elif field.is_repeated:
            value = st.lists(value, max_size=2)
        fields[field.name] = value
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: GetMessageClass(kind)(**given))


def requests(method: MethodDescriptor, known: Known) -> st.SearchStrategy[Message]:
    """Nonsense, and, where there is a request that would be granted, that with nonsense in it."""
    nonsense = messages(method.input_type, known)
    sound = known.sound.get(method.name)
    if sound is None:
        return nonsense

    def mixed(other: Message) -> Message:
        merged = type(sound)()
        merged.CopyFrom(sound)
        merged.MergeFrom(other)
        return merged

    return st.one_of(nonsense, nonsense.map(mixed))


def ask(node: Node, method: MethodDescriptor, request: Message | bytes) -> grpc.StatusCode:
    """Make a call and look at its answer: its code, once it was found to be in order."""
    call = raw(node, method)
    wire = request if isinstance(request, bytes) else request.SerializeToString()
    endless = method.name == "GetContainerEvents"
    began = time.monotonic()
    try:
        answer = call(wire, timeout=0.05 if endless else 30)
        if method.server_streaming:
            list(answer)
        code, words = grpc.StatusCode.OK, ""
    except grpc.RpcError as error:
        code, words = error.code(), error.details() or ""
    took = time.monotonic() - began
    assert took < SECONDS, f"{method.name} took {took:.1f} s"
    # A process may fail to become what was asked for (there is no such command); what was not foreseen is said to be that.
    foreseen = code is grpc.StatusCode.INTERNAL and "unexpected error" not in words
    assert code is grpc.StatusCode.OK or code in REFUSALS or foreseen, f"{method.name}: {code.name}: {words}"
    assert "Traceback" not in words and len(words) < 8192
    return code


def raw(node: Node, method: MethodDescriptor) -> Callable[..., Any]:
    """A call that sends bytes as they are."""
    channel = node.daemon.client._channel
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = channel.unary_stream if method.server_streaming else channel.unary_unary
    call: Callable[..., Any] = kind(path, request_serializer=bytes, response_deserializer=bytes)
    return call


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_nonsense_is_refused_in_a_second_and_leaves_nothing(node: Node, known: Known, method: MethodDescriptor) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests(method, known))
    def try_one(request: Message) -> None:
        ask(node, method, request)

    try_one()
    assert node.daemon.process is not None and node.daemon.process.poll() is None
    assert "unexpected error" not in node.daemon.log.read_text()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_what_is_no_message_is_an_invalid_argument(node: Node, method: MethodDescriptor) -> None:
    for wire in (b"\x0a\x05ab", b"\xff" * 9):
        assert ask(node, method, wire) is grpc.StatusCode.INVALID_ARGUMENT


def test_text_that_is_no_utf_8_is_an_invalid_argument(node: Node) -> None:
    status = next(method for method in METHODS if method.name == "ContainerStatus")
    assert ask(node, status, b"\x0a\x02\xff\xfe") is grpc.StatusCode.INVALID_ARGUMENT


def test_long_and_many_annotations_come_back_byte_for_byte(node: Node, known: Known) -> None:
    annotations = {"long": "\u00e9" * (128 << 10)}
    labels = {f"label-{number}": str(number) for number in range(10_000)}
    pod = node.run_pod(node.pod_config("long", annotations=annotations, labels=labels))
    status = node.pod_status(pod)
    assert dict(status.annotations) == annotations and dict(status.labels) == labels


def test_descriptors_do_not_pile_up(node: Node, known: Known) -> None:
    """Over refusals of every kind of request, twice."""

    def round_of_refusals() -> int:
        for method in METHODS:
            if method.name != "GetContainerEvents":
                ask(node, method, GetMessageClass(method.input_type)())
        assert node.daemon.process is not None
        return len(os.listdir(f"/proc/{node.daemon.process.pid}/fd"))

    first = round_of_refusals()
    assert round_of_refusals() <= first + 4
