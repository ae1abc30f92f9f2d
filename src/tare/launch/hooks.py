"""Runs the hooks of a container, one after the other: programs that are told its state on standard input.

Where a hook runs is where who calls runs: the helper in the node's namespaces, or the container's own process, before it has left the
node's tree (createContainer), or after it has become what it is to be (startContainer: the program may be the image's own, so it must not
be more than the container's process). A hook that fails is an error; what it said last, on standard output or error, is in it.

Made for a process that may have a system call filter by now: fork rather than clone3, which filters cannot look into.
Source: OCI runtime specification 1.2, config.md, "POSIX-platform Hooks", and runtime.md, "Lifecycle".
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import os
import select
import time

from tare.launch import credentials, linux

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from tare.launch.machine import Machine
    from tare.launch.outside import Outside

TAIL = 2000  # bytes of what a hook said that are kept
CHUNK = 65536
LATE_CHUNKS = 16  # read at most after the end: one that leaves something behind may go on writing for ever
UMASK = 0o022
CANNOT = 127
ETIMEDOUT, ECHILD = 110, 10


def hook(
    machine: Machine,
    path: bytes,
    arguments: tuple[bytes, ...],
    environment: tuple[bytes, ...] | None,
    timeout: int,
    state: tuple[bytes, ...],
) -> None:
    """A createContainer hook, in the container's root file system as it is seen before the root is exchanged; its PID is the container's own."""
    run(path, arguments, environment, timeout, around(state, os.getpid()), lambda: os.fchdir(machine.root))


def confined_hook(
    machine: Machine,
    path: bytes,
    arguments: tuple[bytes, ...],
    environment: tuple[bytes, ...] | None,
    timeout: int,
    state: tuple[bytes, ...],
) -> None:
    """A startContainer hook: what the process has dropped it does not have either, and a filter that is to come last it has too."""
    program = machine.program

    def confine() -> None:
        if isinstance(program, linux.SeccompProgram) and program.load():
            os._exit(CANNOT)

    run(path, arguments, environment, timeout, around(state, os.getpid()), confine)


def outside_hook(
    outside: Outside,
    path: bytes,
    arguments: tuple[bytes, ...],
    environment: tuple[bytes, ...] | None,
    timeout: int,
    state: tuple[bytes, ...],
    directory: bytes,
) -> None:
    """A prestart or createRuntime hook, in the bundle's directory; the PID is the container's as the node sees it."""
    subject = os.pidfd_open(outside.pid)
    try:
        told = around(state, outside.pid)
        run(path, arguments, environment, timeout, told, lambda: os.chdir(directory), subject)
    finally:
        os.close(subject)


def around(state: tuple[bytes, ...], pid: int) -> bytes:
    """The state with the PID wherever it belongs."""
    return (b"%d" % pid).join(state)


def run(
    path: bytes,
    arguments: tuple[bytes, ...],
    environment: tuple[bytes, ...] | None,
    timeout: int,
    state: bytes,
    prepare: Callable[[], Any],
    subject: int = -1,
) -> None:
    """One hook to its end. Without an environment it has this process's. `timeout` is in seconds, 0 for none.

    `prepare` is called in the hook's process, last. `subject` is the pidfd of who the hook is for, if that is not this process: it ends
    with it. Raises OSError: its words say how the hook ended.
    """
    if environment is None:
        environment = tuple(b"%b=%b" % pair for pair in os.environb.items())
    program = linux.Exec([path], list(arguments or (path,)), list(environment))
    source = memory(state)
    output, theirs = os.pipe2(os.O_CLOEXEC)
    parent = os.getpid()
    try:
        pid = os.fork()
        if pid == 0:
            become(program, parent, source, theirs, prepare)
    finally:
        os.close(theirs)
        os.close(source)
    try:
        said, code = attend(pid, output, timeout, subject)
    finally:
        os.close(output)
    if code:
        words = b": " + said if said else b""
        raise OSError(ECHILD, ended(code) + words.decode(errors="replace"))


def memory(data: bytes) -> int:
    """A file of nowhere, to be read from its beginning: nobody has to feed a pipe that the hook may not read."""
    fd = os.memfd_create("tare-state", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def become(program: linux.Exec, parent: int, source: int, output: int, prepare: Callable[[], Any]) -> None:
    """The hook's process, as far as its execve; does not return. It ends with its parent, and is the first of a group."""
    try:
        os.setsid()
        linux.prctl(linux.PR_SET_PDEATHSIG, _signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(CANNOT)
        os.umask(UMASK)
        for number, fd in enumerate((source, output, output)):
            os.dup2(fd, number)
        linux.close_range(3, flags=linux.CLOSE_RANGE_CLOEXEC)
        credentials.reset_signals()
        prepare()
        os.write(2, b"cannot be run: " + os.strerror(program()).encode())
    except OSError as error:
        os.write(2, b"cannot be run: " + str(error).encode())
    finally:
        os._exit(CANNOT)


def attend(pid: int, output: int, timeout: int, subject: int) -> tuple[bytes, int]:
    """Wait for a child's end: (the last that it said, wait status). Raises OSError where it is killed, with its group."""
    reaped = False
    pidfd = -1
    try:
        pidfd = os.pidfd_open(pid)
        said, reason = listen(pidfd, output, timeout, subject)
        if not reason:
            code = os.waitpid(pid, 0)[1]
            reaped = True
            return said, code
    finally:
        if not reaped:
            kill_group(pid)
            os.waitpid(pid, 0)
        if pidfd >= 0:
            os.close(pidfd)
    words = b": " + said if said else b""
    raise OSError(ETIMEDOUT, reason + words.decode(errors="replace"))


def listen(pidfd: int, output: int, timeout: int, subject: int) -> tuple[bytes, str]:
    """What is said until the process ends, the tail of it; and why it is to be killed, if it is.

    The end of the pipe says nothing: what a hook leaves behind may hold it open.
    """
    poll = select.poll()
    for fd in (pidfd, output, subject):
        if fd >= 0:
            poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + timeout if timeout else 0.0
    said = b""
    while True:
        patience = max(0.0, deadline - time.monotonic()) * 1000 if timeout else None
        ready = [fd for fd, _ in poll.poll(patience)]
        if pidfd in ready:
            return drain(output, said), ""
        if subject in ready:
            return said.strip(), "was killed, since the container's process has ended"
        if not ready:
            return said.strip(), f"took longer than {timeout} s, and was killed"
        part = os.read(output, CHUNK)
        said = (said + part)[-TAIL:]
        if not part:
            poll.unregister(output)


def drain(output: int, said: bytes) -> bytes:
    """The tail with what is in the pipe now."""
    os.set_blocking(output, False)
    for _ in range(LATE_CHUNKS):
        try:
            part = os.read(output, CHUNK)
        except BlockingIOError:
            break
        if not part:
            break
        said = (said + part)[-TAIL:]
    return said.strip()


def kill_group(pid: int) -> None:
    """SIGKILL for a child that is not reaped, and for its group, once it has one."""
    os.kill(pid, _signal.SIGKILL)
    try:
        os.killpg(pid, _signal.SIGKILL)
    except ProcessLookupError:
        return


def ended(code: int) -> str:
    """A wait status in words."""
    if os.WIFSIGNALED(code):
        return f"was killed by signal {os.WTERMSIG(code)}"
    return f"ended with status {os.WEXITSTATUS(code)}"


OPERATIONS: dict[str, Callable[..., None]] = {"hook": hook, "confined_hook": confined_hook}
OUTSIDE: dict[str, Callable[..., None]] = {"hook": outside_hook}
