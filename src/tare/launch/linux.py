"""System calls that Python 3.11 has no name for: each bound once, a few lines long, raising OSError with its subject.

Knows nothing of containers. `PyDLL` keeps the interpreter's lock during a call: these processes have one thread.
"""

from __future__ import annotations

import os

from tare.launch import foreign as ctypes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

libc = ctypes.PyDLL(None, use_errno=True)
syscall = libc.syscall
syscall.restype = ctypes.c_long


def typed(*kinds: Any) -> Any:
    """syscall(2) with a number and arguments of these types, for calls that a start makes often: values are taken as they are, which is quicker."""
    function = libc["syscall"]
    function.restype, function.argtypes = ctypes.c_long, (ctypes.c_long, *kinds)
    return function


_X86 = os.uname().machine == "x86_64"
NR_CLONE = 56 if _X86 else 220
NR_PIVOT_ROOT = 155 if _X86 else 41
NR_KEYCTL = 250 if _X86 else 219
NR_SECCOMP = 317 if _X86 else 277
NR_OPEN_TREE = 428
NR_MOVE_MOUNT = 429
NR_FSOPEN = 430
NR_FSCONFIG = 431
NR_FSMOUNT = 432
NR_CLONE3 = 435
NR_CLOSE_RANGE = 436
NR_OPENAT2 = 437
NR_MOUNT_SETATTR = 442

CLONE_NEWTIME = 0x80
CLONE_PIDFD = 0x1000
CLONE_PARENT = 0x8000
CLONE_NEWNS = 0x20000
CLONE_NEWCGROUP = 0x2000000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
CLONE_INTO_CGROUP = 0x200000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC = 32, 4096, 16384
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED = 1 << 17, 1 << 18, 1 << 19, 1 << 20
MNT_DETACH, UMOUNT_NOFOLLOW = 2, 8

MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC = 1, 2, 4, 8
MOUNT_ATTR_RELATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_STRICTATIME, MOUNT_ATTR_ATIME = 0, 0x10, 0x20, 0x70
MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_NOSYMFOLLOW = 0x80, 0x200000
MOUNT_ATTR_IDMAP = 0x100000

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100
OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = 0o2000000
MOVE_MOUNT_F_EMPTY_PATH = 4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSCONFIG_SET_FD, FSCONFIG_CMD_CREATE = 0, 1, 5, 6

RESOLVE_NO_XDEV = 1
RESOLVE_NO_MAGICLINKS = 2
RESOLVE_NO_SYMLINKS = 4
RESOLVE_BENEATH = 8
RESOLVE_IN_ROOT = 16

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_NAME = 1, 4, 8, 15
PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 24, 36, 38, 47
PR_CAP_AMBIENT_RAISE, PR_CAP_AMBIENT_CLEAR_ALL = 2, 4

CLOSE_RANGE_CLOEXEC = 4
SECCOMP_SET_MODE_FILTER = 1
KEYCTL_JOIN_SESSION_KEYRING = 1
FIONREAD = 0x541B
OPENAT2_TRIES = 128
EAGAIN = 11
TIOCGPTPEER = 0x5441
TIOCSCTTY = 0x540E


def check(result: int, doing: str) -> int:
    """The result, or OSError with errno and what was being done as its file name."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), doing)
    return result


class CloneArgs(ctypes.Structure):
    """struct clone_args of clone3(2)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "flags",
            "pidfd",
            "child_tid",
            "parent_tid",
            "exit_signal",
            "stack",
            "stack_size",
            "tls",
            "set_tid",
            "set_tid_size",
            "cgroup",
        )
    )


