"""Whether a filter lets be done what the launcher still has to do once it is loaded: then it is loaded before a process appears in the
container's PID namespace, where who may trace would get hold of it. Pure: the filter's program is run over these calls.

Every instruction that filters are made of is known here but those that compute; a program with another one is taken to refuse.
Source: bpf(4) of the BSDs and Linux's networking/filter.rst for the instructions, seccomp(2) for the answers.
"""

from __future__ import annotations

import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Call = tuple[int, tuple[int, ...]]

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
INSTRUCTION = struct.Struct("<HBBI")
DATA = struct.Struct("<IIQ6Q")  # struct seccomp_data
LOAD, LOAD_VALUE, LOAD_MEMORY, STORE, AND = 0x20, 0x00, 0x60, 0x02, 0x54
JUMP, EQUAL, GREATER, AT_LEAST, ANY_BIT, RETURN = 0x05, 0x15, 0x25, 0x35, 0x45, 0x06
PASSING = (0x7FFF0000, 0x7FFC0000)  # SECCOMP_RET_ALLOW, SECCOMP_RET_LOG
ANSWER = 0xFFFF0000

CLONE_PARENT_PIDFD = 0x9000
TIOCSCTTY = 0x540E
KEEP_CAPABILITIES, DUMPABLE, AMBIENT, RAISE = 8, 4, 47, 2
CAPABILITIES = 64

NUMBERS = {
    "x86_64": {
        **{
            "close": 3,
            "mmap": 9,
            "mprotect": 10,
            "munmap": 11,
            "brk": 12,
            "ioctl": 16,
            "mremap": 25,
            "madvise": 28,
            "sendmsg": 46,
        },
        **{"recvmsg": 47, "clone": 56, "execve": 59, "setsid": 112, "setgroups": 116, "setresuid": 117},
        **{"setresgid": 119, "capget": 125, "capset": 126, "prctl": 157, "gettid": 186, "futex": 202},
        **{"exit_group": 231, "prlimit64": 302},
    },
    "aarch64": {
        **{
            "close": 57,
            "mmap": 222,
            "mprotect": 226,
            "munmap": 215,
            "brk": 214,
            "ioctl": 29,
            "mremap": 216,
            "madvise": 233,
        },
        **{"sendmsg": 211, "recvmsg": 212, "clone": 220, "execve": 221, "setsid": 157, "setgroups": 159},
        **{"setresuid": 147, "setresgid": 149, "capget": 90, "capset": 91, "prctl": 167, "gettid": 178, "futex": 98},
        **{"exit_group": 94, "prlimit64": 261},
    },
}
MEMORY = ("brk", "mmap", "mprotect", "munmap", "mremap", "madvise", "futex")
TO_MAKE = ("close", "sendmsg", "exit_group", "gettid", "setsid", "recvmsg", "prlimit64", "execve")
TO_BECOME = ("setgroups", "setresgid", "setresuid", "capget", "capset")
KEPT = 64

known: dict[tuple[bytes, bool, str], bool] = {}
"""What was found out, by program; there are as many as there are profiles, and a daemon has few."""


def lets_through(program: bytes, confined: bool, machine: str = os.uname().machine) -> bool:
    """Whether all that comes between the filter and the program's own calls passes; credentials are set by then if `confined`."""
    key = (program, confined, machine)
    if key not in known:
        if len(known) >= KEPT:
            known.clear()
        known[key] = machine in NUMBERS and all_pass(program, machine, calls(NUMBERS[machine], confined))
    return known[key]


def calls(numbers: dict[str, int], confined: bool) -> Iterator[Call]:
    """(number, arguments that a filter may look at): to make a process and to be it until its execve, and to take the credentials."""
    for name in (*MEMORY, *TO_MAKE):
        yield numbers[name], ()
    yield numbers["clone"], (CLONE_PARENT_PIDFD,)
    yield numbers["ioctl"], (0, TIOCSCTTY)
    if confined:
        return
    for name in TO_BECOME:
        yield numbers[name], ()
    yield numbers["prctl"], (KEEP_CAPABILITIES, 1)
    yield numbers["prctl"], (DUMPABLE, 0)
    for capability in range(CAPABILITIES):
        yield numbers["prctl"], (AMBIENT, RAISE, capability)


def all_pass(program: bytes, machine: str, wanted: Iterable[Call]) -> bool:
    """Whether the program lets each of these calls pass."""
    lines = list(INSTRUCTION.iter_unpack(program))
    for number, arguments in wanted:
        filled = (*arguments, *((0,) * (6 - len(arguments))))
        data = DATA.pack(number, ARCHITECTURES[machine], 0, *filled)
        if answer(lines, data) & ANSWER not in PASSING:
            return False
    return True


def answer(lines: list[tuple[int, int, int, int]], data: bytes) -> int:
    """What the kernel would answer to a call; 0, which is to kill the thread, where that cannot be told."""
    memory = [0] * 16
    value = at = 0
    while at < len(lines):
        code, true, false, operand = lines[at]
        at += 1
        if code == LOAD:
            value = int.from_bytes(data[operand : operand + 4], "little")
        elif code == EQUAL:
            at += true if value == operand else false
        elif code == GREATER:
            at += true if value > operand else false
        elif code == AT_LEAST:
            at += true if value >= operand else false
        elif code == ANY_BIT:
            at += true if value & operand else false
        elif code == JUMP:
            at += operand
        elif code == RETURN:
            return operand
        elif code == AND:
            value &= operand
        elif code == LOAD_VALUE:
            value = operand
        elif code == LOAD_MEMORY:
            value = memory[operand & 15]
        elif code == STORE:
            memory[operand & 15] = value
        else:
            return 0
    return 0
