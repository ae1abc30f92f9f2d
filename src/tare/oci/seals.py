"""This interpreter, run from where nothing can overwrite it.

Until its exec a container's process runs this interpreter, and /proc/PID/exe leads to it: a container that executes that link, or
opens it, must not be able to write to the node's file (CVE-2019-5736). So the commands that make a process run from a read-only mount
of the file, on which the kernel refuses every write:

    /run/tare-oci.python/python3      the interpreter, bound read-only over an empty file, once for each boot; `tare-oci` takes it
                                      where it is the same file as the installed one
    /proc/self/fd/N                   a detached read-only clone, where that mount cannot be made: costs one more start each time
"""

from __future__ import annotations

import os
import sys

from tare.errors import FailedPrecondition, describe
from tare.launch import linux
from tare.oci import logs, stock

ST_RDONLY = 1
DIRECTORY = stock.DIRECTORY
INTERPRETER = "python3"


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


def keep(real: str) -> None:
    """Have such a mount where `tare-oci` finds it, in the place of one of an older interpreter. Where that cannot be, each call makes its own."""
    place = f"{DIRECTORY}/{INTERPRETER}"
    try:
        os.makedirs(DIRECTORY, mode=0o755, exist_ok=True)
        # What tells the interpreter where its library is, as in a virtual environment.
        linux.replace_file(f"{DIRECTORY}/pyvenv.cfg", f"home = {os.path.dirname(real)}\n".encode())
        os.close(os.open(place, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o755))
        while mounted(place):
            linux.umount(place.encode(), linux.MNT_DETACH)
        tree = read_only()
        try:
            linux.move_mount(tree, linux.AT_FDCWD, place.encode())
        finally:
            os.close(tree)
    except OSError as error:
        logs.debug(f"keep a read-only mount of the interpreter at {place}: {describe(error)}")
