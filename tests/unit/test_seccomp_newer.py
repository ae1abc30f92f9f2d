"""Calls that are newer than libseccomp or than a profile: what the compiled program answers, by an interpreter."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tare.errors import InvalidArgument
from tare.runtime.seccomp_compile import SeccompCompiler, filter_flags
from tare.runtime.seccomp_newer import (
    AUDIT_ARM,
    AUDIT_X86_64,
    COMMON,
    INSTRUCTION,
    NOT_THERE,
    X32,
    X32_BIT,
    X86_64_ALONE,
    Table,
    number_of,
    prologue,
)
from tare.runtime.seccomp_profile import check_profile, default_profile, listener
from tare.runtime.spec_process import ALL_CAPABILITIES, DEFAULT_CAPABILITIES
from tests.support import cbpf

AUDIT_X86 = 0x40000003
ALLOW, EPERM, KILL, PASSED_ON = 0x7FFF0000, 0x00050001, 0, 0x1234
PROGRAM = INSTRUCTION.pack(cbpf.RETURN, 0, 0, PASSED_ON)
X86_64 = pytest.mark.skipif("__import__('os').uname().machine != 'x86_64'", reason="numbers are x86_64's")


def answer(tables: list[Table], architecture: int, number: int, *, absent: bool = True) -> int:
    return cbpf.run(prologue(tables, absent=absent) + PROGRAM, architecture, number)[0]


def test_each_architecture_has_its_own_numbers() -> None:
    tables = [
        Table(token=AUDIT_X86_64, highest=334, actions={462: ALLOW, 335: EPERM}),
        Table(token=AUDIT_X86, highest=400),
        Table(token=X32, highest=X32_BIT | 547, actions={X32_BIT | 462: KILL}),
        Table(token=AUDIT_ARM, highest=441),
    ]
    tables[0].name(462)
    expected = {
        (AUDIT_X86_64, 0): PASSED_ON,
        (AUDIT_X86_64, 334): PASSED_ON,
        (AUDIT_X86_64, 335): EPERM,
        (AUDIT_X86_64, 400): PASSED_ON,
        (AUDIT_X86_64, 462): ALLOW,
        (AUDIT_X86_64, 463): NOT_THERE,
        (AUDIT_X86_64, X32_BIT - 1): NOT_THERE,
        (AUDIT_X86_64, X32_BIT): PASSED_ON,
        (AUDIT_X86_64, X32_BIT | 462): KILL,
        (AUDIT_X86_64, X32_BIT | 548): NOT_THERE,
        (AUDIT_X86_64, 0xFFFFFFFF): PASSED_ON,
        (AUDIT_X86, 400): PASSED_ON,
        (AUDIT_X86, 401): NOT_THERE,
        (AUDIT_X86, 462): NOT_THERE,
        (AUDIT_ARM, 441): PASSED_ON,
        (AUDIT_ARM, 442): NOT_THERE,
        (AUDIT_ARM, 0x0F0002): PASSED_ON,
        (0xC00000B7, 5): PASSED_ON,
        (0xC00000B7, 5000): PASSED_ON,
    }
    assert {key: answer(tables, *key) for key in expected} == expected
    assert answer(tables, AUDIT_X86_64, 463, absent=False) == PASSED_ON
    assert answer(tables, AUDIT_X86_64, 462, absent=False) == ALLOW


def test_where_there_is_nothing_to_say() -> None:
    assert prologue([], absent=True) == b""
    assert prologue([Table(token=AUDIT_X86_64)], absent=True) == b""
    assert prologue([Table(token=AUDIT_X86_64, highest=5)], absent=False) == b""


def test_numbers_that_do_not_count_upwards_are_passed_over() -> None:
    table = Table(token=AUDIT_ARM)
    for number in (5, 0x0F0005, 3, -1):
        table.name(number)
    assert table.highest == 5


def test_the_newer_calls_are_numbered_without_a_gap_and_alike() -> None:
    assert sorted(COMMON.values()) == list(range(451, 471))
    assert number_of("mseal", AUDIT_X86_64) == number_of("mseal", AUDIT_X86) == 462
    assert number_of("mseal", X32) == X32_BIT | 462
    assert number_of("uretprobe", AUDIT_X86_64) == X86_64_ALONE["uretprobe"]
    assert number_of("uretprobe", AUDIT_X86) is None
    assert number_of("read", AUDIT_X86_64) is None


def compiled(directory: Path, profile: dict[str, Any]) -> bytes:
    return asyncio.run(SeccompCompiler(directory).compile(profile)).program


def rule(action: str, *names: str, **more: Any) -> dict[str, Any]:
    return {"names": list(names), "action": f"SCMP_ACT_{action}", **more}


ARCHITECTURES = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]


@X86_64
@pytest.mark.parametrize(
    ("default", "newer", "unlisted", "listed"),
    [
        ({"defaultAction": "SCMP_ACT_ERRNO"}, NOT_THERE, EPERM, ALLOW),
        ({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38}, NOT_THERE, NOT_THERE, ALLOW),
        ({"defaultAction": "SCMP_ACT_KILL_PROCESS"}, NOT_THERE, 0x80000000, ALLOW),
        ({"defaultAction": "SCMP_ACT_TRAP"}, NOT_THERE, 0x00030000, ALLOW),
        ({"defaultAction": "SCMP_ACT_LOG"}, 0x7FFC0000, 0x7FFC0000, ALLOW),
        ({"defaultAction": "SCMP_ACT_TRACE", "defaultErrnoRet": 7}, 0x7FF00007, 0x7FF00007, ALLOW),
    ],
)
def test_a_list_of_what_is_allowed(
    tmp_path: Path, default: dict[str, Any], newer: int, unlisted: int, listed: int
) -> None:
    profile = {**default, "architectures": ARCHITECTURES, "syscalls": [rule("ALLOW", "read", "mseal", "cachestat")]}
    program = compiled(tmp_path, profile)
    for architecture, bit, read in ((AUDIT_X86_64, 0, 0), (AUDIT_X86, 0, 3), (AUDIT_X86_64, X32_BIT, 0)):
        found = {number: cbpf.run(program, architecture, bit | number)[0] for number in (read, 450, 451, 461, 462, 463)}
        assert found == {read: listed, 450: unlisted, 451: listed, 461: unlisted, 462: listed, 463: newer}


@X86_64
def test_a_list_of_what_is_denied_holds_for_calls_that_libseccomp_does_not_know(tmp_path: Path) -> None:
    condition = [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]
    denied = [rule("ERRNO", "mseal", "statmount", errnoRet=5), rule("ERRNO", "listmount", args=condition)]
    program = compiled(tmp_path, {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": denied})
    expected = {462: 0x00050005, 457: 0x00050005, 458: NOT_THERE, 463: ALLOW, 0: ALLOW}
    assert {number: cbpf.run(program, AUDIT_X86_64, number)[0] for number in expected} == expected


@X86_64
def test_a_condition_on_a_newer_call_is_not_guessed(tmp_path: Path) -> None:
    condition = [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]
    allowed = [rule("ALLOW", "read"), rule("ALLOW", "mseal", args=condition)]
    program = compiled(tmp_path, {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": allowed})
    assert [cbpf.run(program, AUDIT_X86_64, number, [1])[0] for number in (0, 462, 463)] == [ALLOW, EPERM, NOT_THERE]


@X86_64
def test_without_the_other_architectures_their_calls_are_libseccomps_to_answer(tmp_path: Path) -> None:
    program = compiled(tmp_path, {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [rule("ALLOW", "read")]})
    assert cbpf.run(program, AUDIT_X86, 3)[0] == cbpf.run(program, AUDIT_X86_64, X32_BIT)[0] == KILL


@X86_64
def test_the_default_profile(tmp_path: Path) -> None:
    plain = compiled(tmp_path, default_profile(DEFAULT_CAPABILITIES))
    mighty = compiled(tmp_path, default_profile(ALL_CAPABILITIES))
    for architecture, personality, clone3 in ((AUDIT_X86_64, 135, 435), (AUDIT_X86, 136, 435)):
        for number, first, second in (
            (462, ALLOW, ALLOW),
            (457, EPERM, ALLOW),
            (467, EPERM, ALLOW),
            (470, NOT_THERE, NOT_THERE),
            (999, NOT_THERE, NOT_THERE),
            (clone3, NOT_THERE, ALLOW),
        ):
            assert cbpf.run(plain, architecture, number)[0] == first
            assert cbpf.run(mighty, architecture, number)[0] == second
        for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF):
            assert cbpf.run(plain, architecture, personality, [value])[0] == ALLOW
        for value in (1, 9, 0x40000, 0x60008, 0x0400000, 0x8000000, 0x7FFFFFFF, 0x0FFFFFF7):
            assert cbpf.run(plain, architecture, personality, [value])[0] == EPERM


@X86_64
def test_what_is_common_costs_few_instructions_more(tmp_path: Path) -> None:
    profile = {
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ARCHITECTURES,
        "syscalls": [rule("ALLOW", "read", "mseal")],
    }
    with_newer = cbpf.run(compiled(tmp_path, profile), AUDIT_X86_64, 0)[1]
    profile["defaultAction"], profile["syscalls"] = "SCMP_ACT_LOG", [rule("ALLOW", "read")]
    assert with_newer - cbpf.run(compiled(tmp_path, profile), AUDIT_X86_64, 0)[1] <= 6


NOTIFY = {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/agent", "syscalls": [rule("NOTIFY", "mkdir")]}


def test_who_listens() -> None:
    check_profile("x", NOTIFY)
    assert listener(NOTIFY) == ("/run/agent", "")
    assert listener({**NOTIFY, "listenerMetadata": "m"}) == ("/run/agent", "m")
    assert listener({**NOTIFY, "syscalls": []}) is None
    assert filter_flags(NOTIFY) == 8 | 4
    killable = ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]
    assert filter_flags({**NOTIFY, "flags": killable}) == 8 | 32
    assert filter_flags({"flags": killable}) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"listenerPath": ""}, "listenerPath is not an absolute path"),
        ({"listenerPath": None}, "listenerPath is not an absolute path"),
        ({"listenerPath": 5}, "listenerPath is not a string"),
        ({"listenerPath": None, "listenerMetadata": "x", "syscalls": []}, "listenerMetadata is set without"),
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "defaultAction is SCMP_ACT_NOTIFY"),
        ({"syscalls": [rule("ALLOW", "read", errnoRet=1)]}, r"syscalls\[0\].errnoRet is set, and SCMP_ACT_ALLOW"),
        ({"defaultErrnoRet": 1}, "defaultErrnoRet is set, and SCMP_ACT_ALLOW carries no number"),
        ({"architectures": ["SCMP_ARCH_NOPE"]}, r"architectures\[0\] 'SCMP_ARCH_NOPE' is none of"),
        ({"flags": "x"}, "flags is not a list"),
    ],
)
def test_what_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        check_profile("x", {**NOTIFY, **change})
