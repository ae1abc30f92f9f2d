"""What is used up is said by name, whatever the error was wrapped in."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import grpc
import pytest

from tare.cri.errors import refusal
from tare.errors import FailedPrecondition, InternalError, UnknownError
from tare.storage import room


def wrapped(cause: BaseException, kind: type[Exception] = InternalError) -> Exception:
    """As a step raises it."""
    try:
        try:
            raise cause
        except BaseException as error:
            raise kind("make it") from error
    except Exception as error:  # noqa: BLE001 - what it raises is what is wanted
        return error


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.EMFILE, "RLIMIT_NOFILE"),
        (errno.ENFILE, "fs.file-max"),
        (errno.ENOMEM, "memory"),
        (errno.ENOSPC, "no room left in /nowhere/at/all"),
        (errno.EROFS, "file system / is read-only"),
    ],
)
def test_the_kernels_numbers(number: int, words: str) -> None:
    error = OSError(number, os.strerror(number), "/nowhere/at/all")
    assert words in (room.shortage(wrapped(error)) or "")
    answer = refusal("Call", wrapped(error))
    assert (answer.code, words in answer.message, answer.defect) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True, False)


def test_what_is_something_else() -> None:
    for error in (OSError(errno.ENOENT, "gone"), OSError(errno.EAGAIN, "again"), ValueError("x"), RuntimeError("x")):
        assert room.shortage(wrapped(error)) is None
    assert refusal("Call", wrapped(OSError(errno.ENOENT, "gone", "/x"))).code is grpc.StatusCode.INTERNAL
    assert refusal("Call", ValueError("x")).defect


def test_codes_that_clients_go_by_stay() -> None:
    full = OSError(errno.ENOMEM, "none")
    assert refusal("PullImage", wrapped(full, UnknownError)).code is grpc.StatusCode.UNKNOWN
    assert refusal("StartContainer", wrapped(full, FailedPrecondition)).code is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_thread_that_cannot_be_started() -> None:
    answer = refusal("Call", RuntimeError("can't start new thread"))
    assert (answer.code, "PID" in answer.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)


def test_a_file_system_is_named(tmp_path: Path) -> None:
    """By where it is mounted; one with room is not blamed."""
    assert room.of_disk(tmp_path / "not" / "there") is None
    assert os.path.ismount(room.mount_point(tmp_path))
