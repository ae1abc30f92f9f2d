"""The configuration of a Linux container as tables of checks: types, ranges, names (OCI runtime specification 1.2, config.md, config-linux.md)."""

from __future__ import annotations

import resource

from tare.handlers.shapes import (
    INT32,
    INT64,
    UINT32,
    UINT64,
    InvalidConfig,
    absolute,
    array,
    boolean,
    filled,
    members,
    one_of,
    record,
    show,
    text,
    variable,
    whole,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

uint32, uint64 = whole(0, UINT32), whole(0, UINT64)
int32, int64 = whole(-INT32 - 1, INT32), whole(-INT64 - 1, INT64)
texts = array(text)
paths = array(absolute)
LIMIT_NAMES = tuple(name for name in dir(resource) if name.startswith("RLIMIT_") and name != "RLIMIT_OFILE")
POLICIES = ("SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_ISO", "SCHED_IDLE", "SCHED_DEADLINE")
SCHEDULER_FLAGS = tuple(
    f"SCHED_FLAG_{name}"
    for name in (
        "RESET_ON_FORK",
        "RECLAIM",
        "DL_OVERRUN",
        "KEEP_POLICY",
        "KEEP_PARAMS",
        "UTIL_CLAMP_MIN",
        "UTIL_CLAMP_MAX",
    )
)
ACTIONS = tuple(
    f"SCMP_ACT_{name}"
    for name in ("KILL", "KILL_PROCESS", "KILL_THREAD", "TRAP", "ERRNO", "TRACE", "ALLOW", "LOG", "NOTIFY")
)
OPERATORS = tuple(f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))
FILTER_FLAGS = tuple(f"SECCOMP_FILTER_FLAG_{name}" for name in ("TSYNC", "LOG", "SPEC_ALLOW", "WAIT_KILLABLE_RECV"))
ARCHITECTURES = tuple(
    f"SCMP_ARCH_{name}"
    for name in (
        *("X86", "X86_64", "X32", "ARM", "AARCH64", "MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64"),
        *("MIPSEL64N32", "PPC", "PPC64", "PPC64LE", "S390", "S390X", "PARISC", "PARISC64", "RISCV64"),
        *("LOONGARCH64", "M68K", "SH", "SHEB"),
    )
)


def page_size(value: Any, path: str) -> None:
    """Such as 2MB: digits, then KB, MB or GB."""
    text(value, path)
    digits = value[:-2]
    if value[-2:] not in ("KB", "MB", "GB") or not digits.isdecimal() or digits.startswith("0"):
        raise InvalidConfig(path, f"{show(value)} is not a page size such as 2MB")


def access(value: Any, path: str) -> None:
    """Of r, w and m."""
    text(value, path)
    if value.strip("rwm"):
        raise InvalidConfig(path, f"{show(value)} has letters other than r, w and m")


def group_path(value: Any, path: str) -> None:
    """A control group's path, or slice:prefix:name."""
    text(value, path)
    if ".." in value.split("/") or "\n" in value:
        raise InvalidConfig(path, f"{show(value)} leads out of the control group tree")


