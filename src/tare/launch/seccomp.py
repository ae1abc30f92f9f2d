"""The one filter that is not compiled by libseccomp: an allow list small enough to be written as BPF by hand."""

from __future__ import annotations

import os
import struct

INSTRUCTION = struct.Struct("<HBBI")
LOAD_NUMBER = (0x20, 0, 0, 0)  # offsets into struct seccomp_data
LOAD_ARCH = (0x20, 0, 0, 4)
ALLOW, KILL_PROCESS = 0x7FFF0000, 0x80000000
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# What the loop of a reaping PID 1 uses: wait4, rt_sigtimedwait and rt_sigreturn, memory, and an end.
REAPER = {
    "x86_64": (61, 247, 128, 15, 13, 14, 9, 11, 12, 25, 28, 202, 60, 231),
    "aarch64": (260, 95, 137, 139, 134, 135, 222, 215, 214, 216, 233, 98, 93, 94),
}


def reaper_program(machine: str = os.uname().machine) -> bytes:
    """BPF for the reaping PID 1 of a pod: its few system calls, and death for any other."""
    return allow_list(AUDIT_ARCH[machine], REAPER[machine])


def allow_list(arch: int, numbers: tuple[int, ...]) -> bytes:
    """A program that allows these system calls of one architecture and kills the process for anything else."""
    count = len(numbers)
    lines = [LOAD_ARCH, (0x15, 0, count + 1, arch), LOAD_NUMBER]
    lines += [(0x15, count - index, 0, number) for index, number in enumerate(numbers)]
    lines += [(0x06, 0, 0, KILL_PROCESS), (0x06, 0, 0, ALLOW)]
    return b"".join(INSTRUCTION.pack(*line) for line in lines)
