"""The committed protocol is what its .proto says, and the .proto is what CRI v1 is: every number, type, label, enum value and method."""

from __future__ import annotations

import itertools
import json
import runpy
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from tare.cri.v1 import api_pb2, api_pb2_grpc

PROJECT = Path(__file__).resolve().parent.parent.parent
FACTS: dict[str, Any] = json.loads((PROJECT / "tests/data/cri-v1.json").read_text())
SCALARS = {
    getattr(FieldDescriptor, f"TYPE_{name.upper()}"): name for name in ("bool", "bytes", "double", "int32", "int64")
}
SCALARS |= {getattr(FieldDescriptor, f"TYPE_{name.upper()}"): name for name in ("string", "uint32", "uint64")}


def type_name(field: FieldDescriptor) -> str:
    """As the facts write it, without the label: "int32", "IDMapping", "SecurityProfile.ProfileType"."""
    kind = field.message_type or field.enum_type
    return kind.full_name.removeprefix("runtime.v1.") if kind else SCALARS[field.type]


def field_fact(field: FieldDescriptor) -> list[Any]:
    """A field as the facts write it."""
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        spelt = f"map<{type_name(entry.fields_by_name['key'])}, {type_name(entry.fields_by_name['value'])}>"
    else:
        spelt = f"{'repeated ' if field.is_repeated else ''}{type_name(field)}"
    return [field.number, field.name, spelt, *(["deprecated"] if field.GetOptions().deprecated else [])]


def enum_fact(enum: EnumDescriptor) -> dict[str, int]:
    """An enum as the facts write it."""
    return {value.name: value.number for value in enum.values}


def message_fact(message: Descriptor) -> dict[str, Any]:
    """A message as the facts write it, its fields in the order of their numbers."""
    fact: dict[str, Any] = {"fields": sorted(field_fact(field) for field in message.fields)}
    if message.enum_types:
        fact["enums"] = {enum.name: enum_fact(enum) for enum in message.enum_types}
    return fact


def test_committed_code_is_what_the_generator_writes(tmp_path: Path) -> None:
    generate = runpy.run_path(str(PROJECT / "scripts/generate_proto.py"))["generate"]
    for path in generate(tmp_path):
        committed = PROJECT / "src" / path.relative_to(tmp_path)
        assert committed.read_bytes() == path.read_bytes(), f"{committed.name} is stale: run scripts/generate_proto.py"


def test_package_and_syntax() -> None:
    assert api_pb2.DESCRIPTOR.package == FACTS["package"]
    assert f'syntax = "{FACTS["syntax"]}";' in (PROJECT / "src/tare/cri/v1/api.proto").read_text()


def test_counts() -> None:
    assert len(FACTS["messages"]) == 175
    assert sum(map(len, FACTS["services"].values())) == 43
    assert set(api_pb2.DESCRIPTOR.message_types_by_name) == set(FACTS["messages"])
    assert set(api_pb2.DESCRIPTOR.enum_types_by_name) == set(FACTS["enums"])
    assert set(api_pb2.DESCRIPTOR.services_by_name) == set(FACTS["services"])


@pytest.mark.parametrize("name", FACTS["messages"])
def test_message(name: str) -> None:
    fact = {**FACTS["messages"][name], "fields": sorted(FACTS["messages"][name]["fields"])}
    assert message_fact(api_pb2.DESCRIPTOR.message_types_by_name[name]) == fact


@pytest.mark.parametrize("name", FACTS["enums"])
def test_enum(name: str) -> None:
    assert enum_fact(api_pb2.DESCRIPTOR.enum_types_by_name[name]) == FACTS["enums"][name]


@pytest.mark.parametrize("name", FACTS["services"])
def test_service(name: str) -> None:
    methods = api_pb2.DESCRIPTOR.services_by_name[name].methods
    assert not any(method.client_streaming for method in methods)
    assert [
        [
            method.name,
            method.input_type.name,
            f"{'stream ' if method.server_streaming else ''}{method.output_type.name}",
        ]
        for method in methods
    ] == FACTS["services"][name]


def test_stubs_call_the_names_that_go_clients_serve() -> None:
    """The generated client asks for "/runtime.v1.Service/Method", as kubelet and crictl do."""
    with grpc.insecure_channel("unix:/nonexistent") as channel:
        for service, methods in FACTS["services"].items():
            stub = getattr(api_pb2_grpc, f"{service}Stub")(channel)
            for method, _, _ in methods:
                assert getattr(stub, method)._method == f"/runtime.v1.{service}/{method}".encode()


def test_every_message_and_method_has_a_comment() -> None:
    lines = (PROJECT / "src/tare/cri/v1/api.proto").read_text().splitlines()
    bare = [
        line
        for before, line in itertools.pairwise(lines)
        if line.split(" ")[0] in ("message", "enum", "service") or line.startswith("  rpc")
        if not before.strip().startswith("//")
    ]
    assert bare == []
