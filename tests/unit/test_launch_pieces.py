"""The small pure parts of launching: sealed plans, exit records, the filter of a pod's PID 1, what refusals are turned into."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from pathlib import Path

import pytest

from tare.handlers import processes
from tare.handlers.processes import Process
from tare.launch import linux, plan, seccomp, tasks

ALLOW, KILL = seccomp.ALLOW, seccomp.KILL_PROCESS


def test_a_plan_comes_back_as_it_was_and_cannot_be_changed() -> None:
    work: plan.Plan = {
        "steps": [("open", "label é", b"\xff\0", -1, True, (1, None))],
        "argv": [b"a"],
        "n": 1 << 70,
        "nothing": {},
    }
    fd = plan.seal(work)
    try:
        assert plan.read(fd) == work
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == plan.SEALS
        assert not os.get_inheritable(fd)
        for change in (lambda: os.write(fd, b"x"), lambda: os.ftruncate(fd, 0), lambda: os.ftruncate(fd, 1 << 20)):
            with pytest.raises(PermissionError):
                change()
    finally:
        os.close(fd)


def test_a_plan_whose_memory_is_held_is_written_to_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    create = os.memfd_create
    held: list[mmap.mmap] = []

    def create_held(name: str, flags: int) -> int:
        fd = create(name, flags)
        if len(held) < 2:  # what is mapped for writing cannot be sealed
            os.ftruncate(fd, mmap.PAGESIZE)
            held.append(mmap.mmap(fd, mmap.PAGESIZE))
        return fd

    monkeypatch.setattr(os, "memfd_create", create_held)
    fd = plan.seal({"n": 1})
    try:
        assert len(held) == 2
        assert plan.read(fd) == {"n": 1}
        assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) == plan.SEALS
    finally:
        os.close(fd)
        for memory in held:
            memory.close()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, file = os.write, tmp_path / "file"
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, bytes(data[:3])))
    linux.replace_file(str(file), b"0123456789")
    assert file.read_bytes() == b"0123456789"

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="no space"):
        linux.replace_file(str(file), b"other")
    assert file.read_bytes() == b"0123456789"
    assert list(tmp_path.iterdir()) == [file]


def test_a_plan_that_is_too_large() -> None:
    with pytest.raises(OSError, match="at most") as caught:
        plan.seal({"env": [b"x" * plan.MAX_SIZE]})
    assert caught.value.errno == 7


@pytest.mark.parametrize(
    ("text", "code", "signal", "known"),
    [
        ("exited 0 123\n", 0, 0, True),
        ("exited 255 123\n", 255, 0, True),
        ("killed 9 123\n", 137, 9, True),
        ("killed 64 123\n", 192, 64, True),
        ("", 255, 0, False),
        ("exited 3\n", 255, 0, False),
        ("vanished 3 123\n", 255, 0, False),
        ("exited three 123\n", 255, 0, False),
        ("exited 3 123 4\n", 255, 0, False),
    ],
)
def test_exit_records(text: str, code: int, signal: int, known: bool) -> None:
    record = processes.parse_record(Process(1, 2), text)
    assert (record.code, record.signal, record.known, record.process) == (code, signal, known, Process(1, 2))
    assert not known or record.finished_at == 123


@pytest.mark.parametrize(
    ("status", "code", "signal"), [(0, 0, 0), (7 << 8, 7, 0), (255 << 8, 255, 0), (9, 137, 9), (11 | 0x80, 139, 11)]
)
def test_wait_statuses(status: int, code: int, signal: int) -> None:
    record = processes.from_status(Process(1, 2), status, 5)
    assert (record.code, record.signal, record.finished_at, record.known) == (code, signal, 5, True)


def test_markers(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    tasks.mark(str(tmp_path), 5, 6)
    assert (tmp_path / "tasks/5.6").exists()
    tasks.unmark(str(tmp_path), 5, 6)
    tasks.unmark(str(tmp_path), 5, 6)
    assert not (tmp_path / "tasks/5.6").exists()


def test_processes_that_files_name(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    assert linux.recorded(str(file)) is None
    own = os.getpid(), linux.start_time(os.getpid())
    for text in ("", "x y", "1", "1 2 3", f"{own[0]} {own[1] + 1}", "999999999 1", "-1 5"):
        file.write_text(text)
        assert linux.recorded(str(file)) is None, text
    linux.replace_file(str(file), b"%d %d\n" % own)
    found = linux.recorded(str(file))
    assert found is not None and found[0] == own[0]
    os.close(found[1])
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]


def evaluate(program: bytes, arch: int, number: int) -> int:
    """What the kernel makes of a system call by a classic BPF program (loads, jumps on equality, returns)."""
    data = {0: number, 4: arch}
    accumulator = place = 0
    while True:
        code, true, false, value = struct.unpack_from("<HBBI", program, place * 8)
        place += 1
        if code == 0x20:
            accumulator = data[value]
        elif code == 0x15:
            place += true if accumulator == value else false
        elif code == 0x06:
            return int(value)
        else:
            raise AssertionError(f"instruction {code:#x}")


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of_a_reaping_pid_1(machine: str) -> None:
    program = seccomp.reaper_program(machine)
    arch, allowed = seccomp.AUDIT_ARCH[machine], seccomp.REAPER[machine]
    for number in range(1024):
        expected = ALLOW if number in allowed else KILL
        assert evaluate(program, arch, number) == expected, number
    for wrong in (0, 0x40000003, arch ^ 1):
        assert {evaluate(program, wrong, number) for number in allowed} == {KILL}
    assert evaluate(program, arch, allowed[0] | 0x40000000) == KILL  # x32
