"""Which filters are loaded before a process appears in the container: those that let pass all that is still to be done."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from tare.handlers import early
from tare.runtime.seccomp_compile import SeccompCompiler
from tare.runtime.seccomp_profile import default_profile
from tests.support import cbpf

MACHINE = os.uname().machine
ALLOW, LOG, REFUSE = "SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_ERRNO"
Json = dict[str, Any]


def compiled(directory: Path, profile: Json) -> bytes:
    """A profile as it is loaded."""
    return asyncio.run(SeccompCompiler(directory).compile(profile)).program


def refusing(name: str, action: str = REFUSE, **more: Any) -> Json:
    """Everything passes but this call."""
    return {"defaultAction": ALLOW, "syscalls": [{"names": [name], "action": action, **more}]}


@pytest.mark.parametrize("granted", [[], ["CAP_SYS_PTRACE"], ["CAP_SYS_ADMIN"]])
@pytest.mark.parametrize("confined", [True, False])
def test_the_default_profile_is_loaded_early(confined: bool, granted: list[str], tmp_path: Path) -> None:
    """With CAP_SYS_PTRACE above all: that is what it is for."""
    assert early.lets_through(compiled(tmp_path, default_profile(granted)), confined)


def test_an_answer_is_the_one_that_the_kernel_would_give(tmp_path: Path) -> None:
    """The oracle is the interpreter that the profiles themselves are tested by."""
    program = compiled(tmp_path, default_profile([]))
    lines = list(early.INSTRUCTION.iter_unpack(program))
    architecture = early.ARCHITECTURES[MACHINE]
    for number in range(500):
        for arguments in ((), (0x7E020000,), (early.CLONE_PARENT_PIDFD,), (40,), (0, 0x540E)):
            data = early.DATA.pack(number, architecture, 0, *arguments, *((0,) * (6 - len(arguments))))
            assert early.answer(lines, data) == cbpf.run(program, architecture, number, arguments)[0], number


@pytest.mark.parametrize("name", [*early.MEMORY, *early.TO_MAKE, "clone", "ioctl"])
def test_one_that_refuses_a_call_on_the_way_is_not(name: str, tmp_path: Path) -> None:
    for confined in (True, False):
        assert not early.lets_through(compiled(tmp_path, refusing(name)), confined)


@pytest.mark.parametrize("name", [*early.TO_BECOME, "prctl"])
def test_one_that_refuses_the_credentials_is_where_they_are_there(name: str, tmp_path: Path) -> None:
    program = compiled(tmp_path, refusing(name))
    assert early.lets_through(program, True) and not early.lets_through(program, False)


def test_arguments_are_looked_at(tmp_path: Path) -> None:
    def only(name: str, value: int) -> bytes:
        return compiled(tmp_path, refusing(name, args=[{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]))

    assert early.lets_through(only("clone", 17), False)
    assert not early.lets_through(only("clone", early.CLONE_PARENT_PIDFD), False)
    assert early.lets_through(only("prctl", 38), False) and not early.lets_through(only("prctl", 47), False)


def test_an_agents_answer_is_not_waited_for_and_a_log_is_no_refusal(tmp_path: Path) -> None:
    assert not early.lets_through(early.INSTRUCTION.pack(0x06, 0, 0, 0x7FC00000), True)  # SECCOMP_RET_USER_NOTIF
    assert early.lets_through(compiled(tmp_path, refusing("setsid", LOG)), True)


def test_what_cannot_be_told_is_a_refusal() -> None:
    allow = early.INSTRUCTION.pack(0x06, 0, 0, 0x7FFF0000)
    assert early.lets_through(allow, True)
    assert not early.lets_through(allow, True, "riscv64")
    assert not early.lets_through(early.INSTRUCTION.pack(0x04, 0, 0, 1) + allow, True)  # an addition
    assert not early.lets_through(early.INSTRUCTION.pack(0x05, 0, 0, 1) + allow, True)  # a jump over the end


def test_the_calls_are_numbered_as_the_kernel_does(tmp_path: Path) -> None:
    """libseccomp knows the numbers of this machine: what it refuses by name is refused by these."""
    architecture = early.ARCHITECTURES[MACHINE]
    for name, number in early.NUMBERS[MACHINE].items():
        answer, _ = cbpf.run(compiled(tmp_path, refusing(name)), architecture, number)
        assert answer >> 16 == 5, name
