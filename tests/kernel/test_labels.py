"""AppArmor profiles and SELinux contexts, by what this kernel has.

Where it has a module, the container's process, an exec and a hook are found to be confined by it; where not, that is an error in plain
words, at creation. Whatever is mounted over /proc never gets the kernel's orders.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tare.handlers.builtin import StartFailed
from tare.handlers.volumes import joined
from tare.launch import labels, linux
from tare.launch.machine import Machine
from tests.support.launch import Launch, in_launch

pytestmark = pytest.mark.root

SLEEP = ["sleep", "1000"]
PROFILE = "tare-test-profile"
RULES = f"""
profile {PROFILE} flags=(attach_disconnected,mediate_deleted) {{
  file,
  capability,
  network,
  signal,
  deny /etc/secret r,
}}
"""
# Of a policy for containers, or of one that has none; the categories are what no other process here has.
DOMAINS = (
    "system_u:system_r:container_t:s0",
    "system_u:system_r:svirt_lxc_net_t:s0",
    "unconfined_u:unconfined_r:unconfined_t:s0",
)
FILE_TYPES = (
    "system_u:object_r:container_file_t:s0",
    "system_u:object_r:svirt_sandbox_file_t:s0",
    "system_u:object_r:tmp_t:s0",
)


def has_apparmor() -> bool:
    """Whether this kernel enforces AppArmor profiles."""
    file = Path("/sys/module/apparmor/parameters/enabled")
    return file.exists() and file.read_text().startswith("Y")


def has_selinux() -> bool:
    """Whether this kernel has an SELinux policy loaded."""
    return Path("/sys/fs/selinux/enforce").exists()


def known(contexts: Sequence[str]) -> str:
    """The first that this node's policy has; without a policy the first."""
    if not has_selinux():
        return contexts[0]
    for context in contexts:
        with contextlib.suppress(OSError):
            Path("/sys/fs/selinux/context").write_bytes(context.encode() + b"\0")
            return context
    raise AssertionError(f"this node's policy has none of {contexts}")


async def refusal(launch: Launch, **changes: Any) -> tuple[str, int, str]:
    """(step, errno, words) of a start that must fail."""
    with pytest.raises(StartFailed) as caught:
        await launch.start(SLEEP, **changes)
    return caught.value.step or "", caught.value.errno, caught.value.cause or ""


def test_apparmor(tmp_path: Path) -> None:
    in_launch(tmp_path, confined_by_apparmor if has_apparmor() else without_apparmor)


async def without_apparmor(launch: Launch) -> None:
    expected = (f"confine by AppArmor profile {PROFILE}", errno.EOPNOTSUPP, "this node's kernel does not have AppArmor")
    assert await refusal(launch, apparmorProfile=PROFILE) == expected
    box = await launch.start(SLEEP, apparmorProfile="")
    with pytest.raises(StartFailed, match="does not have AppArmor"):
        await launch.exec(box, ["true"], apparmorProfile=PROFILE)


async def confined_by_apparmor(launch: Launch) -> None:
    step, number, words = await refusal(launch, apparmorProfile="tare-test-unknown")
    assert (step, number) == (
        "confine by AppArmor profile tare-test-unknown",
        errno.ENOENT,
    ) and "no such profile" in words
    (launch.layer / "etc/secret").write_text("secret")
    hook = {"path": "/bin/sh", "args": ["sh", "-c", "cat /proc/self/attr/current > /tmp/hook"]}
    with loaded_profile():
        for confined in (True, False):
            box = await launch.start(
                SLEEP, apparmorProfile=PROFILE, noNewPrivileges=confined, hooks={"startContainer": [hook]}
            )
            assert current(box.process.pid) == f"{PROFILE} (enforce)"
            assert (box.upper / "tmp/hook").read_text().strip() == f"{PROFILE} (enforce)"
            result = await launch.exec(box, ["cat", "/etc/secret"], apparmorProfile=PROFILE, noNewPrivileges=confined)
            assert result.code != 0 and "ermission denied" in result.out
            free = await launch.exec(box, ["cat", "/etc/secret"])
            assert free.out == "secret"
            await launch.kill(box)
            await launch.handler.hooked.release(box.id)


@contextmanager
def loaded_profile() -> Iterator[None]:
    """The test's own profile in the kernel."""
    parser = shutil.which("apparmor_parser", path="/usr/sbin:/sbin:/usr/bin")
    assert parser is not None, "a kernel with AppArmor, and no apparmor_parser to load a profile with"
    subprocess.run([parser, "--replace"], input=RULES.encode(), check=True)
    try:
        yield
    finally:
        subprocess.run([parser, "--remove"], input=RULES.encode(), check=True)


