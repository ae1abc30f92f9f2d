"""Steps that place a child: cgroups, namespaces, standard streams, limits, and at last who it is and what it may do."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # not `signal`, which makes an enum of every answer
import fcntl
import os
import resource

from tare.launch import linux, mounts, packets, wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tare.launch.machine import Machine

LAST_CAP = 63
CAP_SYS_RESOURCE = 24
NAMESPACE_FLAGS = {
    b"ipc": linux.CLONE_NEWIPC,
    b"mnt": linux.CLONE_NEWNS,
    b"net": linux.CLONE_NEWNET,
    b"pid": linux.CLONE_NEWPID,
    b"user": linux.CLONE_NEWUSER,
    b"uts": linux.CLONE_NEWUTS,
    b"time": linux.CLONE_NEWTIME,
    b"cgroup": linux.CLONE_NEWCGROUP,
}
IGNORED = int(_signal.SIG_IGN)
EACCES, EPERM, EINVAL, EROFS = 13, 1, 22, 30


def hide(machine: Machine) -> None:
    """Nobody in a shared namespace may look into this process before it execs."""
    linux.prctl(linux.PR_SET_DUMPABLE, 0)


def join_cgroup(machine: Machine, path: bytes) -> None:
    """Move this process into a cgroup, by its cgroup.procs."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, b"0")
    finally:
        os.close(fd)


def open_namespace(machine: Machine, slot: int, path: bytes) -> None:
    """A namespace file, to be entered later by `enter`."""
    machine.slots[slot] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def enter(machine: Machine, slot: int, kind: bytes) -> None:
    """setns(2) into the namespace in the slot."""
    fd = machine.slots.pop(slot)
    linux.setns(fd, NAMESPACE_FLAGS[kind], kind.decode())
    os.close(fd)


def unshare(machine: Machine, kind: bytes) -> None:
    """A new namespace of this kind."""
    linux.unshare(NAMESPACE_FLAGS[kind])


def hostname(machine: Machine, name: bytes) -> None:
    """The host name of this UTS namespace."""
    linux.sethostname(name)


def write_file(machine: Machine, path: bytes, value: bytes) -> None:
    """Write a kernel file (a sysctl) in one write."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value)
    except OSError as error:
        error.filename = os.fsdecode(path)
        raise
    finally:
        os.close(fd)


def oom_score(machine: Machine, value: int) -> None:
    """/proc/self/oom_score_adj. To go below one's own takes CAP_SYS_RESOURCE: without it the least that is possible is set, with a warning."""
    try:
        write_file(machine, b"/proc/self/oom_score_adj", b"%d" % value)
    except OSError as error:
        if error.errno not in (EACCES, EPERM):
            raise
        machine.warnings.append(b"oom_score_adj %d is not permitted here" % value)


def rlimit(machine: Machine, kind: int, soft: int, hard: int) -> None:
    """setrlimit(2); −1 is no limit. A hard limit over one's own takes CAP_SYS_RESOURCE: without it one's own stays (`foresee_rlimit`)."""
    try:
        resource.setrlimit(kind, (soft, hard))
    except ValueError as error:
        own = resource.getrlimit(kind)[1]
        if own == resource.RLIM_INFINITY or 0 <= hard <= own:
            raise OSError(22, str(error), f"rlimit {kind}") from error
        kept = soft if 0 <= soft <= own else own
        resource.setrlimit(kind, (kept, own))


def foresee_rlimit(machine: Machine, name: bytes, kind: int, hard: int) -> None:
    """The warning that `rlimit` is going to deserve: after the gate there is nobody to tell it to."""
    own = resource.getrlimit(kind)[1]
    raised = own != resource.RLIM_INFINITY and (hard == resource.RLIM_INFINITY or hard > own)
    if raised and not linux.capget() >> CAP_SYS_RESOURCE & 1:
        machine.warnings.append(b"%b of %d is not permitted here, it stays %d" % (name, hard, own))


def session(machine: Machine) -> None:
    """A session of its own, and no signal ignored or blocked."""
    os.setsid()
    reset_signals()


def default_signals(machine: Machine) -> None:
    """No signal ignored or blocked: forks inherit that."""
    reset_signals()


def lead_session(machine: Machine) -> None:
    """A session of its own."""
    os.setsid()


