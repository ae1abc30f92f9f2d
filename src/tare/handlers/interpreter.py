"""Starting the keeper on an interpreter that nothing can overwrite.

Until its exec a container's first process runs this interpreter, and /proc/PID/exe leads to it. So it is a sealed copy in
memory, or, where the kernel forbids executing one, the same file seen through a read-only overlay of its own (CVE-2019-5736).
"""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tare.errors import InternalError
from tare.launch import linux
from tare.launch.plan import SEALS

MFD_EXEC = 0x10
START_SECONDS = 30.0
BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from tare.launch.keeper import main; main()"


def start_keeper(run: Path) -> None:
    """Start the keeper of a run directory as a process of its own session, and nobody's child. It tells of its troubles in `<run>/launch.log`.

    To be called in a thread: it takes as long as an interpreter's start. Whether the keeper serves is seen by connecting to its
    socket. Raises InternalError.
    """
    real = Path(sys._base_executable if hasattr(sys, "_base_executable") else sys.executable).resolve()  # type: ignore[attr-defined,unused-ignore]
    package = Path(__file__).parents[2]
    command = [str(real), "-I", "-S", "-E", "-B", "-c", BOOT, str(package), str(run)]
    try:
        log = os.open(run / "launch.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            status = spawn(command, sealed_copy(real), log)
        except OSError as error:
            # EACCES, EPERM: the sysctl vm.memfd_noexec. EBUSY: the kernel itself holds a page of the copy (reclaim, compaction).
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EBUSY):
                raise
            status = spawn(command, overlay_view(real), log)
        finally:
            os.close(log)
    except OSError as error:
        raise InternalError("start the keeper", cause=error) from error
    if status:
        raise InternalError("start the keeper", cause=f"it ended with {status}", hint=f"see {run}/launch.log")


def spawn(command: list[str], image: int, log: int) -> int:
    """Run the image, whose descriptor is closed here, in a session of its own, away from every directory, with nothing inherited: its status."""
    try:
        return subprocess.call(
            command,
            executable=f"/proc/self/fd/{image}",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(image,),
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            start_new_session=True,
            timeout=START_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise OSError(errno.ETIMEDOUT, "the interpreter does not come up", command[0]) from error
    finally:
        os.close(image)


def sealed_copy(path: Path) -> int:
    """An executable memfd with the file's bytes, sealed against every change."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("tare", flags | MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # MFD_EXEC is Linux 6.3's.
        fd = os.memfd_create("tare", flags)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            offset = 0
            while offset < size:
                offset += os.sendfile(fd, file.fileno(), offset, size - offset)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def overlay_view(path: Path) -> int:
    """The file through a detached read-only overlay: what is written through the descriptor has nowhere to go."""
    with tempfile.TemporaryDirectory(prefix="tare-") as empty:
        context = linux.fsopen(b"overlay")
        try:
            linux.fsconfig(context, linux.FSCONFIG_SET_STRING, b"lowerdir", os.fsencode(f"{path.parent}:{empty}"))
            linux.fsconfig(context, linux.FSCONFIG_CMD_CREATE)
            tree = linux.fsmount(context, linux.MOUNT_ATTR_RDONLY)
        finally:
            os.close(context)
    try:
        return os.open(path.name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=tree)
    finally:
        os.close(tree)
