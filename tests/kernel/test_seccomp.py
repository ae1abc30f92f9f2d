"""Compiled filters, loaded into a process: what they answer."""

from __future__ import annotations

import asyncio
import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tare.runtime.seccomp_compile import SeccompCompiler
from tare.runtime.seccomp_profile import default_profile
from tare.runtime.spec_process import DEFAULT_CAPABILITIES

pytestmark = pytest.mark.root

SCRIPT = """
import ctypes, os, sys
from tare.launch import linux
program = linux.SeccompProgram(open(sys.argv[1], "rb").read(), int(sys.argv[2]))
if program.load():
    sys.exit(os.strerror(ctypes.get_errno()))
def call(number, *arguments):
    result = linux.libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) for a in arguments))
    return ctypes.get_errno() if result == -1 else 0
"""
X86 = pytest.mark.skipif("__import__('os').uname().machine != 'x86_64'", reason="numbers are x86_64's")


def run(directory: Path, profile: dict[str, Any], code: str) -> str:
    """What a process prints that has loaded the filter."""
    filtered = asyncio.run(SeccompCompiler(directory).compile(profile))
    file = directory / "program"
    file.write_bytes(filtered.program)
    command = [sys.executable, "-c", SCRIPT + code, str(file), str(filtered.flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


CALLS = {
    "getpid": ((39,), 0),
    "mount": ((165, 0, 0, 0, 0, 0), errno.EPERM),
    "unshare user": ((272, 0x10000000), errno.EPERM),
    "clone with a mount namespace": ((56, 0x20000 | 17, 0, 0, 0, 0), errno.EPERM),
    "clone with a user namespace": ((56, 0x10000000 | 17, 0, 0, 0, 0), errno.EPERM),
    "clone3": ((435, 0, 0), errno.ENOSYS),
    "keyctl": ((250, 0, 0, 0, 0, 0), errno.EPERM),
    "io_uring_setup": ((425, 1, 0), errno.EPERM),
    "a call of the future": ((1000,), errno.ENOSYS),
    "a unix socket": ((41, 1, 1, 0), 0),
    "a vsock socket": ((41, 40, 1, 0), errno.EAFNOSUPPORT),
    "a vsock socket with a bit above": ((41, 1 << 32 | 40, 1, 0), errno.EAFNOSUPPORT),
    "the current personality": ((135, 0xFFFFFFFF), 0),
    "a personality without randomisation": ((135, 0x0040000), errno.ENOSYS),
}


@X86
def test_the_default_profile(tmp_path: Path) -> None:
    code = f"for name, arguments in {[(name, call) for name, (call, _) in CALLS.items()]!r}: print(name, call(*arguments), sep=':')"
    printed = run(tmp_path, default_profile(DEFAULT_CAPABILITIES), code)
    found = {name: int(number) for name, _, number in (line.partition(":") for line in printed.splitlines())}
    assert found == {name: number for name, (_, number) in CALLS.items()}


@X86
def test_with_sys_admin_namespaces_can_be_made(tmp_path: Path) -> None:
    profile = default_profile({*DEFAULT_CAPABILITIES, "CAP_SYS_ADMIN"})
    assert run(tmp_path, profile, "print(call(272, 0x4000000), call(435, 0, 0))") == f"0 {errno.EINVAL}\n"


def test_a_program_can_drop_its_rights_and_start_another_under_the_default_profile(tmp_path: Path) -> None:
    """What init does after the filter is loaded, and what a shell does with threads, pipes and children."""
    thread = "import threading, socket; t = threading.Thread(target=socket.socket); t.start(); t.join()"
    shell = f"echo $(id -u | cat) && ls / > /dev/null && python3 -c '{thread}'"
    code = f"""
os.setgroups([5]); os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)
linux.capset(0, 0, 0); linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
os.execv("/bin/sh", ["sh", "-c", {shell!r}])
"""
    assert run(tmp_path, default_profile(DEFAULT_CAPABILITIES), code) == "1000\n"


@X86
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], [5, 5, 5]),
        ([{"index": 0, "value": 10, "op": "SCMP_CMP_EQ"}], [0, 5, 0]),
        ([{"index": 0, "value": 10, "op": "SCMP_CMP_NE"}], [5, 0, 5]),
        ([{"index": 0, "value": 10, "op": "SCMP_CMP_GT"}], [0, 0, 5]),
        ([{"index": 0, "value": 10, "op": "SCMP_CMP_LE"}], [5, 5, 0]),
        ([{"index": 0, "value": 3, "valueTwo": 2, "op": "SCMP_CMP_MASKED_EQ"}], [0, 5, 0]),
        ([{"index": 0, "value": 9, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 1, "op": "SCMP_CMP_EQ"}], [0, 0, 0]),
        ([{"index": 0, "value": 9, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 11, "op": "SCMP_CMP_EQ"}], [5, 0, 5]),
    ],
)
def test_conditions_on_arguments(tmp_path: Path, args: list[dict[str, Any]], expected: list[int]) -> None:
    """alarm(2) takes any number, and does not fail: 9, 10, 11."""
    rule = {"names": ["alarm"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5, "args": args}
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [rule],
    }
    code = """
def alarm(seconds):
    ctypes.set_errno(0)
    linux.libc.syscall(ctypes.c_long(37), ctypes.c_ulong(seconds), ctypes.c_ulong(0))
    return ctypes.get_errno()
print([alarm(number) for number in (9, 10, 11)])
"""
    assert run(tmp_path, profile, code) == f"{expected}\n"


def test_killing(tmp_path: Path) -> None:
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["sync"], "action": "SCMP_ACT_KILL_PROCESS"}]}
    code = (
        "pid = os.fork()\nif not pid: os.sync(); os._exit(0)\nprint(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert run(tmp_path, profile, code) == "-31\n"
