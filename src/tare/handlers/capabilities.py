"""Capabilities by name, as the kernel numbers them (capabilities(7), linux/capability.h). Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tare.errors import InvalidArgument

CAPABILITIES = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
]
CAPABILITY_BITS = {f"CAP_{name}": 1 << number for number, name in enumerate(CAPABILITIES)}


def mask(names: Sequence[str]) -> int:
    """A capability mask; names that the kernel may know and this table does not are refused."""
    bits = 0
    for name in names:
        if name not in CAPABILITY_BITS:
            raise InvalidArgument("set capabilities", cause=f"unknown capability {name}")
        bits |= CAPABILITY_BITS[name]
    return bits
