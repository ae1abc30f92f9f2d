"""Which status code and words each error becomes."""

from __future__ import annotations

import grpc
import pytest

import tare.errors
from tare.cri.errors import MAX_MESSAGE_BYTES, Unimplemented, pull_error, refusal, shortened
from tare.errors import InvalidArgument, NotFound, TareError, UnknownError

FAMILY = [kind for kind in vars(tare.errors).values() if isinstance(kind, type) and issubclass(kind, TareError)]


@pytest.mark.parametrize("kind", [*FAMILY, Unimplemented])
def test_every_error_has_a_code_of_grpc(kind: type[TareError]) -> None:
    answer = refusal("Version", kind("do a thing", step="first", cause="because", hint="try"))
    assert answer.code is grpc.StatusCode[kind.code]
    assert answer.message == "do a thing: at step first: because (try)"
    assert not answer.defect


def test_other_errors_are_defects() -> None:
    answer = refusal("Version", OSError(2, "No such file or directory", "/etc/x"))
    assert answer.code is grpc.StatusCode.INTERNAL
    assert answer.message == "Version: unexpected error: No such file or directory: /etc/x"
    assert answer.defect


def test_pull_errors() -> None:
    malformed = InvalidArgument("read reference X")
    assert pull_error(malformed) is malformed
    error = pull_error(NotFound("pull x", step="resolve", cause="404", hint="is it spelt right?"))
    assert isinstance(error, UnknownError)
    assert str(error) == "pull x: at step resolve: 404 (is it spelt right?)"


@pytest.mark.parametrize("char", ["x", "é", "€", "😀", "\ud800"])
@pytest.mark.parametrize("length", [1, MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES + 1, 100_000])
def test_messages_fit(char: str, length: int) -> None:
    cut = shortened("a" + char * length + "z")
    assert len(cut.encode()) <= MAX_MESSAGE_BYTES
    assert (cut[0], cut[-1]) == ("a", "z")