def clone3(flags: int = 0, cgroup: int = -1) -> tuple[int, int]:
    """Fork into new namespaces, and into the v2 cgroup whose directory's descriptor is given: (pid, pidfd), or (0, -1) in the child."""
    arguments = CloneArgs()
    pidfd = ctypes.c_int(-1)
    arguments.flags = flags | CLONE_PIDFD
    arguments.pidfd = ctypes.addressof(pidfd)
    if not flags & CLONE_PARENT:
        arguments.exit_signal = 17
    if cgroup >= 0:
        arguments.flags |= CLONE_INTO_CGROUP
        arguments.cgroup = cgroup
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = syscall(ctypes.c_long(NR_CLONE3), ctypes.byref(arguments), ctypes.c_size_t(ctypes.sizeof(arguments)))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0, -1
    number = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, os.strerror(number), "clone3")
    return pid, pidfd.value


def clone_parent() -> tuple[int, int]:
    """Fork a child of this process's parent, by clone(2), which a filter can look into: (pid, pidfd), or (0, -1) in the child."""
    pidfd = ctypes.c_int(-1)
    zero = ctypes.c_long(0)
    flags = ctypes.c_ulong(CLONE_PARENT | CLONE_PIDFD)
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = syscall(ctypes.c_long(NR_CLONE), flags, zero, ctypes.byref(pidfd), zero, zero)
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0, -1
    number = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, os.strerror(number), "clone")
    return pid, pidfd.value


def unshare(flags: int) -> None:
    """unshare(2)."""
    check(libc.unshare(ctypes.c_int(flags)), "unshare")


def setns(fd: int, kinds: int, name: str = "namespace") -> None:
    """setns(2) into one namespace, or into several of a process's by its pidfd."""
    check(libc.setns(ctypes.c_int(fd), ctypes.c_int(kinds)), f"setns {name}")


_prctl = libc["prctl"]
_prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


def prctl(option: int, a: int = 0, b: int = 0, c: int = 0, d: int = 0) -> int:
    """prctl(2)."""
    result: int = _prctl(option, a, b, c, d)
    return result if result >= 0 else check(result, f"prctl {option}")


def set_name(name: bytes) -> None:
    """What `ps` shows as this process's name (15 bytes)."""
    buffer = ctypes.create_string_buffer(name[:15])
    prctl(PR_SET_NAME, ctypes.addressof(buffer))


def sethostname(name: bytes) -> None:
    """sethostname(2) of this UTS namespace."""
    check(libc.sethostname(ctypes.c_char_p(name), ctypes.c_size_t(len(name))), "sethostname")


def setdomainname(name: bytes) -> None:
    """setdomainname(2) of this UTS namespace."""
    check(libc.setdomainname(ctypes.c_char_p(name), ctypes.c_size_t(len(name))), "setdomainname")


def filesystem_type(fd: int) -> int:
    """f_type of fstatfs(2)."""
    words = (ctypes.c_long * 32)()  # struct statfs is shorter; its first member is the type
    check(libc.fstatfs(ctypes.c_int(fd), words), "fstatfs")
    return int(words[0]) & 0xFFFFFFFF


def mount(source: bytes | None, target: bytes, kind: bytes | None, flags: int = 0, data: bytes | None = None) -> None:
    """mount(2), for what the newer calls cannot do on older kernels."""
    text = ctypes.c_char_p
    result = libc.mount(text(source), text(target), text(kind), ctypes.c_ulong(flags), text(data))
    check(result, f"mount {os.fsdecode(target)}")


def umount(target: bytes, flags: int = 0) -> None:
    """umount2(2)."""
    check(libc.umount2(ctypes.c_char_p(target), ctypes.c_int(flags)), f"umount {os.fsdecode(target)}")


def pivot_root(new: bytes, old: bytes) -> None:
    """pivot_root(2)."""
    check(syscall(ctypes.c_long(NR_PIVOT_ROOT), ctypes.c_char_p(new), ctypes.c_char_p(old)), "pivot_root")


_open_tree = typed(ctypes.c_long, ctypes.c_char_p, ctypes.c_long)


def open_tree(directory: int, path: bytes, flags: int) -> int:
    """open_tree(2); with OPEN_TREE_CLONE the result is a detached bind mount."""
    result: int = _open_tree(NR_OPEN_TREE, directory, path, flags | OPEN_TREE_CLOEXEC)
    return result if result >= 0 else check(result, os.fsdecode(path))