def current(pid: int) -> str:
    """What the kernel says that confines a process."""
    return Path(f"/proc/{pid}/attr/current").read_text().rstrip("\0\n")


def test_selinux(tmp_path: Path) -> None:
    in_launch(tmp_path, confined_by_selinux if has_selinux() else without_selinux)


async def without_selinux(launch: Launch) -> None:
    words = "SELinux is off on this node"
    domain, files = DOMAINS[0], FILE_TYPES[0]
    expected = (f"apply process.selinuxLabel {domain}", errno.EOPNOTSUPP, words)
    assert await refusal(launch, selinuxLabel=domain) == expected
    expected = (f"apply linux.mountLabel {files}", errno.EOPNOTSUPP, words)
    assert await refusal(launch, linux={"mountLabel": files}) == expected
    box = await launch.start(SLEEP)
    with pytest.raises(StartFailed, match=words):
        await launch.exec(box, ["true"], selinuxLabel=domain)


async def confined_by_selinux(launch: Launch) -> None:
    domain, files = known(DOMAINS), known(FILE_TYPES) + ":c1,c2"
    # A policy may let nobody run a file of categories that he does not have.
    first, second = f"{domain}:c1,c2", f"{domain}:c1,c2,c4"
    step, number, words = await refusal(launch, selinuxLabel="no_u:such_r:context_t:s0")
    assert number == errno.EINVAL and "policy does not know the context" in words and "no_u" in step
    tmpfs = {"destination": "/scratch", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]}
    layers = []
    for name in ("upper", "lower"):
        (launch.base / name).mkdir()
        (launch.base / name / "file").touch()
        layers.append(str(launch.base / name))
    volumes = [
        {"destination": f"/{count}", "type": "overlay", "source": "overlay", "options": ["ro", joined(layers[:count])]}
        for count in (1, 2)
    ]
    mounts = [tmpfs, *volumes, {**volumes[0], "destination": "/file", "subPath": "file"}]
    wanted = {"mountLabel": files, "maskedPaths": ["/sys/firmware"]}
    box = await launch.start(SLEEP, selinuxLabel=first, mounts=mounts, linux=wanted)
    assert current(box.process.pid) == first
    root = f"/proc/{box.process.pid}/root"
    for path in ("", "/scratch", "/dev", "/dev/null", "/1", "/1/file", "/2/file", "/file", "/sys/firmware"):
        assert os.getxattr(root + path, "security.selinux").rstrip(b"\0").decode() == files, path
    result = await launch.exec(box, ["cat", "/proc/self/attr/current"], selinuxLabel=second)
    assert result.out.rstrip("\0\n") == second


def in_child(function: Callable[[], int]) -> int:
    """The exit code of a process in a mount namespace of its own: a function's result."""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            linux.unshare(linux.CLONE_NEWNS)
            linux.mount(None, b"/", None, linux.MS_REC | linux.MS_PRIVATE)
            code = function()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def number_of_order() -> int:
    """The errno of an order by the /proc of now; 0 where it is taken."""
    machine = Machine.__new__(Machine)
    machine.slots = {}
    try:
        labels.open_proc(machine, 5)
        labels.selinux(machine, 5, b"u:r:t:s0")
    except OSError as error:
        return error.errno or 255
    return 0


def test_the_order_reaches_the_kernel_and_nobody_else(tmp_path: Path) -> None:
    """A kernel without a module to take it says so itself; a file over the kernel's, or another file system for /proc, is not written to."""
    trap = tmp_path / "trap"
    (trap / "self/attr").mkdir(parents=True)
    (trap / "self/attr/exec").write_text("")

    def over_the_file() -> int:
        linux.mount(bytes(trap / "self/attr/exec"), b"/proc/self/attr/exec", None, linux.MS_BIND)
        return number_of_order()

    def over_the_directory() -> int:
        linux.mount(bytes(trap / "self/attr"), b"/proc/self/attr", None, linux.MS_BIND)
        return number_of_order()

    def over_proc() -> int:
        linux.mount(bytes(trap), b"/proc", None, linux.MS_BIND)
        return number_of_order()

    def another_part_of_proc() -> int:
        linux.mount(b"/proc/sys", b"/proc", None, linux.MS_BIND)
        return number_of_order()

    assert in_child(number_of_order) == errno.EINVAL  # no module, or none that knows such a context
    assert in_child(over_the_file) == in_child(over_the_directory) == errno.EXDEV
    assert in_child(over_proc) == in_child(another_part_of_proc) == errno.ESTALE
    assert (trap / "self/attr/exec").read_text() == ""
