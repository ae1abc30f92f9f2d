"""Compiled profiles against what the OCI specification says of them, for any call, arguments and conditions."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tare.runtime.seccomp_compile import UNKNOWN_CALL, SeccompCompiler, action, load_library
from tare.runtime.seccomp_newer import AUDIT_X86_64, NOT_THERE
from tests.support import cbpf

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers are x86_64's")

CALLS = {"read": 0, "alarm": 37, "mkdir": 83, "openat2": 437, "cachestat": 451, "mseal": 462}
NEWER = [name for name in CALLS if load_library().seccomp_syscall_resolve_name(name.encode()) == UNKNOWN_CALL]
ACTIONS = ["ALLOW", "LOG", "ERRNO", "TRACE", "TRAP", "KILL", "KILL_THREAD", "KILL_PROCESS"]
SMALL = st.sampled_from([0, 1, 2, 3, 5, 1 << 32, (1 << 32) + 1, (1 << 64) - 1, 0x8000000000000000])
MEANINGS: dict[str, Callable[[int, int, int], bool]] = {
    "NE": lambda value, first, _: value != first,
    "LT": lambda value, first, _: value < first,
    "LE": lambda value, first, _: value <= first,
    "EQ": lambda value, first, _: value == first,
    "GE": lambda value, first, _: value >= first,
    "GT": lambda value, first, _: value > first,
    "MASKED_EQ": lambda value, mask, second: value & mask == second & mask,
}


def passes(args: list[dict[str, Any]], values: list[int]) -> bool:
    """Conditions on different arguments hold together; several on one argument are alternatives, all of them."""
    held = [
        MEANINGS[item["op"].removeprefix("SCMP_CMP_")](values[item["index"]], item["value"], item.get("valueTwo", 0))
        for item in args
    ]
    if len({item["index"] for item in args}) < len(args):
        return any(held)
    return all(held)


CONDITION = st.builds(
    lambda index, op, value, second: {"index": index, "op": f"SCMP_CMP_{op}", "value": value, "valueTwo": second},
    st.integers(0, 2),
    st.sampled_from(sorted(MEANINGS)),
    SMALL,
    SMALL,
)
RULES = st.lists(
    st.tuples(st.sampled_from(sorted(CALLS)), st.sampled_from(ACTIONS), st.lists(CONDITION, max_size=3)),
    unique_by=lambda item: item[0],
    max_size=4,
)


def oracle(default: int, rules: list[tuple[str, str, list[dict[str, Any]]]], number: int, values: list[int]) -> int:
    """What the specification has a call answered with."""
    permissive = default in (
        action("SCMP_ACT_ALLOW", None),
        action("SCMP_ACT_LOG", None),
        action("SCMP_ACT_TRACE", None),
    )
    for name, word, args in rules:
        if CALLS[name] != number:
            continue
        if name in NEWER and args:
            return NOT_THERE if permissive else default
        return action(f"SCMP_ACT_{word}", None) if passes(args, values) else default
    highest = max((CALLS[name] for name, _, _ in rules), default=None)
    if highest is not None and number > highest and not permissive:
        return NOT_THERE
    return default


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(ACTIONS),
    RULES,
    st.lists(st.tuples(st.sampled_from([*CALLS.values(), 450, 470]), st.lists(SMALL, min_size=6, max_size=6)), min_size=1, max_size=8),
)  # fmt: skip
def test_any_profile(
    default: str, rules: list[tuple[str, str, list[dict[str, Any]]]], calls: list[tuple[int, list[int]]]
) -> None:
    profile = {
        "defaultAction": f"SCMP_ACT_{default}",
        "syscalls": [{"names": [name], "action": f"SCMP_ACT_{word}", "args": args} for name, word, args in rules],
    }
    with tempfile.TemporaryDirectory() as directory:
        program = asyncio.run(SeccompCompiler(Path(directory)).compile(profile)).program
    for number, values in calls:
        expected = oracle(action(f"SCMP_ACT_{default}", None), rules, number, values)
        assert cbpf.run(program, AUDIT_X86_64, number, values)[0] == expected, (number, values)