HOOK = record(
    {"path": absolute, "args": texts, "env": array(variable), "timeout": whole(1, INT64)},
    ("path",),
)
HOOKS = record(
    {
        name: array(HOOK)
        for name in ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
    }
)
MAPPINGS = array(
    record(
        {"containerID": uint32, "hostID": uint32, "size": whole(1, UINT32)}, required=("containerID", "hostID", "size")
    )
)
MOUNT = record(
    {
        "destination": absolute,
        "type": text,
        "source": text,
        "options": texts,
        "uidMappings": MAPPINGS,
        "gidMappings": MAPPINGS,
    },
    ("destination",),
)
# A name that is unknown is no error, says the specification, but warned of: `handlers.identity` does that.
CAPABILITIES = record(dict.fromkeys(("bounding", "effective", "inheritable", "permitted", "ambient"), texts))
SCHEDULER = record(
    {
        "policy": one_of(*POLICIES),
        "nice": whole(-20, 19),
        "priority": whole(0, 99),
        "flags": array(one_of(*SCHEDULER_FLAGS)),
        "runtime": uint64,
        "deadline": uint64,
        "period": uint64,
    },
    ("policy",),
)
PROCESS = record(
    {
        "terminal": boolean,
        "consoleSize": record({"height": whole(0, 65535), "width": whole(0, 65535)}, ("height", "width")),
        "user": record(
            {
                "uid": whole(0, UINT32 - 1),
                "gid": whole(0, UINT32 - 1),
                "umask": whole(0, 0o777),
                "additionalGids": array(whole(0, UINT32 - 1)),
                "username": text,
            },
            ("uid", "gid"),
        ),
        "args": array(text, at_least=1),
        "env": array(variable),
        "cwd": absolute,
        "capabilities": CAPABILITIES,
        "rlimits": array(
            record({"type": one_of(*LIMIT_NAMES), "soft": uint64, "hard": uint64}, ("type", "soft", "hard"))
        ),
        "noNewPrivileges": boolean,
        "apparmorProfile": text,
        "selinuxLabel": text,
        "oomScoreAdj": whole(-1000, 1000),
        "scheduler": SCHEDULER,
        "ioPriority": record(
            {
                "class": one_of("IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE"),
                "priority": whole(0, 7),
            },
            ("class",),
        ),
        "execCPUAffinity": record({"initial": text, "final": text}),
    },
    ("user", "args", "cwd"),
)
DEVICE = record(
    {
        "path": absolute,
        "type": one_of("c", "b", "u", "p"),
        "major": whole(0, INT32),
        "minor": whole(0, INT32),
        "fileMode": whole(0, 0o177777),  # some say the type here too, which counts for nothing
        "uid": uint32,
        "gid": uint32,
    },
    ("path", "type"),
)
NAMESPACE = record(
    {"type": one_of("pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time"), "path": text}, ("type",)
)
OFFSET = record({"secs": int64, "nanosecs": whole(0, 999_999_999)})
WEIGHT = {"major": int64, "minor": int64, "weight": whole(0, 1000), "leafWeight": whole(0, 1000)}
THROTTLES = array(record({"major": int64, "minor": int64, "rate": uint64}, ("major", "minor", "rate")))
RESOURCES = record(
    {
        "unified": members(text),
        "devices": array(
            record(
                {
                    "allow": boolean,
                    "type": one_of("", "a", "b", "c", "u"),
                    "major": int64,
                    "minor": int64,
                    "access": access,
                },
                ("allow",),
            )
        ),
        "memory": record(
            {
                **dict.fromkeys(("limit", "reservation", "swap", "kernel", "kernelTCP"), int64),
                "swappiness": whole(0, UINT64),
                **dict.fromkeys(("disableOOMKiller", "useHierarchy", "checkBeforeUpdate"), boolean),
            }
        ),
        "cpu": record(
            {
                **dict.fromkeys(("shares", "period", "burst", "realtimePeriod"), uint64),
                **dict.fromkeys(("quota", "realtimeRuntime"), int64),
                "idle": whole(0, 1),
                "cpus": text,
                "mems": text,
            }
        ),
        "pids": record({"limit": int64}),
        "blockIO": record(
            {
                "weight": whole(0, 1000),
                "leafWeight": whole(0, 1000),
                "weightDevice": array(record(WEIGHT, ("major", "minor"))),
                **{f"throttle{name}Device": THROTTLES for name in ("ReadBps", "WriteBps", "ReadIOPS", "WriteIOPS")},
            }
        ),
        "hugepageLimits": array(record({"pageSize": page_size, "limit": uint64}, ("pageSize", "limit"))),
        "network": record(
            {
                "classID": uint32,
                "priorities": array(record({"name": filled, "priority": uint32}, ("name", "priority"))),
            }
        ),
        "rdma": members(record({"hcaHandles": uint32, "hcaObjects": uint32})),
    }
)
SECCOMP = record(
    {
        "defaultAction": one_of(*ACTIONS),
        "defaultErrnoRet": uint32,
        "flags": array(one_of(*FILTER_FLAGS)),
        "listenerPath": text,
        "listenerMetadata": text,
        "architectures": array(one_of(*ARCHITECTURES)),
        "syscalls": array(
            record(
                {
                    "names": array(filled, at_least=1),
                    "action": one_of(*ACTIONS),
                    "errnoRet": uint32,
                    "args": array(
                        record(
                            {"index": whole(0, 5), "value": uint64, "valueTwo": uint64, "op": one_of(*OPERATORS)},
                            ("index", "value", "op"),
                        )
                    ),
                },
                ("names", "action"),
            )
        ),
    },
    ("defaultAction",),
)
PROPAGATIONS = ("private", "rprivate", "slave", "rslave", "shared", "rshared", "unbindable", "runbindable")
LINUX = record(
    {
        "namespaces": array(NAMESPACE),
        "uidMappings": MAPPINGS,
        "gidMappings": MAPPINGS,
        "timeOffsets": record({"monotonic": OFFSET, "boottime": OFFSET}),
        "devices": array(DEVICE),
        "cgroupsPath": group_path,
        "resources": RESOURCES,
        "intelRdt": record(
            {
                "closID": text,
                "l3CacheSchema": text,
                "memBwSchema": text,
                "schemata": texts,
                "enableMonitoring": boolean,
                "enableCMT": boolean,
                "enableMBM": boolean,
            }
        ),
        "sysctl": members(text),
        "seccomp": SECCOMP,
        "rootfsPropagation": one_of("", *PROPAGATIONS),
        "maskedPaths": paths,
        "readonlyPaths": paths,
        "mountLabel": text,
        "personality": record({"domain": one_of("LINUX", "LINUX32"), "flags": array(text)}, ("domain",)),
    }
)
CONFIG = record(
    {
        "ociVersion": text,
        "root": record({"path": filled, "readonly": boolean}, ("path",)),
        "process": PROCESS,
        "hostname": text,
        "domainname": text,
        "mounts": array(MOUNT),
        "hooks": HOOKS,
        "annotations": members(text),
        "linux": LINUX,
    },
    ("ociVersion", "root", "process"),
)
