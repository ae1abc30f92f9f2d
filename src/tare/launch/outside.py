"""A child's helper in the node's namespaces: it does what can be done only there, when the child says that it is time.

    in between (forks both)        helper                         child, in its namespaces
                                     │◄──────────────── ASK n ───────┤ step ("outside", label, n)
                                     │ steps of list n, about the     ┊
                                     │ child, whose PID is that of    ┊
                                     │ the message's sender           ┊
                                     ├─ OK pid, warnings ───────────►│
                                     ┊ … until all lists are done, or the child's end is closed

The lists are the plan's `outside`. A step's function takes an `Outside` and the step's arguments. One that fails is told to the
child (FAILED, by the step's label), which passes it on and ends.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import os

from tare.launch import attributes, hooks, linux, listener, packets, steps, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

    from tare.launch.plan import Step

EIO = 5


class Outside:
    """What the steps of one list share: the child's PID as the node sees it, the ways to launcher and child, the page that all three share,
    what was carried on from. `doomed` is the child's pidfd, where it is to be killed if the step fails, since it might not hear of it."""

    def __init__(self, status: _socket.socket, child: _socket.socket, page: mmap.mmap, pid: int) -> None:
        self.status = status
        self.child = child
        self.page = page
        self.pid = pid
        self.doomed = -1
        self.warnings: list[bytes] = []


def fork(status: _socket.socket, lists: list[list[Step]], page: mmap.mmap) -> tuple[int, _socket.socket]:
    """Fork the helper: (its PID, the child's end of the socket pair). It ends by itself when nobody has the other end any more."""
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    packets.name_senders(theirs)
    pid, pidfd = linux.clone3()
    if pid == 0:
        ours.close()
        linux.set_name(b"tare-outside")
        serve(status, theirs, lists, page)
    os.close(pidfd)
    theirs.close()
    return pid, ours


def serve(status: _socket.socket, child: _socket.socket, lists: list[list[Step]], page: mmap.mmap) -> None:
    """The helper's life; does not return."""
    try:
        linux.keep_only(status.fileno(), child.fileno())
        resolved = [steps.resolve(one, OPERATIONS) for one in lists]
        for _ in resolved:
            pid, number = hear(child)
            outside = Outside(status, child, page, pid)
            for function, label, arguments in resolved[number]:
                attempt(child, outside, function, label, arguments)
            packets.send(child, wire.OK, 0, (pid, *outside.warnings[:8]))
        os._exit(0)
    except packets.Closed:
        os._exit(1)
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this helper and is told to the launcher
        steps.fail_with(status, "setup")


def attempt(
    child: _socket.socket, outside: Outside, function: Callable[..., None], label: str, arguments: tuple[object, ...]
) -> None:
    """One step, or the end of this helper, and of the child."""
    try:
        function(outside, *arguments)
        return
    except OSError as error:
        failure = error
    except BaseException:  # noqa: BLE001 - whatever it is, it ends this helper and is told
        failure = steps.unforeseen()
    if outside.doomed >= 0:
        end(outside, label, failure)
    packets.send(child, wire.FAILED, 0, steps.described(label, failure))
    os._exit(1)


def end(outside: Outside, label: str, failure: OSError) -> None:
    """The same where the child cannot listen: whoever made it is told, or at least finds the errno in the page; then the child is killed."""
    outside.page[:4] = (failure.errno or EIO).to_bytes(4, "little")
    try:
        packets.send(outside.status, wire.FAILED, 0, steps.described(label, failure))
    except packets.Closed:
        pass  # who made the container is not who starts it: the page has to do
    finally:
        _signal.pidfd_send_signal(outside.doomed, _signal.SIGKILL)
        os._exit(1)


def hear(child: _socket.socket) -> tuple[int, int]:
    """(PID of who asks, number of the list). Raises packets.Closed."""
    pid, _, _, fields, fds = packets.receive_from(child)
    packets.close_all(fds)
    return pid, wire.int_of(fields[0])


def join_cgroup(outside: Outside, path: bytes) -> None:
    """Move the child into a cgroup, by its cgroup.procs: where the child itself may not write there any more."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"%d" % outside.pid)
    finally:
        os.close(fd)


OPERATIONS: dict[str, Callable[..., None]] = {
    "join_cgroup": join_cgroup,
    **attributes.OUTSIDE,
    **hooks.OUTSIDE,
    **listener.OUTSIDE,
}
