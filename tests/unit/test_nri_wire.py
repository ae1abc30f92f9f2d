"""The committed messages are NRI's: every number, name, type, enum value and method; and its calls as a table have all of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from tare.nri.interface import EVERY_EVENT, METHODS
from tare.nri.v1 import nri_pb2 as pb

FACTS: dict[str, Any] = json.loads((Path(__file__).parent.parent / "data/nri-v1.json").read_text())
SCALARS = {
    getattr(FieldDescriptor, f"TYPE_{name.upper()}"): name
    for name in ("bool", "int32", "int64", "string", "uint32", "uint64")
}


def type_name(field: FieldDescriptor) -> str:
    """As the facts write it, without the label."""
    kind = field.message_type or field.enum_type
    return kind.full_name.removeprefix("nri.pkg.api.v1alpha1.") if kind else SCALARS[field.type]


def field_fact(field: FieldDescriptor) -> list[Any]:
    """A field as the facts write it."""
    entry = field.message_type
    if entry is not None and entry.GetOptions().map_entry:
        spelt = f"map<{type_name(entry.fields_by_name['key'])}, {type_name(entry.fields_by_name['value'])}>"
    else:
        spelt = f"{'repeated ' if field.is_repeated else ''}{type_name(field)}"
    return [field.number, field.name, spelt]


def message_fact(message: Descriptor) -> dict[str, Any]:
    """A message as the facts write it, its fields in the order of their numbers."""
    fact: dict[str, Any] = {"fields": sorted(field_fact(field) for field in message.fields)}
    if message.enum_types:
        fact["enums"] = {enum.name: {value.name: value.number for value in enum.values} for enum in message.enum_types}
    return fact


def test_every_message_enum_and_method() -> None:
    file = pb.DESCRIPTOR
    assert file.package == FACTS["package"]
    assert {name: message_fact(item) for name, item in file.message_types_by_name.items()} == FACTS["messages"]
    enums = {
        name: {value.name: value.number for value in item.values} for name, item in file.enum_types_by_name.items()
    }
    assert enums == FACTS["enums"]
    services = {
        name: [[method.name, method.input_type.name, method.output_type.name] for method in item.methods]
        for name, item in file.services_by_name.items()
    }
    assert services == FACTS["services"]


def test_the_table_has_every_call_and_every_event() -> None:
    expected = {name: (request, response) for name, request, response in FACTS["services"]["Plugin"]}
    found = {
        name: (method.request.DESCRIPTOR.name, method.response.DESCRIPTOR.name) for name, method in METHODS.items()
    }
    assert found == expected
    events = {method.event for method in METHODS.values() if method.event}
    assert events == set(range(1, pb.LAST)) and sum(method.bit for method in METHODS.values()) == EVERY_EVENT
