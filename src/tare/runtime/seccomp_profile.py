"""Which system calls a container may make: the default profile, and the choice among profiles (pure).

The default answers in three ways. What is safe is allowed. What is known and is not gets EPERM, as from a kernel that
forbids it. Everything else, all that was invented after this list among it, gets ENOSYS, as from a kernel that does not have it: so that C
libraries fall back to what they used before, and a profile that is older than the kernel does not break programs.

What is safe depends on the container's capabilities: a call that the kernel itself guards by one is allowed to who has it.

Form: OCI runtime-spec, config-linux.md, "Seccomp". Facts: capabilities(7), syscalls(2), and each call's own manual page.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Collection, Mapping
from typing import Any

from tare.errors import InvalidArgument
from tare.runtime.records import ContainerSecurity, ProfileType
from tare.runtime.spec_process import capabilities

Profile = dict[str, Any]

ALLOW, ERRNO = "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"
ACTIONS = frozenset(
    f"SCMP_ACT_{name}"
    for name in ("KILL", "KILL_THREAD", "KILL_PROCESS", "TRAP", "ERRNO", "TRACE", "LOG", "ALLOW", "NOTIFY")
)
OPERATORS = frozenset(f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))
ARCHITECTURES = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
    "riscv64": ("SCMP_ARCH_RISCV64",),
    "loongarch64": ("SCMP_ARCH_LOONGARCH64",),
    "ppc64le": ("SCMP_ARCH_PPC64LE",),
    "s390x": ("SCMP_ARCH_S390X", "SCMP_ARCH_S390"),
}
"""By what uname says, the first of them its own."""

KNOWN_ARCHITECTURES = frozenset(
    f"SCMP_ARCH_{name}"
    for name in (
        "X86", "X86_64", "X32", "ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32", "PPC", "PPC64",
        "PPC64LE", "S390", "S390X", "PARISC", "PARISC64", "RISCV64", "LOONGARCH64", "M68K", "SH", "SHEB",
    )
)  # fmt: skip
CARRYING = ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE")
NOTIFY = "SCMP_ACT_NOTIFY"

FILES = """
    access arm_fadvise64_64 arm_sync_file_range cachestat chdir chmod chown chown32 close close_range copy_file_range
    creat dup dup2 dup3 faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2
    fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr file_getattr file_setattr flistxattr flock fremovexattr
    fsetxattr fstat fstat64 fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futimesat getcwd getdents getdents64
    getxattr getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch ioctl lchown lchown32 lgetxattr link
    linkat listxattr listxattrat llistxattr lremovexattr lseek _llseek lsetxattr lstat lstat64 mkdir mkdirat mknod mknodat
    name_to_handle_at newfstatat oldfstat oldlstat oldstat open openat openat2 readahead readdir readlink readlinkat
    removexattr removexattrat rename renameat renameat2 rmdir setxattr setxattrat stat stat64 statfs statfs64 statx symlink
    symlinkat sync sync_file_range sync_file_range2 syncfs truncate truncate64 umask unlink unlinkat utime utimensat
    utimensat_time64 utimes
"""
INPUT_OUTPUT = """
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2
    io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit _newselect pipe pipe2 poll ppoll
    ppoll_time64 pread64 preadv preadv2 pselect6 pselect6_time64 pwrite64 pwritev pwritev2 read readv select sendfile
    sendfile64 splice tee vmsplice write writev
"""
MEMORY = """
    brk madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mlock mlock2 mlockall mmap mmap2 mprotect mremap
    mseal msync munlock munlockall munmap pkey_alloc pkey_free pkey_mprotect process_mrelease remap_file_pages
"""
PROCESSES = """
    arch_prctl capget capset execve execveat exit exit_group fork get_robust_list get_thread_area getcpu getegid getegid32
    geteuid geteuid32 getgid getgid32 getgroups getgroups32 getpgid getpgrp getpid getppid getpriority getrandom getresgid
    getresgid32 getresuid getresuid32 getrlimit getrusage getsid gettid getuid getuid32 ioprio_get ioprio_set
    landlock_add_rule landlock_create_ruleset landlock_restrict_self modify_ldt nice olduname oldolduname pidfd_open
    pidfd_send_signal prctl prlimit64 process_vm_readv process_vm_writev ptrace rseq sched_get_priority_max
    sched_get_priority_min sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval
    sched_rr_get_interval_time64 sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp
    set_robust_list set_thread_area set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups
    setgroups32 setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32
    setrlimit setsid setuid setuid32 sysinfo ugetrlimit uname uretprobe vfork wait4 waitid waitpid
