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
from tare.runtime.seccomp_profile import SAFE, default_profile
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
    "a personality without randomisation": ((135, 0x0040000), errno.EPERM),
    "mseal": ((462, 0, 0, 0), 0),
    "statmount, which takes CAP_SYS_ADMIN": ((457, 0, 0, 0, 0), errno.EPERM),
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


ACTED = """
import signal
def child(number):
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGSYS, lambda *_: os._exit(77))
        os._exit(100 + call(number, 0, 0, 0))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print([child(number) for number in (162, 462)])
"""


@X86
@pytest.mark.parametrize(
    ("action", "value", "expected"),
    [
        ("ALLOW", None, 100),
        ("LOG", None, 100),
        ("ERRNO", None, 100 + errno.EPERM),
        ("ERRNO", 5, 105),
        ("TRACE", 7, 100 + errno.ENOSYS),
        ("TRAP", None, 77),
        ("KILL", None, -31),
        ("KILL_THREAD", None, -31),
        ("KILL_PROCESS", None, -31),
    ],
)
def test_every_action_for_old_calls_and_for_those_that_libseccomp_does_not_know(
    tmp_path: Path, action: str, value: int | None, expected: int
) -> None:
    """sync(2) and mseal(2), neither of which fails without a filter. Nobody traces."""
    default = "SCMP_ACT_LOG" if action == "ALLOW" else "SCMP_ACT_ALLOW"
    rule = {"names": ["sync", "mseal"], "action": f"SCMP_ACT_{action}", "errnoRet": value}
    assert run(tmp_path, {"defaultAction": default, "syscalls": [rule]}, ACTED) == f"[{expected}, {expected}]\n"


@X86
@pytest.mark.parametrize(
    ("default", "expected"),
    [("SCMP_ACT_ERRNO", [0, 1, 38]), ("SCMP_ACT_TRAP", [0, 77, 38]), ("SCMP_ACT_KILL_PROCESS", [0, -31, 38])],
)
def test_calls_newer_than_a_list_of_what_is_allowed_are_not_there(
    tmp_path: Path, default: str, expected: list[int]
) -> None:
    """Of getpid, sync, and a call of the future; names that nobody knows are passed over."""
    names = {*SAFE, "clone", "no_such_call"} - {"sync"}
    profile = {"defaultAction": default, "syscalls": [{"names": sorted(names), "action": "SCMP_ACT_ALLOW"}]}
    code = """
import signal
def child(number):
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGSYS, lambda *_: os._exit(77))
        os._exit(call(number))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
print([child(number) for number in (39, 162, 500)])
"""
    assert run(tmp_path, profile, code) == f"{expected}\n"


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["SECCOMP_FILTER_FLAG_LOG"],
        ["SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
        ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
    ],
)
def test_flags_are_taken_by_the_kernel(tmp_path: Path, flags: list[str]) -> None:
    rule = {"names": ["sync"], "action": "SCMP_ACT_ERRNO"}
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "flags": flags, "syscalls": [rule]}
    code = "linux.libc.sync()\nprint('loaded')"
    assert run(tmp_path, profile, code) == "loaded\n"


LISTEN = """
import array, fcntl, socket, struct
ours, theirs = socket.socketpair()
pid = os.fork()
if pid == 0:
    code = ctypes.create_string_buffer(open(sys.argv[1], "rb").read())
    fprog = linux.SockFprog((len(code) - 1) // 8, ctypes.addressof(code))
    long = ctypes.c_long
    fd = linux.syscall(long(317), long(1), long(int(sys.argv[2])), ctypes.byref(fprog))
    theirs.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    os._exit(call(462, 5))
_, control, _, _ = ours.recvmsg(1, 64)
listener = struct.unpack("i", control[0][2][:4])[0]
request = bytearray(80)
fcntl.ioctl(listener, 0xC0502100, request)
number, (caller, *_) = struct.unpack_from("<i", request, 16)[0], struct.unpack_from("<6Q", request, 32)
print(number, caller)
fcntl.ioctl(listener, 0xC0182101, struct.pack("<QqiI", struct.unpack_from("<Q", request)[0], 0, -9, 0))
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@X86
@pytest.mark.parametrize("flags", [None, ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]])
def test_a_listener_answers(tmp_path: Path, flags: list[str] | None) -> None:
    """mseal(5) is seen by the parent, who has it fail with EBADF."""
    rule = {"names": ["mseal", "mkdir"], "action": "SCMP_ACT_NOTIFY"}
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": "/run/agent",
        "flags": flags,
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [rule],
    }
    filtered = asyncio.run(SeccompCompiler(tmp_path).compile(profile))
    file = tmp_path / "program"
    file.write_bytes(filtered.program)
    script = "import ctypes, os, sys\nfrom tare.launch import linux\n" + SCRIPT.partition("def call")[1]
    script += SCRIPT.partition("def call")[2] + LISTEN
    command = [sys.executable, "-c", script, str(file), str(filtered.flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == f"462 5\n{errno.EBADF}\n", done.stderr
