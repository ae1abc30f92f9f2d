"""An interpreter of the few BPF instructions that device programs are made of."""

from __future__ import annotations

from tare.cgroups import devices


def run(code: bytes, kind: int, access: int, major: int, minor: int) -> int:
    """What the kernel would compute for one access (bits of MKNOD, READ, WRITE) to one device."""
    registers = [0] * 10
    context = {0: access << 16 | kind, 4: major, 8: minor}
    at = 0
    while True:
        operation, names, offset, value = devices.INSTRUCTION.unpack_from(code, at * devices.INSTRUCTION.size)
        target, source = names & 15, names >> 4
        at += 1
        match operation:
            case devices.LOAD_WORD:
                registers[target] = context[offset]
            case devices.MOVE_REGISTER:
                registers[target] = registers[source]
            case devices.MOVE:
                registers[target] = value
            case devices.AND:
                registers[target] &= value
            case devices.SHIFT_RIGHT:
                registers[target] >>= value
            case devices.JUMP_EQUAL:
                at += offset if registers[target] == value else 0
            case devices.JUMP_UNEQUAL:
                at += offset if registers[target] != value else 0
            case devices.EXIT:
                return registers[devices.ANSWER]
            case _:
                raise AssertionError(f"instruction {operation:#x}")
