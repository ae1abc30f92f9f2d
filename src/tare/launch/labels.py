"""Steps that confine a process by the kernel's security modules: an AppArmor profile, an SELinux context.

A module takes its orders by files of /proc/self/attr. What a container, or anyone who mounts beside its start, puts in their place must
never get these orders (CVE-2019-16884, CVE-2019-19921, CVE-2025-52881): so /proc is opened before any namespace is entered, it must be
a procfs at its root, and below it nothing is reached through another mount. What is asked for and is not there is an error.

Source: proc_pid_attr(5), apparmor(7), selinux(8).
"""

from __future__ import annotations

import os

from tare.launch import foreign as ctypes
from tare.launch import linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tare.launch.machine import Machine

PROC_SUPER_MAGIC = 0x9FA0
PROC_ROOT_INODE = 1
STATFS_SIZE = 120
APPARMOR_FILES = (b"self/attr/apparmor/exec", b"self/attr/exec")  # the first since Linux 5.8
SELINUX_EXEC, SELINUX_KEYS = b"self/attr/exec", b"self/attr/keycreate"
BELOW = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_XDEV | linux.RESOLVE_NO_MAGICLINKS
ENOENT, EINVAL, EOPNOTSUPP, ESTALE = 2, 22, 95, 116


def open_proc(machine: Machine, slot: int) -> None:
    """The node's /proc, verified to be the root of a procfs, for orders to be given by later."""
    machine.slots[slot] = proc_handle(b"/proc")


def proc_handle(path: bytes) -> int:
    """An O_PATH descriptor of what must be the root of a procfs."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if filesystem_type(fd) == PROC_SUPER_MAGIC and os.fstat(fd).st_ino == PROC_ROOT_INODE:
        return fd
    os.close(fd)
    raise OSError(ESTALE, "is not the root of a procfs", os.fsdecode(path))


def filesystem_type(fd: int) -> int:
    """f_type of fstatfs(2)."""
    buffer = ctypes.create_string_buffer(bytes(STATFS_SIZE))
    linux.check(linux.libc.fstatfs(ctypes.c_int(fd), buffer), "fstatfs")
    return int.from_bytes(buffer.raw[:8], "little")


def expect_apparmor(machine: Machine, profile: bytes, root: bytes = b"/") -> None:
    """Fail early where the kernel has no AppArmor, or does not know the profile. `root` is where the node's /sys is."""
    try:
        enabled = read(root + b"sys/module/apparmor/parameters/enabled")
    except FileNotFoundError:
        enabled = b"N"
    if not enabled.startswith(b"Y"):
        raise OSError(EOPNOTSUPP, "this node's kernel does not have AppArmor")
    try:
        loaded = read(root + b"sys/kernel/security/apparmor/profiles")
    except FileNotFoundError:
        return  # securityfs is not mounted: the kernel says it when the order is given
    known = {line.rpartition(b" (")[0] for line in loaded.splitlines()}
    elsewhere = profile.startswith(b":") or b"//&" in profile  # in another namespace, or several at once
    if profile != b"unconfined" and profile not in known and not elsewhere:
        raise OSError(ENOENT, "this node's kernel has no such profile loaded")


def expect_selinux(machine: Machine, context: bytes, root: bytes = b"/") -> None:
    """Fail early where SELinux is off, or its policy does not know the context: the policy is asked by the file `context`."""
    try:
        fd = os.open(root + b"sys/fs/selinux/context", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise OSError(EOPNOTSUPP, "SELinux is off on this node") from None
    try:
        os.write(fd, context + b"\0")
    except OSError as error:
        if error.errno != EINVAL:
            raise
        raise OSError(EINVAL, "this node's SELinux policy does not know the context") from error
    finally:
        os.close(fd)


def read(path: bytes) -> bytes:
    """All of a small file of the kernel's."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts = []
        while part := os.read(fd, 65536):
            parts.append(part)
        return b"".join(parts)
    finally:
        os.close(fd)


def apparmor(machine: Machine, slot: int, profile: bytes) -> None:
    """What this process executes next runs under the profile."""
    order(machine.slots[slot], APPARMOR_FILES, b"exec " + profile)


def selinux(machine: Machine, slot: int, context: bytes) -> None:
    """What this process executes next runs in the context."""
    order(machine.slots[slot], (SELINUX_EXEC,), context)


def key_context(machine: Machine, slot: int, context: bytes) -> None:
    """Keyrings that this process makes have the context; execve puts that back."""
    order(machine.slots[slot], (SELINUX_KEYS,), context)


def order(proc: int, names: tuple[bytes, ...], value: bytes) -> None:
    """Write to the first of these files that is there. Opened and written at once: the kernel takes the order of its opener alone."""
    for index, name in enumerate(names):
        try:
            fd = linux.openat2(proc, name, os.O_WRONLY, BELOW)
        except OSError as error:
            if error.errno == ENOENT and index + 1 < len(names):
                continue
            raise
        try:
            if filesystem_type(fd) != PROC_SUPER_MAGIC:
                raise OSError(ESTALE, "is not of a procfs")
            os.write(fd, value)
        except OSError as error:
            error.filename = "/proc/" + os.fsdecode(name)
            raise
        finally:
            os.close(fd)
        return


OPERATIONS: dict[str, Callable[..., None]] = {
    "open_proc": open_proc,
    "expect_apparmor": expect_apparmor,
    "expect_selinux": expect_selinux,
    "apparmor": apparmor,
    "selinux": selinux,
    "key_context": key_context,
}
