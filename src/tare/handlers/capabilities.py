"""Capabilities by name, as the kernel numbers them (capabilities(7), linux/capability.h). Pure."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

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


def mask(wanted: Iterable[str]) -> tuple[int, list[str]]:
    """A capability mask, and the names that are unknown here."""
    bits = 0
    unknown = []
    for name in wanted:
        if name in CAPABILITY_BITS:
            bits |= CAPABILITY_BITS[name]
        else:
            unknown.append(name)
    return bits, unknown


def names(bits: int) -> list[str]:
    """The names of a mask's capabilities."""
    return [name for name, bit in CAPABILITY_BITS.items() if bits & bit]