def keyring(machine: Machine) -> None:
    """A new session keyring. Where the kernel's quota or a filter forbids it, that is a warning."""
    try:
        linux.join_session_keyring()
    except OSError as error:
        machine.warnings.append(b"no new session keyring: " + os.fsencode(error.strerror or str(error)))


def reset_signals() -> None:
    """Nothing ignored (Python ignores SIGPIPE and SIGXFSZ, a service manager may more), and an empty mask. execve resets handlers."""
    for number in range(1, _signal.NSIG):
        if _signal.getsignal(number) == IGNORED:
            _signal.signal(number, _signal.SIG_DFL)
    _signal.pthread_sigmask(_signal.SIG_SETMASK, ())


def umask(machine: Machine, mask: int) -> None:
    """umask(2)."""
    os.umask(mask)


def open_stream(machine: Machine, slot: int, path: bytes, flags: int) -> None:
    """A FIFO of the container, or /dev/null. O_RDWR on an output FIFO keeps SIGPIPE away while no logger reads."""
    machine.slots[slot] = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY)


def streams(machine: Machine, slots: tuple[int, int, int], uid: int) -> None:
    """Descriptors 0, 1 and 2, owned by the container's user so that it can open /dev/stdout again.

    An empty stdin slot stands for the container's own null device, which is verified to be that.
    """
    if slots[0] not in machine.slots:
        flags = os.O_RDONLY | os.O_NOCTTY
        machine.slots[slots[0]] = mounts.open_device(linux.AT_FDCWD, b"/dev/null", mounts.NULL_DEVICE, flags)
    for target, slot in enumerate(slots):
        fd = machine.slots[slot]
        own(fd, uid)
        os.dup2(fd, target)


def change_directory(machine: Machine, path: bytes) -> None:
    """chdir in a root that is entered already, through no magic link of /proc, and the check that it did not lead out of it."""
    place = linux.openat2(linux.AT_FDCWD, path, os.O_PATH | os.O_DIRECTORY, linux.RESOLVE_NO_MAGICLINKS)
    mounts.enter_directory(place, path)


def own(fd: int, uid: int) -> None:
    """Give a FIFO or terminal to a user; the null device keeps its owner."""
    if uid and os.fstat(fd).st_rdev != mounts.NULL_DEVICE:
        os.fchown(fd, uid, -1)


def own_streams(machine: Machine, uid: int) -> None:
    """Descriptors 0, 1 and 2 as they were inherited, owned by the container's user where their file system lets them be."""
    for fd in range(3):
        try:
            own(fd, uid)
        except OSError as error:
            if error.errno not in (EPERM, EINVAL, EROFS):
                raise


def terminal(machine: Machine, uid: int, rows: int, columns: int) -> None:
    """A new terminal from the container's own devpts as streams, controlling terminal and /dev/console; its master goes to the launcher."""
    console(machine, uid, rows, columns)
    control_terminal(machine)


def console(machine: Machine, uid: int, rows: int, columns: int) -> None:
    """The same, controlling nobody yet (`control_terminal`)."""
    master, slave = new_terminal(machine.root, uid, rows, columns)
    show_console(machine, slave)
    use_terminal(machine, master, slave)


def show_console(machine: Machine, slave: int) -> None:
    """A terminal as /dev/console too."""
    machine.slots[-1] = linux.open_tree(slave, b"", linux.OPEN_TREE_CLONE | linux.AT_EMPTY_PATH)
    mounts.attach(machine, -1, b"/dev/console", True)