"""
SIGNALS_AND_TIME = """
    adjtimex alarm clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64
    clock_nanosleep clock_nanosleep_time64 futex futex_requeue futex_time64 futex_wait futex_waitv futex_wake getitimer
    gettimeofday kill nanosleep pause restart_syscall rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo
    rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo setitimer sgetmask sigaction
    sigaltstack signal signalfd signalfd4 sigpending sigprocmask sigreturn sigsuspend ssetmask tgkill time timer_create
    timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create
    timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill
"""
MESSAGES = """
    accept accept4 bind connect getpeername getsockname getsockopt ipc listen mq_getsetattr mq_notify mq_open
    mq_timedreceive mq_timedreceive_time64 mq_timedsend mq_timedsend_time64 mq_unlink msgctl msgget msgrcv msgsnd recv
    recvfrom recvmmsg recvmmsg_time64 recvmsg semctl semget semop semtimedop semtimedop_time64 send sendmmsg sendmsg sendto
    setsockopt shmat shmctl shmdt shmget shutdown socketcall socketpair
"""
ARM_ONLY = "breakpoint cacheflush get_tls set_tls"

SAFE = tuple(" ".join((FILES, INPUT_OUTPUT, MEMORY, PROCESSES, SIGNALS_AND_TIME, MESSAGES, ARM_ONLY)).split())
"""Allowed to everybody. ptrace is since kernel 4.8, where a tracer can no longer change a call after the filter has seen it."""

WITH_CAPABILITY = {
    "CAP_BPF": "bpf",
    "CAP_DAC_READ_SEARCH": "open_by_handle_at",
    "CAP_PERFMON": "perf_event_open",
    "CAP_SYS_ADMIN": """
        bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick listmount lookup_dcookie mount mount_setattr move_mount
        open_tree open_tree_attr perf_event_open pivot_root quotactl quotactl_fd setdomainname sethostname setns statmount
        syslog umount umount2 unshare
    """,
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_MODULE": "delete_module finit_module init_module",
    "CAP_SYS_NICE": "get_mempolicy mbind migrate_pages move_pages process_madvise set_mempolicy set_mempolicy_home_node",
    "CAP_SYS_PACCT": "acct",
    "CAP_SYS_PTRACE": "kcmp pidfd_getfd process_madvise",
    "CAP_SYS_RAWIO": "ioperm iopl",
    "CAP_SYS_TIME": "clock_settime clock_settime64 settimeofday stime",
    "CAP_SYS_TTY_CONFIG": "vhangup",
    "CAP_SYSLOG": "syslog",
}
"""Allowed to who has the capability, since the kernel guards the call by it."""

NEVER = """
    add_key io_uring_enter io_uring_register io_uring_setup kexec_file_load kexec_load keyctl request_key swapoff swapon
    userfaultfd vm86 vm86old
"""
"""Denied to everybody: keyrings know no namespaces, a new kernel or swap is the node's affair, the others are where kernels were broken most."""

NEW_NAMESPACES = (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
"""CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET: what of clone's flags takes CAP_SYS_ADMIN."""

PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)
"""PER_LINUX, PER_LINUX32, each with UNAME26, and the value that asks for the current one. Others turn protections off."""

ALLOWED_PERSONALITY_BITS = 0x20008
PERSONALITY_BITS = 28

ADDRESS_FAMILIES = 46
AF_VSOCK = 40


def default_profile(granted: Collection[str], machine: str | None = None) -> Profile:
    """The profile that RuntimeDefault means, for a container granted these capabilities ("CAP_…", its bounding set).

    `machine` is as in uname ("x86_64", "aarch64"); None is this one.
    """
    extra = {name for capability, calls in WITH_CAPABILITY.items() if capability in granted for name in calls.split()}
    guarded = {name for calls in WITH_CAPABILITY.values() for name in calls.split()}
    # What these do without the capability is told apart below: by flags, and by a different error.
    apart = {"clone", "clone3"}
    rules = [rule(sorted({*SAFE, *extra})), rule(sorted((guarded - extra - apart) | set(NEVER.split())), errno.EPERM)]
    if "clone" not in extra:
        rules += clone_rules()
    rules += personality_rules()
    rules += socket_rules()
    return {
        "defaultAction": ERRNO,
        "defaultErrnoRet": errno.ENOSYS,
        "architectures": list(ARCHITECTURES.get(machine or os.uname().machine, ())),
        "syscalls": rules,
    }


