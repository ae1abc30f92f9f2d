"""System calls that are newer than libseccomp, or than a profile: a few BPF instructions before the program that libseccomp makes (pure).

    call that the profile names and libseccomp does not know      its action
    call with a number above all that the profile names           ENOSYS, unless the default action lets calls pass
    any other                                                     libseccomp's program

ENOSYS is what a C library has to see to fall back to an older call, where a profile written before the kernel would say EPERM, or kill.
The kernel can still foresee that a call is always allowed: only the call's number and architecture are looked at.

Source: Linux's syscall tables, alike for all architectures from 424 on; seccomp(2); kernel userspace-api/seccomp_filter.rst.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

INSTRUCTION = struct.Struct("<HBBI")
LOAD, JUMP, EQUAL, GREATER, AT_LEAST, RETURN = 0x20, 0x05, 0x15, 0x25, 0x35, 0x06
NUMBER_AT, ARCHITECTURE_AT = 0, 4
NOT_THERE = 0x00050000 | errno.ENOSYS

X32_BIT = 0x40000000
END = 1 << 32
AUDIT_X86_64, AUDIT_ARM = 0xC000003E, 0x40000028
X32 = X32_BIT | 0x3E
ARM_PRIVATE = 0x0F0000
"""Above all that the table of 32-bit ARM has: cacheflush, set_tls and the like."""

COMMON = {
    "cachestat": 451,
    "fchmodat2": 452,
    "map_shadow_stack": 453,
    "futex_wake": 454,
    "futex_wait": 455,
    "futex_requeue": 456,
    "statmount": 457,
    "listmount": 458,
    "lsm_get_self_attr": 459,
    "lsm_set_self_attr": 460,
    "lsm_list_modules": 461,
    "mseal": 462,
    "setxattrat": 463,
    "getxattrat": 464,
    "listxattrat": 465,
    "removexattrat": 466,
    "open_tree_attr": 467,
    "file_getattr": 468,
    "file_setattr": 469,
    "listns": 470,
}
"""What Linux 6.5 to 6.19 brought to every architecture; libseccomp 2.5 ends before it, or (Debian's) in the middle."""

X86_64_ALONE = {"uretprobe": 335, "uprobe": 336}
"""Numbers that x86_64 filled in later, in 6.11 and 6.18."""


@dataclass(slots=True, kw_only=True)
class Table:
    """What a profile says of one architecture, by libseccomp's token for it.

    `highest` is the highest number that it names (−1: none), `actions` what is to be answered to calls that libseccomp does not know.
    """

    token: int
    highest: int = -1
    actions: dict[int, int] = field(default_factory=dict)

    @property
    def architecture(self) -> int:
        """As the kernel tells it to a filter. x32's calls are x86_64's, with a bit set in their numbers."""
        return AUDIT_X86_64 if self.token == X32 else self.token

    @property
    def numbers(self) -> tuple[int, int]:
        """The range of numbers that are this architecture's, the second no more among them."""
        if self.token == X32:
            return X32_BIT, END - 1
        return 0, {AUDIT_X86_64: X32_BIT, AUDIT_ARM: ARM_PRIVATE}.get(self.token, END)

    def name(self, number: int) -> None:
        """The profile names a call with this number; those that do not count upwards are passed over."""
        first, last = self.numbers
        if first <= number < last:
            self.highest = max(self.highest, number)


def number_of(name: str, token: int) -> int | None:
    """The number of a call that is newer than libseccomp."""
    if name in X86_64_ALONE:
        return X86_64_ALONE[name] if token == AUDIT_X86_64 else None
    number = COMMON.get(name)
    return number | X32_BIT if number is not None and token == X32 else number


def prologue(tables: Sequence[Table], *, absent: bool) -> bytes:
    """The instructions; b"" where there is nothing to say. `absent`: whether numbers above the highest are answered with ENOSYS."""
    blocks = [block(table, absent=absent) for table in tables]
    code: list[tuple[int, int, int, int]] = []
    length = sum(len(item) + 1 for item in blocks if item)
    for item in blocks:
        if item:
            # From the end of a block to the program; into the next block only by its own jump.
            code += item
            code.append((JUMP, 0, 0, length - len(code) - 1))
    return b"".join(INSTRUCTION.pack(*line) for line in code)


def block(table: Table, *, absent: bool) -> list[tuple[int, int, int, int]]:
    """The instructions for one architecture. Where it is another, or the number is not its, they lead past the jump that follows them."""
    first, last = table.numbers
    tests = answers(table.actions)
    limits = [*table.actions]
    if absent and table.highest >= 0:
        limits.append(table.highest + 1)
        # Beyond this test there is nothing but the jump to libseccomp's program.
        tests += [(GREATER, 0, 1, table.highest), (RETURN, 0, 0, NOT_THERE)]
    if not tests:
        return []
    ranges = [(AT_LEAST, 0, first)] if first else []
    ranges += [(AT_LEAST, 1, last)] if last < END else []
    body = [(LOAD, 0, 0, NUMBER_AT)]
    after = len(tests) + 1
    for index, (operation, outside, value) in enumerate(ranges):
        # Past the other ranges, the look at the lowest number, the tests and the jump.
        away = len(ranges) - index - 1 + 1 + after
        body.append((operation, away, 0, value) if outside else (operation, 0, away, value))
    body.append((AT_LEAST, 0, len(tests), min(limits)))
    body += tests
    return [(LOAD, 0, 0, ARCHITECTURE_AT), (EQUAL, 0, len(body) + 1, table.architecture), *body]


def answers(actions: Mapping[int, int]) -> list[tuple[int, int, int, int]]:
    """A test and an answer for each number."""
    found: list[tuple[int, int, int, int]] = []
    for number, action in sorted(actions.items()):
        found += [(EQUAL, 0, 1, number), (RETURN, 0, 0, action)]
    return found