_move_mount = typed(ctypes.c_long, ctypes.c_char_p, ctypes.c_long, ctypes.c_char_p, ctypes.c_long)


def move_mount(tree: int, directory: int, path: bytes = b"") -> None:
    """move_mount(2): attach a detached mount onto `path` under the directory, or onto the directory itself."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if path else MOVE_MOUNT_T_EMPTY_PATH)
    result = _move_mount(NR_MOVE_MOUNT, tree, b"", directory, path, flags)
    if result < 0:
        check(result, f"move_mount {os.fsdecode(path)}".rstrip())


def fsopen(kind: bytes) -> int:
    """fsopen(2)."""
    result = syscall(ctypes.c_long(NR_FSOPEN), ctypes.c_char_p(kind), ctypes.c_long(1))
    return check(result, f"fsopen {os.fsdecode(kind)}")


_fsconfig = typed(ctypes.c_long, ctypes.c_long, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_long)


def fsconfig(context: int, command: int, key: bytes | None = None, value: bytes | None = None, fd: int = 0) -> None:
    """fsconfig(2). A value is at most 255 bytes long; `fd` is that of FSCONFIG_SET_FD."""
    result = _fsconfig(NR_FSCONFIG, context, command, key, value, fd)
    if result < 0:
        error = ctypes.get_errno()
        setting = os.fsdecode(key or b"create") + (f"={os.fsdecode(value)}" if value is not None else "")
        raise OSError(error, explain(context) or os.strerror(error), f"fsconfig {setting}")


def explain(context: int) -> str:
    """What the kernel says of a file system context's failure: its last message, without the level letter."""
    try:
        return os.read(context, 4096).decode(errors="replace").strip()[2:]
    except OSError:
        return ""


def fsmount(context: int, attributes: int = 0) -> int:
    """fsmount(2): a detached mount with MOUNT_ATTR_ flags."""
    result = syscall(ctypes.c_long(NR_FSMOUNT), ctypes.c_long(context), ctypes.c_long(1), ctypes.c_long(attributes))
    return check(result, "fsmount")


class MountAttr(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("attr_set", "attr_clr", "propagation", "userns_fd"))


_mount_setattr = typed(ctypes.c_long, ctypes.c_char_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t)
MOUNT_ATTR_SIZE = ctypes.sizeof(MountAttr)


def mount_setattr(
    directory: int,
    path: bytes,
    flags: int,
    attributes: int = 0,
    clear: int = 0,
    propagation: int = 0,
    userns: int = 0,
) -> None:
    """mount_setattr(2) with MOUNT_ATTR_ flags and an MS_ propagation."""
    value = ctypes.byref(MountAttr(attributes, clear, propagation, userns))
    result = _mount_setattr(NR_MOUNT_SETATTR, directory, path, flags, value, MOUNT_ATTR_SIZE)
    if result < 0:
        check(result, f"mount_setattr {os.fsdecode(path)}".rstrip())


class OpenHow(ctypes.Structure):
    """struct open_how of openat2(2)."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("flags", "mode", "resolve"))


_openat2 = typed(ctypes.c_long, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t)
OPEN_HOW_SIZE = ctypes.sizeof(OpenHow)


def openat2(directory: int, path: bytes, flags: int, resolve: int, mode: int = 0) -> int:
    """openat2(2), close-on-exec. Where the kernel cannot tell that it stayed beneath the root, since names move, it is asked again."""
    how = ctypes.byref(OpenHow(flags | os.O_CLOEXEC, mode, resolve))
    for _ in range(OPENAT2_TRIES):
        result: int = _openat2(NR_OPENAT2, directory, path, how, OPEN_HOW_SIZE)
        if result >= 0:
            return result
        if ctypes.get_errno() != EAGAIN:
            break
    return check(result, os.fsdecode(path))


def close_range(first: int, last: int = 0xFFFFFFFF, flags: int = 0) -> None:
    """close_range(2)."""
    number = ctypes.c_long(NR_CLOSE_RANGE)
    check(syscall(number, ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(flags)), "close_range")


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """capset(2) of this process, from 64-bit masks."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    low = 0xFFFFFFFF
    sets = (effective, permitted, inheritable)
    data = (ctypes.c_uint32 * 6)(*(value & low for value in sets), *(value >> 32 for value in sets))
    check(libc.capset(header, data), "capset")


