"""The child that looks at paths which a pod names, and labels what is there: only a process that can be given up may block on one.

A tree is labelled from directory to directory by descriptors, so that who renames things in it meanwhile leads nowhere else.
"""

from __future__ import annotations

import os
import socket
import stat

from tare.launch import packets, plan, steps, wire

SELINUX = "security.selinux"
EIO, ENOTSUP = 5, 95


def main(status: socket.socket, plan_fd: int) -> None:
    """Answer one field for each path: b"d", b"f" for anything else, or the errno as text; does not return.

    The plan: `paths` [(path, make)] to look at, `mounts` [path] whose propagation to tell (b"shared", b"slave", b"private"), or
    `labels` [(path, SELinux label)].
    """
    try:
        work = plan.read(plan_fd)
        answers = [look(path, make) for path, make in work.get("paths", ())]
        answers += [propagation(path) for path in work.get("mounts", ())]
        answers += [relabel(path, label) for path, label in work.get("labels", ())]
        packets.send(status, wire.OK, 0, answers)
        os._exit(0)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this child and is told to the launcher
        steps.fail_with(status, "look at mount sources")


def look(path: bytes, make: bool) -> bytes:
    """What is at a path; a directory, made with mode 0755, where there is nothing and `make` says so."""
    try:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            if not make:
                raise
            os.umask(0o022)
            os.makedirs(path, 0o755, exist_ok=True)
            mode = os.stat(path).st_mode
    except OSError as error:
        return b"%d" % (error.errno or EIO)
    return b"d" if stat.S_ISDIR(mode) else b"f"


def propagation(path: bytes) -> bytes:
    """What becomes of mounts on the mount that a path is on: shared with others, taken from others, or neither."""
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        with open(f"/proc/self/fdinfo/{fd}", "rb") as about:
            number = next(line.split()[1] for line in about if line.startswith(b"mnt_id:"))
        with open("/proc/self/mountinfo", "rb") as mounts:
            fields = next(line.split() for line in mounts if line.startswith(number + b" "))
    except OSError as error:
        return b"%d" % (error.errno or EIO)
    tags = {tag.partition(b":")[0] for tag in fields[6 : fields.index(b"-")]}
    return b"shared" if b"shared" in tags else b"slave" if b"master" in tags else b"private"


def relabel(path: bytes, label: bytes) -> bytes:
    """Give what is at a path, and all below it, an SELinux label; links below are labelled themselves, never followed."""
    try:
        top = os.open(path, os.O_PATH | os.O_CLOEXEC)
        put(top, label)
        if not stat.S_ISDIR(os.fstat(top).st_mode):
            return b"f"
        for _, directories, files, here in os.fwalk(b".", dir_fd=top, onerror=fail):
            for name in directories + files:
                put(os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=here), label, done=True)
    except OSError as error:
        return b"%d" % (error.errno or EIO)
    return b"d"


def fail(error: OSError) -> None:
    """What cannot be entered cannot be labelled."""
    raise error


def put(fd: int, label: bytes, done: bool = False) -> None:
    """Label what an O_PATH descriptor stands for. A file system without labels has one for all that is on it."""
    try:
        os.setxattr(f"/proc/self/fd/{fd}", SELINUX, label)
    except OSError as error:
        if error.errno != ENOTSUP:
            raise
    finally:
        if done:
            os.close(fd)
