"""The default profile, and the choice among profiles."""

from __future__ import annotations

import errno
import json
from typing import Any

import pytest

from tare.errors import InvalidArgument
from tare.runtime.records import Capabilities, ContainerSecurity, ProfileType, SecurityProfile
from tare.runtime.seccomp_profile import (
    WITH_CAPABILITY,
    Profile,
    check_profile,
    choose_profile,
    default_profile,
    localhost_path,
)
from tare.runtime.spec_process import ALL_CAPABILITIES, DEFAULT_CAPABILITIES


def verdicts(profile: Profile) -> dict[str, list[dict[str, Any]]]:
    """The rules for each call."""
    found: dict[str, list[dict[str, Any]]] = {}
    for rule in profile["syscalls"]:
        for name in rule["names"]:
            found.setdefault(name, []).append(rule)
    return found


def answer(profile: Profile, name: str) -> int:
    """0: allowed, else errno; for rules without conditions."""
    rules = verdicts(profile).get(name)
    if rules is None:
        return int(profile["defaultErrnoRet"])
    (rule,) = rules
    assert "args" not in rule
    return 0 if rule["action"] == "SCMP_ACT_ALLOW" else int(rule["errnoRet"])


DEFAULT = default_profile(DEFAULT_CAPABILITIES, "x86_64")


@pytest.mark.parametrize(
    "name", ["read", "execve", "openat2", "ptrace", "chroot", "memfd_create", "futex_waitv", "pidfd_open"]
)
def test_what_is_allowed(name: str) -> None:
    assert answer(DEFAULT, name) == 0


@pytest.mark.parametrize(
    "name", ["mount", "bpf", "kexec_load", "keyctl", "io_uring_setup", "setns", "userfaultfd", "reboot"]
)
def test_what_is_denied(name: str) -> None:
    assert answer(DEFAULT, name) == errno.EPERM


@pytest.mark.parametrize("name", ["clone3", "tomorrows_call", "uselib", "sysfs"])
def test_what_does_not_exist(name: str) -> None:
    assert answer(DEFAULT, name) == errno.ENOSYS


@pytest.mark.parametrize("capability", sorted(WITH_CAPABILITY))
def test_a_capability_brings_its_calls(capability: str) -> None:
    without, granted = default_profile((), "x86_64"), default_profile((capability,), "x86_64")
    for name in WITH_CAPABILITY[capability].split():
        assert answer(granted, name) == 0
        if name != "clone":
            assert answer(without, name) != 0


def test_no_call_has_two_unconditional_rules() -> None:
    for capabilities in ((), DEFAULT_CAPABILITIES, ALL_CAPABILITIES):
        for name, rules in verdicts(default_profile(capabilities, "x86_64")).items():
            assert len(rules) == 1 or all("args" in rule for rule in rules), name


def test_architectures() -> None:
    assert default_profile((), "aarch64")["architectures"] == ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]
    assert default_profile((), "s390x")["architectures"] == ["SCMP_ARCH_S390X", "SCMP_ARCH_S390"]
    assert default_profile((), "vax")["architectures"] == []


def test_the_default_is_a_profile() -> None:
    check_profile("default", json.loads(json.dumps(DEFAULT)))


def security(kind: ProfileType | None, reference: str = "", **other: Any) -> ContainerSecurity:
    wanted = None if kind is None else SecurityProfile(type=kind, localhost_ref=reference)
    return ContainerSecurity(seccomp=wanted, **other)


def test_the_choice() -> None:
    assert choose_profile(security(None)) is None
    assert choose_profile(security(ProfileType.UNCONFINED)) is None
    assert choose_profile(security(ProfileType.RUNTIME_DEFAULT, privileged=True)) is None
    assert choose_profile(security(ProfileType.RUNTIME_DEFAULT)) == default_profile(DEFAULT_CAPABILITIES)
    more = choose_profile(security(ProfileType.RUNTIME_DEFAULT, capabilities=Capabilities(add=("SYS_ADMIN",))))
    assert more is not None and answer(more, "mount") == 0
    mine = {"defaultAction": "SCMP_ACT_ALLOW"}
    assert choose_profile(security(ProfileType.LOCALHOST, "/p.json"), json.dumps(mine).encode()) == mine


def test_where_a_localhost_profile_is() -> None:
    assert localhost_path(security(ProfileType.LOCALHOST, "/p.json")) == "/p.json"
    assert localhost_path(security(ProfileType.LOCALHOST, "localhost//p.json")) == "/p.json"
    assert localhost_path(security(ProfileType.LOCALHOST, "/p.json", privileged=True)) is None
    assert localhost_path(security(ProfileType.RUNTIME_DEFAULT)) is None
    with pytest.raises(InvalidArgument, match="not an absolute path"):
        localhost_path(security(ProfileType.LOCALHOST, "p.json"))


ALLOW_X = {"names": ["x"], "action": "SCMP_ACT_ALLOW"}


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ([], "seccomp is not an object"),
        ({}, "defaultAction None is none of"),
        ({"defaultAction": "ALLOW"}, "defaultAction 'ALLOW' is none of"),
        ({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": -1}, "defaultErrnoRet -1"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "architectures": "x"}, "architectures is not a list of strings"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": {}}, "syscalls is not a list"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [1]}, r"syscalls\[0\] is not an object"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": []}]}, r"syscalls\[0\]\.names is empty"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["x"]}]}, r"syscalls\[0\]\.action None"),
        ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{**ALLOW_X, "args": [{}]}]}, r"args\[0\]\.index is absent"),
        (
            {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{**ALLOW_X, "args": [{"index": 6, "value": 1}]}]},
            r"args\[0\]\.index 6",
        ),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{**ALLOW_X, "args": [{"index": 0, "value": 1, "op": "EQ"}]}],
            },
            r"args\[0\]\.op 'EQ'",
        ),
    ],
)
def test_what_is_no_profile(value: object, word: str) -> None:
    with pytest.raises(InvalidArgument, match=word):
        choose_profile(security(ProfileType.LOCALHOST, "/p.json"), json.dumps(value).encode())


def test_what_is_no_json() -> None:
    with pytest.raises(InvalidArgument, match=r"read seccomp profile /p\.json"):
        choose_profile(security(ProfileType.LOCALHOST, "/p.json"), b"{")
