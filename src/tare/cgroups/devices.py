"""The device cgroup: OCI's rules as lines for v1's files, and as a BPF program that is attached to a v2 group.

The rules are in order, and the last that matches decides; where none matches, nothing is allowed. Of an access that asks
for several things (read and write), an allowing rule must have all and a denying one any.

Source: OCI runtime-spec, config-linux.md, "Allowed Device list"; kernel bpf(2), struct bpf_cgroup_dev_ctx.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from tare.cgroups.section import Section
from tare.launch import linux

MKNOD, READ, WRITE = 1, 2, 4
LETTERS = {"r": READ, "w": WRITE, "m": MKNOD}
EVERYTHING = MKNOD | READ | WRITE
BLOCK, CHARACTER = 1, 2
TYPES = {"a": None, "b": BLOCK, "c": CHARACTER, "u": CHARACTER}
HIGHEST = (1 << 31) - 1

NR_BPF = 321 if os.uname().machine == "x86_64" else 280
PROG_LOAD, PROG_ATTACH = 5, 8
PROG_TYPE_CGROUP_DEVICE, ATTACH_CGROUP_DEVICE, ALLOW_MULTI = 15, 6, 2
LICENSE = ctypes.create_string_buffer(b"Apache-2.0")

INSTRUCTION = struct.Struct("<BBhi")
LOAD_WORD, MOVE_REGISTER, MOVE, AND, SHIFT_RIGHT, JUMP_EQUAL, JUMP_UNEQUAL, EXIT = (
    0x61, 0xBF, 0xB7, 0x54, 0x74, 0x15, 0x55, 0x95,
)  # fmt: skip
ANSWER, CONTEXT, TYPE, ACCESS, MAJOR, MINOR = 0, 1, 2, 3, 4, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """`type` BLOCK, CHARACTER or None for both; None for a number is any; `access` bits of MKNOD, READ, WRITE."""

    allow: bool
    type: int | None = None
    major: int | None = None
    minor: int | None = None
    access: int = EVERYTHING

    @property
    def sweeping(self) -> bool:
        """Whether it is about all devices and all that can be done to them."""
        return (self.type, self.major, self.minor, self.access) == (None, None, None, EVERYTHING)


def parse(sections: Iterable[Section]) -> tuple[Rule, ...]:
    """`linux.resources.devices`. Raises InvalidArgument."""
    rules = []
    for section in sections:
        kind, access = section.text("type") or "a", section.text("access") or "rwm"
        if kind == "p":
            continue
        if kind not in TYPES or not set(access) <= set(LETTERS):
            raise section.wrong("type", f"{kind!r} with access {access!r} is no device rule")
        numbers = [section.integer(key, -1, HIGHEST) for key in ("major", "minor")]
        major, minor = (None if number is None or number < 0 else number for number in numbers)
        bits = sum(LETTERS[letter] for letter in set(access))
        rules.append(
            Rule(allow=section.flag("allow") or False, type=TYPES[kind], major=major, minor=minor, access=bits)
        )
    return tuple(rules)


def lines(rules: Sequence[Rule]) -> list[tuple[str, str]]:
    """(file, line) for a v1 group, which begins with what its parent may: allowing all first says nothing."""
    found = []
    for index, rule in enumerate(rules):
        file = "devices.allow" if rule.allow else "devices.deny"
        if rule.sweeping:
            if index or not rule.allow:
                found.append((file, "a"))
            continue
        access = "".join(letter for letter, bit in LETTERS.items() if rule.access & bit)
        numbers = ":".join("*" if number is None else str(number) for number in (rule.major, rule.minor))
        kinds = {BLOCK: "b", CHARACTER: "c"}
        for kind in kinds if rule.type is None else (rule.type,):
            found.append((file, f"{kinds[kind]} {numbers} {access}"))
    return found


def merged(rules: Sequence[Rule]) -> list[Rule]:
    """Allowing rules for the same device, with no denying one between them, made one: so that "r" and "w" allow both together."""
    found: list[Rule] = []
    start = 0
    for rule in rules:
        if rule.sweeping:
            found.clear()
        if not rule.allow or rule.sweeping:
            found.append(rule)
            start = len(found)
            continue
        same = (rule.type, rule.major, rule.minor)
        for index in range(start, len(found)):
            other = found[index]
            if (other.type, other.major, other.minor) == same:
                found[index] = replace(other, access=other.access | rule.access)
                break
        else:
            found.append(rule)
    return found


def program(rules: Sequence[Rule]) -> bytes:
    """BPF of type CGROUP_DEVICE: 1 to allow, 0 to deny."""
    code = [
        instruction(LOAD_WORD, TYPE, CONTEXT, 0),
        instruction(MOVE_REGISTER, ACCESS, TYPE),
        instruction(AND, TYPE, value=0xFFFF),
        instruction(SHIFT_RIGHT, ACCESS, value=16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8),
    ]
    for rule in reversed(merged(rules)):
        code += block(rule)
        if rule.sweeping:
            return b"".join(code)
    code += [instruction(MOVE, ANSWER, value=0), instruction(EXIT)]
    return b"".join(code)


def block(rule: Rule) -> list[bytes]:
    """One rule: jumps over its answer where it does not match."""
    tests: list[tuple[int, int, int]] = []
    if rule.type is not None:
        tests.append((JUMP_UNEQUAL, TYPE, rule.type))
    if rule.major is not None:
        tests.append((JUMP_UNEQUAL, MAJOR, rule.major))
    if rule.minor is not None:
        tests.append((JUMP_UNEQUAL, MINOR, rule.minor))
    rights: list[bytes] = []
    if rule.access != EVERYTHING:
        # The context's register is free once its three words are loaded.
        mask = EVERYTHING & ~rule.access if rule.allow else rule.access
        jump = JUMP_UNEQUAL if rule.allow else JUMP_EQUAL
        rights = [
            instruction(MOVE_REGISTER, CONTEXT, ACCESS),
            instruction(AND, CONTEXT, value=mask),
            instruction(jump, CONTEXT, offset=2, value=0),
        ]
    answer = [instruction(MOVE, ANSWER, value=int(rule.allow)), instruction(EXIT)]
    length = len(tests) + len(rights) + len(answer)
    jumps = [
        instruction(code, register, offset=length - index - 1, value=value)
        for index, (code, register, value) in enumerate(tests)
    ]
    return jumps + rights + answer


def instruction(code: int, target: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """struct bpf_insn."""
    return INSTRUCTION.pack(code, target | source << 4, offset, value)


class LoadAttributes(ctypes.Structure):
    """The part of union bpf_attr that BPF_PROG_LOAD needs."""

    _fields_ = [
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_uint64),
        ("kern_version", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
    ]


class AttachAttributes(ctypes.Structure):
    """The part that BPF_PROG_ATTACH needs."""

    _fields_ = [
        ("target_fd", ctypes.c_uint32),
        ("attach_bpf_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
    ]


def bpf(command: int, attributes: ctypes.Structure, doing: str) -> int:
    """bpf(2)."""
    size = ctypes.c_uint(ctypes.sizeof(attributes))
    result = linux.syscall(ctypes.c_long(NR_BPF), ctypes.c_int(command), ctypes.byref(attributes), size)
    return linux.check(result, doing)


def attach(directory: str, code: bytes) -> None:
    """Let a program decide for the v2 group in `directory`, together with those of the groups above. It lives as long as the group."""
    buffer = ctypes.create_string_buffer(code, len(code))
    load = LoadAttributes(
        prog_type=PROG_TYPE_CGROUP_DEVICE,
        insn_cnt=len(code) // INSTRUCTION.size,
        insns=ctypes.addressof(buffer),
        license=ctypes.addressof(LICENSE),
    )
    loaded = bpf(PROG_LOAD, load, "load a device program")
    try:
        group = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            target = AttachAttributes(group, loaded, ATTACH_CGROUP_DEVICE, ALLOW_MULTI)
            bpf(PROG_ATTACH, target, f"attach a device program to {directory}")
        finally:
            os.close(group)
    finally:
        os.close(loaded)
