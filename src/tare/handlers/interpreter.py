"""Starting the keeper on an interpreter that nothing can overwrite, and what another version of it is started with.

Until its exec a container's first process runs this interpreter, and /proc/PID/exe leads to it. So it is a sealed copy in
memory, or, where the kernel forbids executing one, the same file seen through a read-only overlay of its own (CVE-2019-5736).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tare import __version__
from tare.errors import InternalError
from tare.launch import linux, plan, succession
from tare.launch.plan import SEALS

MFD_EXEC = 0x10
START_SECONDS = 30.0
MEMORY = "tare"  # what the sealed copy is called
BOOT = "import sys; sys.path.insert(0, sys.argv.pop(1)); from tare.launch.succession import main; main()"
PACKAGE = Path(__file__).parents[2]
UNSEALED = (errno.EACCES, errno.EPERM, errno.EBUSY)
"""EACCES, EPERM: the sysctl vm.memfd_noexec. EBUSY: the kernel itself holds a page of the copy (reclaim, compaction)."""


def interpreter() -> Path:
    """The file that runs this process, not a virtual environment's link to it."""
    return Path(sys._base_executable if hasattr(sys, "_base_executable") else sys.executable).resolve()  # type: ignore[attr-defined,unused-ignore]


def identity() -> str:
    """What tells two versions of keeper and launcher apart: of the files as they are now, and of the interpreter. Raises OSError."""
    real = interpreter()
    status = real.stat()
    told = hashlib.blake2b(f"{__version__} {real} {status.st_size} {status.st_mtime_ns}".encode(), digest_size=8)
    for path in sorted((PACKAGE / "tare" / "launch").glob("*.py")):
        told.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"{__version__}-{told.hexdigest()}"


def command() -> list[str]:
    """How keeper and launcher are run: what comes before their own arguments (`succession.main`)."""
    return [str(interpreter()), "-I", "-S", "-E", "-B", "-c", BOOT, str(PACKAGE)]


def image() -> int:
    """The interpreter as nobody can overwrite it; the descriptor is the caller's. Raises OSError."""
    try:
        return sealed_copy(interpreter())
    except OSError as error:
        if error.errno not in UNSEALED:
            raise
        return overlay_view(interpreter())


def start_keeper(run: Path, kept: Mapping[bytes, Sequence[int]] | None = None) -> None:
    """Start the keeper of a run directory as a process of its own session, and nobody's child. It tells of its troubles in `<run>/launch.log`.

    `kept` are descriptors that it begins with, which stay the caller's. To be called in a thread: it takes as long as an interpreter's
    start. Whether the keeper serves is seen by connecting to its socket. Raises InternalError.
    """
    try:
        words = [*command(), str(run), identity()]
        log = os.open(run / "launch.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            with handed(kept or {}) as (more, fds):
                try:
                    status = spawn([*words, *more], sealed_copy(interpreter()), log, fds)
                except OSError as error:
                    if error.errno not in UNSEALED:
                        raise
                    status = spawn([*words, *more], overlay_view(interpreter()), log, fds)
        finally:
            os.close(log)
    except OSError as error:
        raise InternalError("start the keeper", cause=error) from error
    if status:
        raise InternalError("start the keeper", cause=f"it ended with {status}", hint=f"see {run}/launch.log")


@contextlib.contextmanager
def handed(kept: Mapping[bytes, Sequence[int]]) -> Iterator[tuple[list[str], list[int]]]:
    """The arguments that tell a new keeper what it begins with, and the descriptors that go along."""
    if not kept:
        yield [], []
        return
    fds = [fd for both in kept.values() for fd in both]
    store = {key: list(both) for key, both in kept.items()}
    state = plan.seal(succession.state_of("keeper", None, 0, fds, store=store))
    try:
        yield [succession.BEGIN, str(state)], [state, *fds]
    finally:
        os.close(state)


def spawn(command: list[str], image: int, log: int, fds: Sequence[int] = ()) -> int:
    """Run the image, whose descriptor is closed here, in a session of its own, away from every directory, with nothing else: its status."""
    try:
        return subprocess.call(
            command,
            executable=f"/proc/self/fd/{image}",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(image, *fds),
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
        fd = os.memfd_create(MEMORY, flags | MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # MFD_EXEC is Linux 6.3's.
        fd = os.memfd_create(MEMORY, flags)
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
