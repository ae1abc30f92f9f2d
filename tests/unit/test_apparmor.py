"""The default AppArmor profile: what AppArmor's own parser says of it, and what becomes of it on nodes with and without AppArmor."""

from __future__ import annotations

import asyncio
import logging
import subprocess
from typing import Any

import pytest

from tare.errors import DeadlineExceeded
from tare.handlers.commands import Ended
from tare.runtime import apparmor
from tare.runtime.labels import APPARMOR_DEFAULT, Kernel


class Runner:
    """Notes the commands, and ends them so."""

    def __init__(self, end: Ended | Exception) -> None:
        self.end = end
        self.ran: list[tuple[list[str], bytes]] = []

    async def run(self, argv: list[str], *, stdin: bytes, timeout: float) -> Ended:
        self.ran.append((argv, stdin))
        if isinstance(self.end, Exception):
            raise self.end
        return self.end


def loaded(node: Kernel, end: Ended | Exception = Ended(0, "")) -> Runner:  # noqa: B008 - a tuple
    runner: Any = Runner(end)
    asyncio.run(apparmor.load(runner, node))
    return runner  # type: ignore[no-any-return]


def test_the_profile_is_one_for_the_parser() -> None:
    command = ["apparmor_parser", "--skip-kernel-load", "--skip-cache", "--names"]
    found = subprocess.run(command, input=apparmor.PROFILE, capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.split() == [APPARMOR_DEFAULT]
    options = [word for word in apparmor.OPTIONS if word != "--replace"]
    compiled = subprocess.run(
        ["apparmor_parser", "--skip-kernel-load", "--stdout", *options],
        input=apparmor.PROFILE.encode(),
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert APPARMOR_DEFAULT.encode() in compiled.stdout


def test_it_is_replaced_where_the_kernel_has_apparmor() -> None:
    for profiles in (frozenset[str](), frozenset({APPARMOR_DEFAULT})):
        (argv, text) = loaded(Kernel(profiles=profiles)).ran[0]
        assert argv[0].endswith("/apparmor_parser") and "--replace" in argv
        assert text == apparmor.PROFILE.encode()
    assert loaded(Kernel()).ran == []


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (Ended(1, "no such file system"), "ended with 1: no such file"),
        (DeadlineExceeded("run x", cause="too slow"), "too slow"),
    ],
)
def test_it_is_said_where_it_cannot_be(end: Ended | Exception, words: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        loaded(Kernel(profiles=frozenset()), end)
    assert words in caplog.text


def test_it_is_said_where_there_is_no_parser(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(apparmor, "DIRECTORIES", "/nonexistent")
    assert loaded(Kernel(profiles=frozenset())).ran == []
    assert "there is no apparmor_parser in /nonexistent" in caplog.text
