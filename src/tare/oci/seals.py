"""This interpreter, run from where nothing can overwrite it.

Until its exec a container's process runs this interpreter, and /proc/PID/exe leads to it: a container that executes that link, or
opens it, must not be able to write to the node's file (CVE-2019-5736). So the commands that make a process run from a read-only mount
of the file, on which the kernel refuses every write:

    /run/tare-oci.python/interpreter-DEV-INO/python3
                                      the interpreter with these numbers, bound read-only over an empty file, once for each boot;
                                      `tare-oci` takes the one that is the same file as the installed one. The empty file may not be
                                      executed: a shell would take it for a script, and do nothing, successfully
    /proc/self/fd/N                   a detached read-only clone, where that mount cannot be made: costs one more start each time
"""

from __future__ import annotations

import fcntl
import os
import sys

from tare.errors import FailedPrecondition, describe
from tare.launch import linux
from tare.oci import logs, stock

ST_RDONLY = 1
PLACEHOLDER = 0o644
DIRECTORY = stock.DIRECTORY
PREFIX, INTERPRETER = "interpreter-", "python3"


def sealed() -> bool:
    """Whether the mount that this process's executable is seen through is read-only."""
    return bool(os.statvfs("/proc/self/exe").f_flag & ST_RDONLY)


def ensure(arguments: list[str]) -> None:
    """Go on if sealed; else start again, sealed, with the same arguments: then this does not return. Raises FailedPrecondition."""
    if sealed():
        return
    try:
        tree = read_only()
    except OSError as error:
        hint = "it takes root, and Linux 5.12"
        raise FailedPrecondition("protect the interpreter from containers", cause=error, hint=hint) from error
    real = os.path.realpath(sys.executable)
    keep(real)
    os.set_inheritable(tree, True)
    os.execve(f"/proc/self/fd/{tree}", [real, *arguments], dict(os.environ))


def read_only() -> int:
    """A detached read-only mount of the executable. Raises OSError."""
    tree = linux.open_tree(linux.AT_FDCWD, b"/proc/self/exe", linux.OPEN_TREE_CLONE)
    linux.mount_setattr(
        tree, b"", linux.AT_EMPTY_PATH, attributes=linux.MOUNT_ATTR_RDONLY, propagation=linux.MS_PRIVATE
    )
    return tree


def mounted(place: str) -> bool:
    """Whether something is mounted on a file: on one of several at once, as calls that begin together make them, there is another."""
    with open("/proc/self/mountinfo") as mounts:
        return any(line.split(" ", 5)[4] == place for line in mounts)


def folder_of(real: str) -> str:
    """The directory of an interpreter's mount. Raises OSError."""
    status = os.stat(real)
    return f"{DIRECTORY}/{PREFIX}{status.st_dev:x}-{status.st_ino:x}"


def keep(real: str) -> None:
    """Have such a mount where `tare-oci` finds it, made by one command of those that begin together. Where that cannot be, each makes its own."""
    try:
        folder = folder_of(real)
        os.makedirs(folder, mode=0o755, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not kept(f"{folder}/{INTERPRETER}", real):
                put(folder, real)
        finally:
            os.close(lock)
    except OSError as error:
        logs.debug(f"keep a read-only mount of the interpreter {real}: {describe(error)}")


def kept(place: str, real: str) -> bool:
    """Whether an interpreter's mount is there already."""
    return os.path.exists(place) and os.path.samefile(place, real) and bool(os.statvfs(place).f_flag & ST_RDONLY)


def clear_old() -> None:
    """Take away the mounts of interpreters that an upgrade has removed. Raises OSError."""
    for name in os.listdir(DIRECTORY):
        place = f"{DIRECTORY}/{name}/{INTERPRETER}"
        if name.startswith(PREFIX) and os.path.exists(place) and not os.stat(place).st_nlink:
            linux.umount(place.encode(), linux.MNT_DETACH)


def put(folder: str, real: str) -> None:
    """Mount it. Raises OSError."""
    clear_old()
    place = f"{folder}/{INTERPRETER}"
    # What tells the interpreter where its library is, as in a virtual environment.
    linux.replace_file(f"{folder}/pyvenv.cfg", f"home = {os.path.dirname(real)}\n".encode())
    while mounted(place):
        linux.umount(place.encode(), linux.MNT_DETACH)
    empty = os.open(place, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, PLACEHOLDER)
    try:
        os.fchmod(empty, PLACEHOLDER)
    finally:
        os.close(empty)
    tree = read_only()
    try:
        linux.move_mount(tree, linux.AT_FDCWD, place.encode())
    finally:
        os.close(tree)
