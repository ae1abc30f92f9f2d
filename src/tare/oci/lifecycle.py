"""`start`, `kill`, `delete`, and `run`: what happens to a container once its process is made."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import mmap
import os

from tare.errors import FailedPrecondition, InvalidArgument, NotFound, TareError, describe
from tare.launch import packets, wire
from tare.oci import config, creating, groups, hooks, interrupts, logs, shares, state, terminals
from tare.oci.birth import NotStarted, let_through

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tare.oci.arguments import Options
    from tare.oci.birth import Birth
    from tare.oci.config import Config
    from tare.oci.state import Container

KILLED_BY = 128


def start(container: Container) -> None:
    """Let the process of a created container run its program. Raises FailedPrecondition, NotStarted."""
    container.hold()
    status = container.status()
    if status != "created":
        raise FailedPrecondition(f"start container {container.id}", cause=f"it is {status}, not created")
    spec = kept_config(container)
    doing = f"start container {container.id}"
    connection = connect(container)
    try:
        kind, _, _, fds = packets.receive(connection)
        if kind != wire.OK or len(fds) != 1:
            raise NotStarted(doing, step="gate", cause="its process does not answer", errno=0)
        outcome = mmap.mmap(fds[0], mmap.PAGESIZE)
        packets.close_all(fds)
        let_through(connection, outcome, doing, spec["process"]["args"][0])
    except packets.Closed:
        raise NotStarted(doing, step="gate", cause="its process was killed", errno=0) from None
    finally:
        connection.close()
    os.unlink(container.gate)
    container.release()  # a hook may call this command for the container
    after_start(container, spec)


def after_start(container: Container, spec: Config) -> None:
    """The poststart hooks; where one fails the container is stopped."""
    try:
        hooks.run(container, spec, "poststart", "running", container.pid)
    except TareError:
        end_processes(container)
        raise


def connect(container: Container) -> _socket.socket:
    """The gate. Raises NotStarted."""
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    directory = os.open(container.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{directory}/{state.GATE}")
    except OSError as error:
        connection.close()
        doing = f"start container {container.id}"
        raise NotStarted(doing, step="gate", cause=describe(error), errno=error.errno or 0) from error
    finally:
        os.close(directory)
    return connection


def kept_config(container: Container) -> Config:
    """The configuration that the container was made from; empty where making it was cut short."""
    try:
        return config.parse(config.read(container.path(state.CONFIG)))
    except FileNotFoundError:
        return {}


def kill(container: Container, word: str, *, everything: bool) -> None:
    """Send a signal to the container's process, or to all in its group. Raises FailedPrecondition where it does not run."""
    number = signal_number(word)
    doing = f"kill container {container.id}"
    if everything:
        if not container.cgroup:
            raise FailedPrecondition(doing, cause="container not running")
        signal_group(container, number)
        return
    if container.status() == "stopped" or not container.pid:
        raise FailedPrecondition(doing, cause="container not running")
    try:
        pidfd = os.pidfd_open(container.pid)
    except ProcessLookupError:
        raise FailedPrecondition(doing, cause="container not running") from None
    try:
        if not container.alive():
            raise FailedPrecondition(doing, cause="container not running")
        _signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        raise FailedPrecondition(doing, cause="container not running") from None
    finally:
        os.close(pidfd)
    if number == _signal.SIGKILL and container.facts.get("shared_pids"):
        signal_group(container, number)  # with its own PID namespace the kernel does that
    elif number == _signal.SIGKILL and container.cgroup:
        groups.thaw(container.cgroup)  # in v1's freezer a process dies only once it goes on


def signal_group(container: Container, number: int) -> None:
    """A signal to all in the container's control group."""
    if number == _signal.SIGKILL:
        groups.kill(container.cgroup)
        return
    for pid in groups.members(container.cgroup):
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if pid in groups.members(container.cgroup):
                _signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            continue
        finally:
            os.close(pidfd)


def signal_number(word: str) -> int:
    """A signal by name, with or without SIG, or number. Raises InvalidArgument."""
    if word.isdecimal():
        number = int(word)
    else:
        name = word.upper().removeprefix("SIG")
        base, sign, offset = name.partition("+") if "+" in name else name.partition("-")
        found = getattr(_signal, f"SIG{base}", None)
        number = found if isinstance(found, int) else 0
        if sign:
            number = number + int(sign + offset) if base in ("RTMIN", "RTMAX") and offset.isdecimal() else 0
    if not 0 < number < _signal.NSIG:
        raise InvalidArgument(f"send signal {word}", cause="unknown signal")
    return number