def capget() -> int:
    """The permitted set of this process, as a 64-bit mask."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    check(libc.capget(header, data), "capget")
    return int(data[1]) | int(data[4]) << 32


class SockFprog(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("len", ctypes.c_uint16), ("filter", ctypes.c_void_p))


class SeccompProgram:
    """A BPF program made ready, so that loading it allocates nothing. `flags` are SECCOMP_FILTER_FLAG_ bits."""

    def __init__(self, program: bytes, flags: int = 0) -> None:
        self._buffer = ctypes.create_string_buffer(program, len(program))
        self._fprog = SockFprog(len(program) // 8, ctypes.addressof(self._buffer))
        self._arguments: tuple[Any, ...] = (
            ctypes.c_long(NR_SECCOMP),
            ctypes.c_long(SECCOMP_SET_MODE_FILTER),
            ctypes.c_long(flags),
            ctypes.byref(self._fprog),
        )
        self.listener = -1

    def load(self) -> int:
        """Install it: 0, or the errno. With SECCOMP_FILTER_FLAG_NEW_LISTENER `listener` is its descriptor then."""
        self.listener = syscall(*self._arguments)
        return ctypes.get_errno() if self.listener < 0 else 0


def join_session_keyring() -> None:
    """A new, anonymous session keyring."""
    result = syscall(ctypes.c_long(NR_KEYCTL), ctypes.c_long(KEYCTL_JOIN_SESSION_KEYRING), ctypes.c_char_p(None))
    check(result, "keyctl join session keyring")


class Exec:
    """execve with its arrays made beforehand: calling it allocates nothing that matters under a filter."""

    def __init__(self, candidates: list[bytes], argv: list[bytes], environment: list[bytes]) -> None:
        self._candidates = [ctypes.c_char_p(path) for path in candidates]
        self._argv = (ctypes.c_char_p * (len(argv) + 1))(*argv, None)
        self._environment = (ctypes.c_char_p * (len(environment) + 1))(*environment, None)
        self._execve = libc.execve

    def __call__(self) -> int:
        """Try the candidates in order; returns the errno that says most (the first that is not ENOENT or ENOTDIR, else the last)."""
        telling = 0
        last = 2
        for candidate in self._candidates:
            self._execve(candidate, self._argv, self._environment)
            last = ctypes.get_errno()
            if last not in (2, 20) and not telling:
                telling = last
        return telling or last


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat: clock ticks from boot to the process's start. Raises OSError where it is gone."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])


def same_process(pid: int, start: int) -> bool:
    """Whether the process with this PID is the one that started then."""
    try:
        return start_time(pid) == start
    except OSError:
        return False


def recorded(path: str) -> tuple[int, int] | None:
    """(PID, pidfd) of the process that a file names ("PID START"); None where there is no such file or the process is gone."""
    try:
        with open(path, "rb") as file:
            pid, start = (int(word) for word in file.read().split())
        pidfd = os.pidfd_open(pid)
    except (OSError, ValueError):
        return None
    if same_process(pid, start):
        return pid, pidfd
    os.close(pidfd)
    return None


def keep_only(*fds: int, first: int = 3) -> None:
    """Close every descriptor from 3, or another, on but these."""
    for fd in sorted(fds):
        if fd > first:
            close_range(first, fd - 1)
        first = max(first, fd + 1)
    close_range(first)


def replace_file(path: str, data: bytes) -> None:
    """Write a small file of ours so that a reader sees all of it or what was there before."""
    temporary = f"{path}.{os.getpid()}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(fd, view) :]
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