def rule(names: list[str], number: int | None = None, args: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Allow, or answer with an errno; with conditions on arguments that must all hold."""
    result: dict[str, Any] = {"names": names, "action": ALLOW if number is None else ERRNO}
    if number is not None:
        result["errnoRet"] = number
    if args:
        result["args"] = args
    return result


def argument(index: int, operator: str, value: int, second: int = 0) -> dict[str, Any]:
    """One condition; for MASKED_EQ `value` is the mask."""
    return {"index": index, "value": value, "valueTwo": second, "op": f"SCMP_CMP_{operator}"}


def clone_rules() -> list[dict[str, Any]]:
    """Processes and threads, but no namespaces. clone3 has its flags in memory, where no filter can see them: it does not exist."""
    every = sum(NEW_NAMESPACES)
    return [
        rule(["clone"], args=[argument(0, "MASKED_EQ", every, 0)]),
        *(rule(["clone"], errno.EPERM, [argument(0, "MASKED_EQ", flag, flag)]) for flag in NEW_NAMESPACES),
        rule(["clone3"], errno.ENOSYS),
    ]


def personality_rules() -> list[dict[str, Any]]:
    """Those that do no harm, and EPERM for the others: a bit is set that they do not have, and not all bits.

    A filter cannot say "none of these", only what is one: for each bit, that it is set while the highest, which only
    the question for the current personality has, is not.
    """
    highest = 1 << 31
    bits = [1 << number for number in range(PERSONALITY_BITS) if not ALLOWED_PERSONALITY_BITS >> number & 1]
    return [
        *(rule(["personality"], args=[argument(0, "EQ", value)]) for value in PERSONALITIES),
        *(rule(["personality"], errno.EPERM, [argument(0, "MASKED_EQ", highest | bit, bit)]) for bit in bits),
    ]


def socket_rules() -> list[dict[str, Any]]:
    """Every family of today but vsock, which knows no namespaces and reaches the hypervisor.

    The kernel looks at 32 bits of the family and a filter at 64, so "not 40" could be met by 40 with a bit set above.
    """
    low = 0xFFFFFFFF
    families = [number for number in range(ADDRESS_FAMILIES) if number != AF_VSOCK]
    return [
        *(rule(["socket"], args=[argument(0, "MASKED_EQ", low, family)]) for family in families),
        rule(["socket"], errno.EAFNOSUPPORT, [argument(0, "MASKED_EQ", low, AF_VSOCK)]),
    ]


def localhost_path(security: ContainerSecurity) -> str | None:
    """The file that a Localhost profile is read from; None for any other. Raises InvalidArgument where it is not an absolute path."""
    wanted = security.seccomp
    if wanted is None or security.privileged or wanted.type is not ProfileType.LOCALHOST:
        return None
    path = wanted.localhost_ref.removeprefix("localhost/")
    if not path.startswith("/") or "\0" in path:
        raise InvalidArgument(f"use seccomp profile {path!r}", cause="localhost_ref is not an absolute path")
    return path


def choose_profile(security: ContainerSecurity, localhost: bytes | None = None) -> Profile | None:
    """The profile of a container; None for no filter. `localhost` is the content of the file that `localhost_path` names.

    No profile at all is Unconfined, as CRI's clients expect; a privileged container has none. Raises InvalidArgument for
    a file that is no profile.
    """
    wanted = security.seccomp
    if wanted is None or security.privileged or wanted.type is ProfileType.UNCONFINED:
        return None
    if wanted.type is ProfileType.RUNTIME_DEFAULT:
        return default_profile(capabilities(security.capabilities)["bounding"])
    return parse_profile(wanted.localhost_ref, localhost or b"")


def parse_profile(name: str, text: bytes) -> Profile:
    """A profile from JSON, checked. Raises InvalidArgument, naming the JSON path that is wrong."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"read seccomp profile {name}", cause=error) from error
    check_profile(name, value)
    checked: Profile = value
    return checked


def notifies(profile: Mapping[str, Any]) -> bool:
    """Whether some call is to be answered by a listener."""
    return any(item["action"] == NOTIFY for item in profile.get("syscalls") or ())


def listener(profile: Mapping[str, Any]) -> tuple[str, str] | None:
    """(path of the listener's socket, what it is told besides) of a checked profile; None where no call is for a listener."""
    if not notifies(profile):
        return None
    return profile["listenerPath"], profile.get("listenerMetadata") or ""


def check_profile(name: str, value: object) -> None:
    """Raise InvalidArgument for what is no OCI seccomp object, or one that could not be kept to."""
    profile = mapping(name, "seccomp", value)
    member(name, "defaultAction", profile.get("defaultAction"), ACTIONS)
    check_errno(name, profile, "defaultAction", "defaultErrnoRet", "")
    for index, item in enumerate(strings(name, "architectures", profile.get("architectures") or [])):
        member(name, f"architectures[{index}]", item, KNOWN_ARCHITECTURES)
    strings(name, "flags", profile.get("flags") or [])
    for index, item in enumerate(sequence(name, "syscalls", profile.get("syscalls"))):
        path = f"syscalls[{index}]"
        entry = mapping(name, path, item)
        if not strings(name, f"{path}.names", entry.get("names")):
            raise wrong(name, f"{path}.names", "is empty")
        member(name, f"{path}.action", entry.get("action"), ACTIONS)
        check_errno(name, entry, "action", "errnoRet", f"{path}.")
        check_arguments(name, f"{path}.args", entry.get("args"))
    check_listener(name, profile)


def check_errno(name: str, entry: Mapping[str, Any], action: str, key: str, prefix: str) -> None:
    """Raise InvalidArgument for a number that is none, or is given to an action that has no use for it, as the specification asks."""
    number(name, f"{prefix}{key}", entry.get(key), 4095)
    if entry.get(key) is not None and entry[action] not in CARRYING:
        raise wrong(name, f"{prefix}{key}", f"is set, and {entry[action]} carries no number")


def check_listener(name: str, profile: Mapping[str, Any]) -> None:
    """Raise InvalidArgument for calls that are for a listener and could not come to one."""
    path, metadata = profile.get("listenerPath"), profile.get("listenerMetadata")
    for key, item in (("listenerPath", path), ("listenerMetadata", metadata)):
        if item is not None and not isinstance(item, str):
            raise wrong(name, key, "is not a string")
    if metadata and not path:
        raise wrong(name, "listenerMetadata", "is set without listenerPath")
    if profile["defaultAction"] == NOTIFY:
        raise wrong(name, "defaultAction", f"is {NOTIFY}: the container could not even start")
    if notifies(profile) and not (path or "").startswith("/"):
        raise wrong(name, "listenerPath", f"is not an absolute path, and {NOTIFY} needs one")


def check_arguments(name: str, path: str, value: object) -> None:
    """Raise InvalidArgument for what is no list of conditions."""
    for index, item in enumerate(sequence(name, path, value)):
        here = f"{path}[{index}]"
        entry = mapping(name, here, item)
        if entry.get("index") is None:
            raise wrong(name, f"{here}.index", "is absent")
        number(name, f"{here}.index", entry.get("index"), 5)
        if entry.get("value") is None:
            raise wrong(name, f"{here}.value", "is absent")
        for key in ("value", "valueTwo"):
            number(name, f"{here}.{key}", entry.get(key), (1 << 64) - 1)
        member(name, f"{here}.op", entry.get("op"), OPERATORS)


def mapping(name: str, path: str, value: object) -> Mapping[str, Any]:
    """The value, which must be an object."""
    if not isinstance(value, dict):
        raise wrong(name, path, "is not an object")
    return value


def sequence(name: str, path: str, value: object) -> list[Any]:
    """The value, which must be a list, or absent."""
    if value is not None and not isinstance(value, list):
        raise wrong(name, path, "is not a list")
    return value or []


def strings(name: str, path: str, value: object) -> list[str]:
    """The value, which must be a list of strings."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong(name, path, "is not a list of strings")
    return value


def member(name: str, path: str, value: object, allowed: Collection[str]) -> None:
    """Raise InvalidArgument for a word that is none of those."""
    if value not in allowed:
        raise wrong(name, path, f"{value!r} is none of {', '.join(sorted(allowed))}")


def number(name: str, path: str, value: object, highest: int) -> None:
    """Raise InvalidArgument for what is neither absent nor a whole number in range."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= highest):
        raise wrong(name, path, f"{value!r} is not a whole number up to {highest}")


def wrong(name: str, path: str, cause: str) -> InvalidArgument:
    """An error about one place in a profile."""
    return InvalidArgument(f"read seccomp profile {name}", cause=f"{path} {cause}")
