"""Whatever a CDI file holds, it is read or refused by name; and edits never change what they are given."""

from __future__ import annotations

import copy
import json

from hypothesis import given
from hypothesis import strategies as st

from tare.errors import FailedPrecondition, InvalidArgument
from tare.runtime.cdi_edits import apply
from tare.runtime.cdi_spec import parse

WORDS = """
    cdiVersion kind devices name containerEdits env deviceNodes path hostPath type major mounts containerPath options hooks
    hookName additionalGids intelRdt closID annotations x
"""
KEYS = st.sampled_from(WORDS.split())
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from(["1.0.0", "v.com/c", "/x", "A=b", "poststop", "c", ""]), st.text()
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=20
)


@given(VALUES)
def test_any_json(value: object) -> None:
    try:
        parse("x.json", json.dumps(value).encode())
    except InvalidArgument as error:
        assert str(error).startswith("read CDI file x.json: ")


@given(st.binary(max_size=60))
def test_any_bytes_as_yaml(text: bytes) -> None:
    try:
        parse("x.yaml", text)
    except InvalidArgument as error:
        assert str(error).startswith("read CDI file x.yaml: ")


EDITS = st.fixed_dictionaries(
    {},
    optional={
        "env": st.lists(st.sampled_from(["A=1", "B=2", "A=3"]), max_size=4),
        "mounts": st.lists(
            st.fixed_dictionaries(
                {"hostPath": st.just("/h"), "containerPath": st.sampled_from(["/", "/a", "/a/b", "/a/b/", "/c"])}
            ),
            max_size=5,
        ),
        "hooks": st.lists(
            st.fixed_dictionaries({"hookName": st.sampled_from(["poststart", "poststop"]), "path": st.just("/x")}), max_size=3
        ),
        "additionalGids": st.lists(st.integers(0, 9), max_size=4),
    },
)  # fmt: skip


@given(EDITS, st.lists(st.sampled_from(["/", "/a", "/a/b", "/d"]), unique=True))
def test_edits(wanted: dict[str, object], mounted: list[str]) -> None:
    value = {"cdiVersion": "1.0.0", "kind": "v.com/c", "devices": [{"name": "x", "containerEdits": wanted}]}
    edits = parse("x.json", json.dumps(value).encode()).devices[0].container_edits
    spec = {"process": {"env": ["A=0"]}, "mounts": [{"destination": path} for path in mounted]}
    before = copy.deepcopy(spec)
    try:
        after = apply(spec, edits, ())
    except FailedPrecondition:
        raise AssertionError("nothing here is unsupported") from None
    assert spec == before
    names = [entry.partition("=")[0] for entry in after["process"]["env"]]
    assert len(names) == len(set(names))
    places = [item["destination"] for item in after["mounts"]]
    assert len(places) == len(set(places)) and set(mounted) <= set(places)
    assert apply(after, edits, ())["mounts"] == after["mounts"]