def delete(root: str, container_id: str, *, force: bool) -> None:
    """Remove a stopped container; with `force` any, and none is no error. Raises FailedPrecondition, NotFound."""
    try:
        container = state.load(root, container_id, damaged=force)
        container.hold()
        container = state.load(root, container_id, damaged=force)
    except NotFound:
        if force:
            return
        raise
    status = container.status()
    if status not in ("stopped", "created") and not force:
        cause = f"cannot delete container {container_id} that is not stopped: {status}"
        raise FailedPrecondition(f"delete container {container_id}", cause=cause)
    remove(container)


def remove(container: Container, spec: Config | None = None) -> None:
    """End what is left of it, remove its group and its directory, and then, as the specification has it, run the poststop hooks.

    What fails of the latter, or cannot be read of its configuration, is a warning.
    """
    gone = not container.alive() and bool(container.cgroup) and groups.vanished(container.cgroup)
    if not gone:
        end_what_is_left(container)
    if container.facts.get("unit"):
        from tare.oci import scopes

        scopes.stop(str(container.facts["unit"]))
    if container.cgroup and not gone:
        groups.remove(container.cgroup)
    try:
        spec = kept_config(container) if spec is None else spec
        share = shares.of(spec, container.id)
        if share is not None:
            shares.remove(share)
    except (TareError, OSError) as error:
        logs.warning(f"container {container.id}: {describe(error)}")
    container.forget()
    hooks.run(container, spec or {}, "poststop", "stopped", 0)


def end_what_is_left(container: Container) -> None:
    """SIGKILL for what may be the container's. Where its PID namespace has ended nothing of it lives, and who is in its group is a stranger."""
    if container.alive() or not container.pid or container.facts.get("shared_pids", True):
        end_processes(container)
    else:
        groups.thaw(container.cgroup)


def end_processes(container: Container) -> None:
    """SIGKILL for the container's process and all in its group, until they have ended."""
    if container.alive():
        try:
            pidfd = os.pidfd_open(container.pid)
            if container.alive():
                _signal.pidfd_send_signal(pidfd, _signal.SIGKILL)
            os.close(pidfd)
        except ProcessLookupError:
            logs.debug(f"process {container.pid} has ended by itself")
    if container.cgroup:
        groups.thaw(container.cgroup)
        groups.kill(container.cgroup)


def run(request: creating.Request, options: Options, birth: Birth) -> int:
    """Create, start, and unless --detach wait: the exit code, as a shell has it. Afterwards the container is deleted, unless --keep."""
    detached = options.given("detach")
    made = creating.create(request, birth, held=False)
    container = made.container
    try:
        attendance = None if detached else Attendance(birth)
        birth.go(f"start container {container.id}", made.config["process"]["args"][0])
        if detached:
            interrupts.heed()
        birth.end()
        after_start(container, made.config)
        code = 0 if attendance is None else attendance.wait(relayed=True)
    except BaseException:
        interrupts.ignore()
        birth.kill()
        remove(container, made.config)
        raise
    if attendance is None:
        return code
    if options.given("keep"):
        end_processes(container)
    else:
        remove(container, made.config)
    return code


class Attendance:
    """This command while a program runs for it in the foreground: signals that it gets are passed on from the beginning."""

    def __init__(self, birth: Birth) -> None:
        self.birth = birth
        self.relay: terminals.Relay | None = None
        if birth.terminal >= 0:
            terminals.take_size(birth.terminal)
        for number in FORWARDED:
            _signal.signal(number, self.forward)
        self.kept = interrupts.pending()

    def forward(self, number: int, _: object) -> None:
        """One signal. A change of the terminal's size is passed on by changing that of the container's terminal."""
        if number == _signal.SIGWINCH and self.relay is not None:
            self.relay.resize()
            return
        try:
            _signal.pidfd_send_signal(self.birth.pidfd, number)
        except ProcessLookupError:
            return

    def wait(self, *, relayed: bool) -> int:
        """Until the process has ended, with its terminal relayed to this command's: the exit code, as a shell has it.

        What was kept of signals goes to its program now that there is one.
        """
        for number in self.kept:
            self.forward(number, None)
        if relayed and self.birth.terminal >= 0:
            self.relay = terminals.Relay(self.birth.terminal)
        try:
            if self.relay is not None:
                self.relay.run(self.birth.pidfd)
            status = os.waitpid(self.birth.pid, 0)[1]
            self.birth.pid = 0  # reaped: the number may be another's
        finally:
            if self.relay is not None:
                self.relay.close()
        return KILLED_BY + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


OWN = "KILL STOP CHLD URG PIPE SEGV FPE BUS ILL TRAP ABRT TSTP TTIN TTOU"
"""Signals that are about the process that gets them."""
FORWARDED = sorted(set(range(1, 32)) - {getattr(_signal, f"SIG{name}") for name in OWN.split()})
