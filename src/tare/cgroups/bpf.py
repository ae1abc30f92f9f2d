"""Device programs in the kernel: loaded, attached to a v2 group, found again and replaced.

A group's program lives as long as the group, and works together with those of the groups above and with others at the same group
(systemd's, where the unit has DeviceAllow). Ours are known by their name. Source: bpf(2), include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import errno
import os

from tare.cgroups.devices import INSTRUCTION
from tare.launch import linux

NR_BPF = 321 if os.uname().machine == "x86_64" else 280
PROG_LOAD, PROG_ATTACH, PROG_DETACH, PROG_GET_FD_BY_ID, GET_INFO_BY_FD, PROG_QUERY = 5, 8, 9, 13, 15, 16
PROG_TYPE_CGROUP_DEVICE, ATTACH_CGROUP_DEVICE = 15, 6
ALLOW_MULTI, REPLACE = 2, 4
NAME = b"tare_devices"
LICENSE = ctypes.create_string_buffer(b"Apache-2.0")
MOST_PROGRAMS = 64
NAME_AT, NAME_LENGTH = 64, 16


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
        ("prog_name", ctypes.c_char * NAME_LENGTH),
    ]


class AttachAttributes(ctypes.Structure):
    """The part that BPF_PROG_ATTACH and BPF_PROG_DETACH need."""

    _fields_ = [
        ("target_fd", ctypes.c_uint32),
        ("attach_bpf_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("replace_bpf_fd", ctypes.c_uint32),
    ]


class QueryAttributes(ctypes.Structure):
    """The part that BPF_PROG_QUERY needs."""

    _fields_ = [
        ("target_fd", ctypes.c_uint32),
        ("attach_type", ctypes.c_uint32),
        ("query_flags", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("prog_ids", ctypes.c_uint64),
        ("prog_cnt", ctypes.c_uint32),
    ]


class InfoAttributes(ctypes.Structure):
    """The part that BPF_OBJ_GET_INFO_BY_FD needs."""

    _fields_ = [("bpf_fd", ctypes.c_uint32), ("info_len", ctypes.c_uint32), ("info", ctypes.c_uint64)]


class IdAttributes(ctypes.Structure):
    """The part that BPF_PROG_GET_FD_BY_ID needs."""

    _fields_ = [("prog_id", ctypes.c_uint32), ("next_id", ctypes.c_uint32), ("open_flags", ctypes.c_uint32)]


def bpf(command: int, attributes: ctypes.Structure, doing: str) -> int:
    """bpf(2)."""
    size = ctypes.c_uint(ctypes.sizeof(attributes))
    result = linux.syscall(ctypes.c_long(NR_BPF), ctypes.c_int(command), ctypes.byref(attributes), size)
    return linux.check(result, doing)


def attach(directory: str, code: bytes, *, replace: bool = False) -> None:
    """Let a program decide for the v2 group in `directory`; with `replace` it takes the place of Tare's program there, at one stroke."""
    loaded = load(code)
    try:
        group = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            old = own(group, directory) if replace else []
            try:
                target = AttachAttributes(group, loaded, ATTACH_CGROUP_DEVICE, ALLOW_MULTI)
                if old:
                    target.attach_flags, target.replace_bpf_fd = ALLOW_MULTI | REPLACE, old[0]
                bpf(PROG_ATTACH, target, f"attach a device program to {directory}")
                for left in old[1:]:
                    bpf(PROG_DETACH, AttachAttributes(group, left, ATTACH_CGROUP_DEVICE), f"detach from {directory}")
            finally:
                for program in old:
                    os.close(program)
        finally:
            os.close(group)
    finally:
        os.close(loaded)


def load(code: bytes) -> int:
    """A descriptor of the program, once the kernel has found it harmless."""
    buffer = ctypes.create_string_buffer(code, len(code))
    attributes = LoadAttributes(
        prog_type=PROG_TYPE_CGROUP_DEVICE,
        insn_cnt=len(code) // INSTRUCTION.size,
        insns=ctypes.addressof(buffer),
        license=ctypes.addressof(LICENSE),
        prog_name=NAME,
    )
    return bpf(PROG_LOAD, attributes, "load a device program")


def own(group: int, directory: str) -> list[int]:
    """Descriptors of the programs at a group that are Tare's."""
    found: list[int] = []
    try:
        for number in attached(group, directory):
            try:
                program = bpf(PROG_GET_FD_BY_ID, IdAttributes(number), f"look at device program {number}")
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue
                raise
            if name_of(program) == NAME:
                found.append(program)
            else:
                os.close(program)
    except OSError:
        for program in found:
            os.close(program)
        raise
    return found


def attached(group: int, directory: str) -> list[int]:
    """The numbers of the programs at a group itself."""
    numbers = (ctypes.c_uint32 * MOST_PROGRAMS)()
    query = QueryAttributes(
        target_fd=group, attach_type=ATTACH_CGROUP_DEVICE, prog_ids=ctypes.addressof(numbers), prog_cnt=MOST_PROGRAMS
    )
    bpf(PROG_QUERY, query, f"list the device programs of {directory}")
    return list(numbers[: query.prog_cnt])


def name_of(program: int) -> bytes:
    """The name that a program was loaded with."""
    info = ctypes.create_string_buffer(NAME_AT + NAME_LENGTH)
    bpf(GET_INFO_BY_FD, InfoAttributes(program, len(info), ctypes.addressof(info)), "look at a device program")
    return info.raw[NAME_AT:].partition(b"\0")[0]
