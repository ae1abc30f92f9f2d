"""A program that is made smaller answers every call as it did."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tare.runtime import seccomp_compile
from tare.runtime.seccomp_compile import SeccompCompiler
from tare.runtime.seccomp_newer import AUDIT_X86_64, INSTRUCTION
from tare.runtime.seccomp_profile import default_profile
from tare.runtime.seccomp_shrink import AT_LEAST, EQUAL, JUMP, LOAD, RETURN, shrunk
from tare.runtime.spec_process import DEFAULT_CAPABILITIES
from tests.support import cbpf

AUDIT_X86, OTHER = 0x40000003, 0x1234
ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x00050001, 0x00050026
NUMBER, ARCHITECTURE, ARGUMENT = 0, 4, 16
ANY_BIT, STORE = 0x45, 0x02
LARGEST = (1 << 32) - 1


def program(*lines: tuple[int, int, int, int]) -> bytes:
    return b"".join(INSTRUCTION.pack(*line) for line in lines)


def same(first: bytes, second: bytes, numbers: list[int], arguments: list[list[int]]) -> None:
    """Both answer alike."""
    for architecture in (AUDIT_X86_64, AUDIT_X86, OTHER):
        for number in numbers:
            for given in arguments:
                answers = [cbpf.run(item, architecture, number, given)[0] for item in (first, second)]
                assert answers[0] == answers[1], (hex(architecture), number, given, answers)


@pytest.mark.skipif("__import__('os').uname().machine != 'x86_64'", reason="numbers are x86_64's")
@pytest.mark.parametrize("capabilities", [DEFAULT_CAPABILITIES, ("CAP_SYS_ADMIN",), ()])
def test_the_default_profile(capabilities: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two thirds of what libseccomp makes of it, and quicker through."""
    profile = default_profile(list(capabilities))
    small = asyncio.run(SeccompCompiler(tmp_path / "small").compile(profile)).program
    monkeypatch.setattr(seccomp_compile, "shrunk", lambda program: program)
    whole = asyncio.run(SeccompCompiler(tmp_path / "whole").compile(profile)).program
    assert len(small) * 3 <= len(whole) * 2
    numbers = [*range(600), *range(1 << 30, (1 << 30) + 600), 1 << 31, LARGEST]
    flags = [0, 0x20000, 0x7E020000, 8, 0x20008, LARGEST, 1 << 32 | 8, 40, 16]
    same(whole, small, numbers, [[value, value, value] for value in flags])
    steps = [max(cbpf.run(item, AUDIT_X86_64, number)[1] for number in range(460)) for item in (small, whole)]
    assert steps[0] <= steps[1]


def test_more_ranges_than_a_condition_leads_past() -> None:
    """Every second number has another answer, and an argument counts for some."""
    lines = [(LOAD, 0, 0, ARCHITECTURE), (EQUAL, 1, 0, AUDIT_X86_64), (RETURN, 0, 0, ENOSYS), (LOAD, 0, 0, NUMBER)]
    for number in range(0, 1200, 2):
        lines += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    lines += [(AT_LEAST, 1, 0, 1300), (RETURN, 0, 0, EPERM)]
    lines += [(LOAD, 0, 0, ARGUMENT), (EQUAL, 0, 1, 7), (RETURN, 0, 0, ALLOW), (RETURN, 0, 0, EPERM)]
    # As long as it is, since nothing of it is to be had for less: what is padded here is what goes.
    padded = program(*lines[:4], *((JUMP, 0, 0, 0),) * 2000, *lines[4:])
    small = shrunk(padded)
    assert len(small) < len(padded)
    same(padded, small, [*range(1310), LARGEST], [[7], [8]])


@pytest.mark.parametrize(
    "odd",
    [
        [(LOAD, 0, 0, NUMBER), (ANY_BIT, 0, 1, 1), (RETURN, 0, 0, ALLOW)],
        [(LOAD, 0, 0, NUMBER), (STORE, 0, 0, 3)],
        [(LOAD, 0, 0, ARCHITECTURE), (AT_LEAST, 0, 1, 5), (RETURN, 0, 0, ALLOW)],
        [(LOAD, 0, 0, ARGUMENT), (EQUAL, 0, 3, 5), (LOAD, 0, 0, NUMBER), (EQUAL, 0, 1, 9), (RETURN, 0, 0, ALLOW)],
    ],
)
def test_what_is_of_another_kind_stays(odd: list[Any]) -> None:
    """Of the last one only the part that comes after an argument has been looked at."""
    whole = program(*((JUMP, 0, 0, 0),) * 50, *odd, (RETURN, 0, 0, EPERM))
    assert shrunk(whole) == whole


def test_what_would_be_longer_stays() -> None:
    whole = program((RETURN, 0, 0, ALLOW))
    assert shrunk(whole) == whole
