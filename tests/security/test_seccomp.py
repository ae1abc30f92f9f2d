"""System calls made for real in containers: under RuntimeDefault, and under a profile that is older than the kernel and its C library."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tare.handlers.compile import Filter
from tare.runtime.seccomp_compile import SeccompCompiler
from tare.runtime.seccomp_profile import default_profile
from tare.runtime.spec_process import DEFAULT_CAPABILITIES
from tests.support.launch import Launch, in_launch, line, python_mounts

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of the calls are x86_64's"),
]

PYTHON = ["/usr/bin/python3", "-I", "-c"]
FUTURE = 1000
GETPID, MOUNT, CLONE, UNSHARE, KEYCTL, BPF, OPENAT2, CLONE3, IO_URING_SETUP, STATMOUNT, MSEAL = (
    39, 165, 56, 272, 250, 321, 437, 435, 425, 457, 462,
)  # fmt: skip
NEW_USER = 0x10000000 | 17
FIRST_COMMON = 424  # the first number that is alike on all architectures: pidfd_send_signal
NEWER = (OPENAT2, CLONE3, IO_URING_SETUP, STATMOUNT, MSEAL, FUTURE)

ASK = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    ctypes.set_errno(0)
    libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(value) for value in arguments))
    return ctypes.get_errno()
print([call(*map(int, word.split(","))) for word in sys.argv[1:]])
"""
# What a C library does that has clone3, and falls back where it is told that there is none.
LIVE = """
import os, subprocess, threading
threads = [threading.Thread(target=os.getpid) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(subprocess.check_output(["/usr/bin/id", "-u"], text=True).strip(), os.posix_spawn("/usr/bin/true", ["true"], {}) > 0)
"""


def compiled(directory: Path, profile: dict[str, Any]) -> Filter:
    return asyncio.run(SeccompCompiler(directory / "programs").compile(profile))


def asked(*calls: tuple[int, ...]) -> list[str]:
    """A program that makes these calls and prints the errno of each, 0 where there was none."""
    return [*PYTHON, ASK, *(",".join(map(str, call)) for call in calls)]


def sets(*names: str) -> dict[str, Any]:
    kinds = ("bounding", "effective", "permitted")
    return {"capabilities": {kind: list(names) for kind in kinds}}


async def both(launch: Launch, command: list[str], **changes: Any) -> list[str]:
    """What a container says, and what an exec in another says."""
    started = await launch.run(command, mounts=python_mounts(), **changes)
    box = await launch.start(["sh", "-c", "echo up; exec sleep 1000"], mounts=python_mounts(), **changes)
    assert await line(box) == "up"
    seccomp = {"defaultAction": "SCMP_ACT_ALLOW"}  # which filter is meant is the harness's to know
    executed = await launch.exec(box, command, seccomp=seccomp, **changes)
    assert started.code == executed.code == 0, (started, executed)
    return [started.out.strip(), executed.out.strip()]


CALLS = {
    (GETPID,): 0,
    (FUTURE,): errno.ENOSYS,
    (CLONE3, 0, 0): errno.ENOSYS,
    (CLONE, NEW_USER, 0, 0, 0, 0): errno.EPERM,
    (UNSHARE, NEW_USER & ~17): errno.EPERM,
    (MOUNT, 0, 0, 0, 0, 0): errno.EPERM,
    (BPF, 0, 0, 0): errno.EPERM,
    (KEYCTL, 0, 0, 0, 0, 0): errno.EPERM,
    (IO_URING_SETUP, 1, 0): errno.EPERM,
    (STATMOUNT, 0, 0, 0, 0): errno.EPERM,
    (MSEAL, 0, 0, 0): 0,
    (OPENAT2, 0, 0, 0, 0): errno.EINVAL,
}


@pytest.mark.parametrize("no_new_privileges", [True, False])
@pytest.mark.parametrize("user", [{"uid": 0, "gid": 0}, {"uid": 1000, "gid": 1000}], ids=["root", "user"])
def test_the_default_profile_in_a_container(tmp_path: Path, user: dict[str, Any], no_new_privileges: bool) -> None:
    """What is newer than the profile is not there; clone3, whose flags a filter cannot see, is not there either."""
    changes = {"user": user, "noNewPrivileges": no_new_privileges, **sets(*DEFAULT_CAPABILITIES)}

    async def body(launch: Launch) -> None:
        for said in await both(launch, asked(*CALLS), **changes):
            assert dict(zip(CALLS, map(int, said.strip("[]").split(", ")), strict=True)) == CALLS
        assert await both(launch, [*PYTHON, LIVE], **changes) == [f"{user['uid']} True"] * 2

    in_launch(tmp_path, body, filter=compiled(tmp_path, default_profile(DEFAULT_CAPABILITIES)))


def test_with_cap_sys_admin_clone3_is_there(tmp_path: Path) -> None:
    """So it answers for itself: a structure of no size is EINVAL."""
    names = {*DEFAULT_CAPABILITIES, "CAP_SYS_ADMIN"}

    async def body(launch: Launch) -> None:
        said = await both(launch, asked((CLONE3, 0, 0), (FUTURE,), (UNSHARE, 0x4000000)), **sets(*names))
        assert said == [f"[{errno.EINVAL}, {errno.ENOSYS}, 0]"] * 2

    in_launch(tmp_path, body, filter=compiled(tmp_path, default_profile(names)))


@pytest.mark.parametrize("default", ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"])
def test_a_profile_that_is_older_than_the_kernel(tmp_path: Path, default: str) -> None:
    """It names nothing from Linux 5.1 on: a program that tries is told to fall back, not that it may not, and it is not killed."""
    resolve = ctypes.CDLL("libseccomp.so.2").seccomp_syscall_resolve_name
    rules = default_profile(DEFAULT_CAPABILITIES)["syscalls"]
    names = {name for rule in rules if rule["action"] == "SCMP_ACT_ALLOW" for name in rule["names"]}
    allowed = sorted(name for name in names if 0 <= resolve(name.encode()) < FIRST_COMMON)
    profile = {"defaultAction": default, "syscalls": [{"names": allowed, "action": "SCMP_ACT_ALLOW"}]}

    async def body(launch: Launch) -> None:
        said = await both(launch, asked((GETPID,), *((number, 0, 0, 0, 0) for number in NEWER)))
        assert said == [str([0, *(errno.ENOSYS for _ in NEWER)])] * 2
        assert await both(launch, [*PYTHON, LIVE]) == ["0 True"] * 2

    in_launch(tmp_path, body, filter=compiled(tmp_path, profile))