def exec_terminal(machine: Machine, uid: int, rows: int, columns: int) -> None:
    """The same for a further process in a container: a terminal of its own, no console, and controlling nobody yet (`control_terminal`)."""
    root = os.open(b"/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    master, slave = new_terminal(root, uid, rows, columns)
    os.close(root)
    use_terminal(machine, master, slave)


def new_terminal(root: int, uid: int, rows: int, columns: int) -> tuple[int, int]:
    """(master, slave) of the devpts beneath a root, which must be that."""
    flags = os.O_RDWR | os.O_NOCTTY
    master = mounts.open_device(root, b"dev/pts/ptmx", mounts.PTMX_DEVICE, flags, mounts.STRICT)
    fcntl.ioctl(master, 0x40045431, b"\0\0\0\0")  # TIOCSPTLCK: unlock
    if rows and columns:
        size = rows.to_bytes(2, "little") + columns.to_bytes(2, "little") + b"\0\0\0\0"
        fcntl.ioctl(master, 0x5414, size)  # TIOCSWINSZ
    slave = fcntl.ioctl(master, linux.TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    os.fchown(slave, uid, -1)
    os.fchmod(slave, 0o620)
    return master, slave


def use_terminal(machine: Machine, master: int, slave: int) -> None:
    """As standard streams; both descriptors are closed, and the launcher has the master."""
    for target in range(3):
        os.dup2(slave, target)
    packets.send(machine.status, wire.TERMINAL, 0, (), (master,))
    os.close(master)
    os.close(slave)


def control_terminal(machine: Machine) -> None:
    """The terminal on standard input controls this process's session."""
    fcntl.ioctl(0, linux.TIOCSCTTY, 0)


def close_slot(machine: Machine, slot: int) -> None:
    """Close a descriptor that must go no further."""
    os.close(machine.slots.pop(slot))


def bounding(machine: Machine, keep: int) -> None:
    """Drop from the bounding set every capability that is not in the mask."""
    for number in range(LAST_CAP + 1):
        if keep >> number & 1:
            continue
        try:
            linux.prctl(linux.PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno == 22:  # past the last one that this kernel knows
                return
            raise


def identity(machine: Machine, uid: int, gid: int, groups: tuple[int, ...]) -> None:
    """Groups, group and user; capabilities outlive the change until `capabilities` sets them."""
    linux.prctl(linux.PR_SET_KEEPCAPS, 1)
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    # The sysctl fs.suid_dumpable may let a process that changes its user be looked into again.
    linux.prctl(linux.PR_SET_DUMPABLE, 0)


def capabilities(machine: Machine, effective: int, permitted: int, inheritable: int, ambient: int) -> None:
    """The sets at last. Capabilities that the launcher lacks are left out (`foresee_capabilities`)."""
    own = linux.capget()
    linux.capset(effective & own, permitted & own, inheritable & own)
    ambient &= own
    for number in range(LAST_CAP + 1):
        if ambient >> number & 1:
            linux.prctl(linux.PR_CAP_AMBIENT, linux.PR_CAP_AMBIENT_RAISE, number)


def foresee_capabilities(machine: Machine, permitted: int) -> None:
    """The warning that `capabilities` is going to deserve."""
    lacking = permitted & ~linux.capget()
    if lacking:
        machine.warnings.append(b"capabilities %x are not the launcher's to give" % lacking)


def warn(machine: Machine, text: bytes) -> None:
    """Something that whoever compiled the plan found to be left out."""
    machine.warnings.append(text)


def no_new_privileges(machine: Machine) -> None:
    """PR_SET_NO_NEW_PRIVS."""
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)


def seccomp(machine: Machine, program: bytes, flags: int) -> None:
    """Load a filter here and now: for a child that keeps its privileges until it is dropped by later steps."""
    number = linux.SeccompProgram(program, flags).load()
    if number:
        raise OSError(number, os.strerror(number), "seccomp filter")


def seccomp_last(machine: Machine, program: bytes, flags: int) -> None:
    """Make a filter ready, to be loaded as the last act before execve."""
    machine.program = linux.SeccompProgram(program, flags)


OPERATIONS: dict[str, Callable[..., None]] = {
    "hide": hide,
    "join_cgroup": join_cgroup,
    "open_namespace": open_namespace,
    "enter": enter,
    "unshare": unshare,
    "hostname": hostname,
    "write_file": write_file,
    "oom_score": oom_score,
    "rlimit": rlimit,
    "foresee_rlimit": foresee_rlimit,
    "session": session,
    "default_signals": default_signals,
    "lead_session": lead_session,
    "keyring": keyring,
    "umask": umask,
    "open_stream": open_stream,
    "streams": streams,
    "own_streams": own_streams,
    "change_directory": change_directory,
    "terminal": terminal,
    "console": console,
    "exec_terminal": exec_terminal,
    "control_terminal": control_terminal,
    "close_slot": close_slot,
    "bounding": bounding,
    "identity": identity,
    "capabilities": capabilities,
    "foresee_capabilities": foresee_capabilities,
    "warn": warn,
    "no_new_privileges": no_new_privileges,
    "seccomp": seccomp,
    "seccomp_last": seccomp_last,
}
