"""Compiling profiles, and keeping the programs."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Mapping
from pathlib import Path

import pytest

from tare.errors import FailedPrecondition, InvalidArgument
from tare.runtime import seccomp_compile
from tare.runtime.seccomp_compile import SeccompCompiler, filter_flags
from tare.runtime.seccomp_profile import default_profile
from tare.runtime.spec_process import ALL_CAPABILITIES, DEFAULT_CAPABILITIES

NO_MKDIR = {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}
SMALL = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [NO_MKDIR]}


def compiled(directory: Path, profile: Mapping[str, object]) -> bytes:
    return asyncio.run(SeccompCompiler(directory).compile(profile)).program


def test_programs_are_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "seccomp"
    program = compiled(directory, SMALL)
    assert len(program) % 8 == 0
    (kept,) = directory.iterdir()
    assert kept.suffix == ".bpf"
    before = kept.stat()
    monkeypatch.setattr(seccomp_compile, "compile_profile", None)
    assert compiled(directory, SMALL) == program
    assert kept.stat() == before


@pytest.mark.parametrize("damage", [b"", b"x" * 40, None])
def test_a_damaged_program_is_compiled_again(tmp_path: Path, damage: bytes | None) -> None:
    program = compiled(tmp_path, SMALL)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-8] if damage is None else damage)
    assert compiled(tmp_path, SMALL) == program
    assert kept.read_bytes().endswith(program)


def test_a_directory_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert compiled(tmp_path / "file/seccomp", SMALL)


def test_one_compilation_serves_all_that_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = seccomp_compile.compile_profile

    def counted(library: ctypes.CDLL, profile: Mapping[str, object]) -> bytes:
        calls.append(profile)
        return real(library, profile)

    async def all_at_once() -> None:
        compiler = SeccompCompiler(tmp_path)
        results = await asyncio.gather(*(compiler.compile(SMALL) for _ in range(5)))
        assert len({result.program for result in results}) == 1

    monkeypatch.setattr(seccomp_compile, "compile_profile", counted)
    asyncio.run(all_at_once())
    assert len(calls) == 1


def test_memory_is_bounded(tmp_path: Path) -> None:
    async def many() -> None:
        compiler = SeccompCompiler(tmp_path)
        for number in range(seccomp_compile.REMEMBERED + 3):
            await compiler.compile({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": number})
        assert len(compiler._programs) == seccomp_compile.REMEMBERED

    asyncio.run(many())


def test_the_default_profile_fits_the_kernel(tmp_path: Path) -> None:
    for capabilities in ((), DEFAULT_CAPABILITIES, ALL_CAPABILITIES):
        assert len(compiled(tmp_path, default_profile(capabilities))) // 8 < seccomp_compile.MOST_INSTRUCTIONS


def test_what_the_library_does_not_know_is_left_to_the_default(tmp_path: Path) -> None:
    more = {"names": ["no_such_call"], "action": "SCMP_ACT_KILL_PROCESS"}
    architectures = ["SCMP_ARCH_S390X", "SCMP_ARCH_MIPSEL64N32"]
    odd = {**SMALL, "syscalls": [NO_MKDIR, more, NO_MKDIR], "architectures": architectures}
    assert compiled(tmp_path, odd) == compiled(tmp_path, SMALL)


def test_flags() -> None:
    assert filter_flags({}) == 4
    assert filter_flags({"flags": []}) == 0
    assert filter_flags({"flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"]}) == 2
    with pytest.raises(InvalidArgument, match="NEW_LISTENER"):
        filter_flags({"flags": ["SECCOMP_FILTER_FLAG_NEW_LISTENER"]})


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="defaultAction"):
        compiled(tmp_path, {})
    with pytest.raises(InvalidArgument, match="SCMP_ACT_NOTIFY"):
        compiled(tmp_path, {"defaultAction": "SCMP_ACT_NOTIFY"})


def test_a_missing_library_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_name: str) -> None:
        raise OSError("cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(FailedPrecondition, match="apt install libseccomp2"):
        compiled(tmp_path, SMALL)
