"""Pinned namespaces: files that hold them by a bind mount, without any process. Made by `launch.namespaces`, let go of here."""

from __future__ import annotations

import os
from pathlib import Path

from tare.handlers.processes import Process
from tare.launch import linux

PIN_FLAGS = {
    "user": linux.CLONE_NEWUSER,
    "net": linux.CLONE_NEWNET,
    "ipc": linux.CLONE_NEWIPC,
    "uts": linux.CLONE_NEWUTS,
    "pid": linux.CLONE_NEWPID,
}
PROC_PIN = "proc"
"""Beside the pin of a pod's PID namespace a /proc of it, where the kernel mounts none from outside (before Linux 6.17)."""
ENTER_ALL = (
    linux.CLONE_NEWNS
    | linux.CLONE_NEWPID
    | linux.CLONE_NEWNET
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUTS
    | linux.CLONE_NEWCGROUP
)
ENTER_IF_OTHER = {
    "user": linux.CLONE_NEWUSER,
    "time": linux.CLONE_NEWTIME,
}  # not every kernel has them, and one's own user namespace is refused
EINVAL = 22


def entered(pid: int) -> int:
    """CLONE_NEW flags of the namespaces of a container's process that a further one enters."""
    return ENTER_ALL | sum(flag for kind, flag in ENTER_IF_OTHER.items() if inode(pid, kind) != inode("self", kind))


def inode(pid: int | str, kind: str) -> int:
    """What tells a process's namespace from others; 0 where there is no such process, or no such kind."""
    try:
        return os.stat(f"/proc/{pid}/ns/{kind}").st_ino
    except OSError:
        return 0


def unpin(pin: Path) -> None:
    """Unmount and remove a pinned namespace's file, if it is there."""
    if not pin.exists():
        return
    while True:
        try:
            linux.umount(bytes(pin), linux.MNT_DETACH)
        except OSError as error:
            if error.errno != EINVAL:  # not a mount point any more
                raise
            break
    pin.unlink(missing_ok=True)


def unpin_proc(point: Path) -> None:
    """Unmount and remove the mount point of a pod's /proc, if it is there."""
    if os.path.ismount(point):
        linux.umount(bytes(point), linux.MNT_DETACH)
    if point.exists():
        point.rmdir()


def find_first(pin: Path) -> Process | None:
    """PID 1 of a pinned PID namespace that nobody wrote down, found by the namespace's inode."""
    inode = pin.stat().st_ino
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            process = Process(int(entry.name), linux.start_time(int(entry.name)))
            if (entry / "ns/pid").stat().st_ino == inode and first_of(entry):
                return process
        except OSError:
            continue
    return None


def first_of(entry: Path) -> bool:
    """Whether a process is PID 1 in its own PID namespace."""
    lines = (entry / "status").read_text().splitlines()
    return any(line.startswith("NSpid:") and line.split()[-1] == "1" for line in lines)
