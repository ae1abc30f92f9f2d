"""An interpreter of the classic BPF that seccomp filters are made of: what the kernel would answer to a system call."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from tare.runtime.seccomp_newer import INSTRUCTION

LOAD_ABSOLUTE, LOAD_IMMEDIATE, RETURN, JUMP, AND = 0x20, 0x00, 0x06, 0x05, 0x54
COMPARE: dict[int, Callable[[int, int], bool]] = {
    0x15: lambda a, k: a == k,
    0x25: lambda a, k: a > k,
    0x35: lambda a, k: a >= k,
    0x45: lambda a, k: bool(a & k),
}
STORE, LOAD_MEMORY = 0x02, 0x60


def run(program: bytes, architecture: int, number: int, arguments: Sequence[int] = ()) -> tuple[int, int]:
    """(the answer, how many instructions it took)."""
    filled = [*arguments, *([0] * (6 - len(arguments)))]
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, architecture, 0, *filled)
    memory = [0] * 16
    accumulator = at = steps = 0
    while True:
        code, true, false, value = INSTRUCTION.unpack_from(program, at * 8)
        at += 1
        steps += 1
        if code == LOAD_ABSOLUTE:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif code == LOAD_IMMEDIATE:
            accumulator = value
        elif code == RETURN:
            return value, steps
        elif code == JUMP:
            at += value
        elif code == AND:
            accumulator &= value
        elif code == STORE:
            memory[value] = accumulator
        elif code == LOAD_MEMORY:
            accumulator = memory[value]
        else:
            at += true if COMPARE[code](accumulator, value) else false
