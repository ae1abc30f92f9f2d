"""Device rules: v1's lines, and the v2 program."""

from __future__ import annotations

import errno
import os

import pytest

from tare.cgroups import bpf, core, devices
from tare.cgroups.devices import BLOCK, CHARACTER, MKNOD, READ, WRITE, Rule
from tare.cgroups.section import Section
from tare.errors import FailedPrecondition, InvalidArgument
from tests.support.bpf import run

DENY_ALL = Rule(allow=False)


def allowed(rules: list[Rule], kind: int, access: int, major: int, minor: int) -> bool:
    return bool(run(devices.program(rules), kind, access, major, minor))


def test_nothing_is_allowed_that_no_rule_allows() -> None:
    assert not allowed([], CHARACTER, READ, 1, 3)
    assert not allowed([DENY_ALL], CHARACTER, READ, 1, 3)
    assert allowed([Rule(allow=True)], BLOCK, READ | WRITE | MKNOD, 8, 0)


def test_the_last_rule_that_matches_decides() -> None:
    rules = [DENY_ALL, Rule(allow=True, type=CHARACTER, major=1), Rule(allow=False, type=CHARACTER, major=1, minor=1)]
    assert allowed(rules, CHARACTER, READ, 1, 3)
    assert not allowed(rules, CHARACTER, READ, 1, 1)
    assert not allowed(rules, BLOCK, READ, 1, 3)
    assert not allowed(rules, CHARACTER, READ, 2, 3)
    assert allowed([*rules, Rule(allow=True)], CHARACTER, READ, 1, 1)
    assert not allowed([Rule(allow=True), DENY_ALL], CHARACTER, READ, 1, 1)


def test_every_right_is_needed_and_any_denied_one_is_too_much() -> None:
    rules = [DENY_ALL, Rule(allow=True, type=CHARACTER, major=5, minor=0, access=READ)]
    assert allowed(rules, CHARACTER, READ, 5, 0)
    assert not allowed(rules, CHARACTER, READ | WRITE, 5, 0)
    rules = [Rule(allow=True), Rule(allow=False, type=BLOCK, access=WRITE)]
    assert allowed(rules, BLOCK, READ, 8, 0)
    assert not allowed(rules, BLOCK, READ | WRITE, 8, 0)


def test_two_rules_for_one_device_add_up_until_one_denies() -> None:
    read, write = (Rule(allow=True, type=CHARACTER, major=5, minor=0, access=bit) for bit in (READ, WRITE))
    assert allowed([DENY_ALL, read, write], CHARACTER, READ | WRITE, 5, 0)
    assert not allowed([DENY_ALL, read, Rule(allow=False, type=CHARACTER, access=READ), write], CHARACTER, READ, 5, 0)


def test_lines_for_v1() -> None:
    rules = [DENY_ALL, Rule(allow=True, major=1, minor=3, access=READ | WRITE), Rule(allow=True)]
    assert devices.lines(rules) == [
        ("devices.deny", "a"),
        ("devices.allow", "b 1:3 rw"),
        ("devices.allow", "c 1:3 rw"),
        ("devices.allow", "a"),
    ]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.ENOSYS])
def test_without_a_device_program_nothing_is_made_but_in_a_user_namespace(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(bpf, "attach", refuse)
    monkeypatch.setattr(core, "restricted_user", lambda: False)
    with pytest.raises(FailedPrecondition, match="restrict the devices of cgroup /x"):
        core.guard("/x", [Rule(allow=False)])
    assert core.guard("/x", [Rule(allow=True)]) == []
    monkeypatch.setattr(core, "restricted_user", lambda: True)
    assert core.guard("/x", [Rule(allow=False)]) == ["devices"]


def test_parsing() -> None:
    rule = {"allow": True, "type": "u", "major": 10, "minor": -1, "access": "wr"}
    parsed = devices.parse([Section("x", rule), Section("y", {"allow": True, "type": "p", "access": "r"})])
    assert parsed == (Rule(allow=True, type=CHARACTER, major=10, access=READ | WRITE),)
    with pytest.raises(InvalidArgument, match="no device rule"):
        devices.parse([Section("x", {"allow": True, "access": "rx"})])
    with pytest.raises(InvalidArgument, match=r"x\.major"):
        devices.parse([Section("x", {"allow": True, "major": 1 << 32})])
