"""What the process of a configuration is, has and may do: the steps that it comes to, and the members that are refused."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tare.errors import InvalidArgument
from tare.handlers import attributes, identity
from tare.handlers.capabilities import CAPABILITY_BITS
from tare.handlers.plans import Filter

UNLIMITED = (1 << 64) - 1
USER = {"user": {"uid": 5, "gid": 6}}
CHOWN, KILL, SETUID = (CAPABILITY_BITS[f"CAP_{name}"] for name in ("CHOWN", "KILL", "SETUID"))


def scheduled(policy: str, **more: Any) -> dict[str, Any]:
    return {"scheduler": {"policy": policy, **more}}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"policy": "SCHED_OTHER"}, (48, 0, 0, 0, 0, 0, 0, 0, 0, 0)),
        ({"policy": "SCHED_BATCH", "nice": -20}, (48, 3, 0, -20, 0, 0, 0, 0, 0, 0)),
        ({"policy": "SCHED_FIFO", "priority": 99, "flags": ["SCHED_FLAG_RESET_ON_FORK"]}, (48, 1, 1, 0, 99, 0, 0, 0, 0, 0)),
        ({"policy": "SCHED_ISO"}, (48, 4, 0, 0, 0, 0, 0, 0, 0, 0)),
        ({"policy": "SCHED_DEADLINE", "runtime": 1, "deadline": 1 << 63, "period": UNLIMITED}, (48, 6, 0, 0, 0, 1, 1 << 63, UNLIMITED, 0, 0)),
        ({"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_DL_OVERRUN", "SCHED_FLAG_RECLAIM"]}, (48, 0, 6, 0, 0, 0, 0, 0, 0, 0)),
        ({"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_UTIL_CLAMP_MAX"]}, (56, 0, 0x40, 0, 0, 0, 0, 0, 0, 0)),
        ({"policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_KEEP_POLICY", "SCHED_FLAG_KEEP_PARAMS"]}, (48, 0, 0x18, 0, 0, 0, 0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_scheduler(wanted: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert struct.unpack("=IIQiIQQQII", attributes.scheduler(wanted)) == expected


@pytest.mark.parametrize(
    ("process", "path"),
    [
        ({"scheduler": {}}, "process.scheduler.policy"),
        (scheduled("SCHED_FUN"), "process.scheduler.policy"),
        (scheduled(["SCHED_RR"]), "process.scheduler.policy"),  # type: ignore[arg-type]
        (scheduled("SCHED_OTHER", nice=20), "process.scheduler.nice"),
        (scheduled("SCHED_OTHER", nice=-21), "process.scheduler.nice"),
        (scheduled("SCHED_OTHER", nice=True), "process.scheduler.nice"),
        (scheduled("SCHED_OTHER", priority=1), "process.scheduler.priority"),
        (scheduled("SCHED_FIFO"), "process.scheduler.priority"),
        (scheduled("SCHED_RR", priority=100), "process.scheduler.priority"),
        (scheduled("SCHED_OTHER", runtime=5), "process.scheduler"),
        (scheduled("SCHED_DEADLINE", period=1 << 64), "process.scheduler.period"),
        (scheduled("SCHED_IDLE", flags=["SCHED_FLAG_X"]), r"process.scheduler.flags\[0\]"),
        ({"ioPriority": {"class": "IOPRIO_CLASS_NONE", "priority": 0}}, "process.ioPriority.class"),
        ({"ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": 8}}, "process.ioPriority.priority"),
        ({"ioPriority": {"class": "IOPRIO_CLASS_BE", "priority": "1"}}, "process.ioPriority.priority"),
    ],
)
def test_what_is_no_attribute(process: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^read {path}: "):
        attributes.of(process, None)


def test_personality() -> None:
    assert attributes.of({}, {"domain": "LINUX32"}) == [("personality", "set the personality", 8)]
    for wrong in ({}, {"domain": "linux"}, {"domain": "LINUX", "flags": ["ADDR_NO_RANDOMIZE"]}):
        with pytest.raises(InvalidArgument, match=r"^read linux\.personality\."):
            attributes.of({}, wrong)


def test_nothing_asked_for_is_nothing_done() -> None:
    assert attributes.of({}, None) == [] and attributes.affinity({}) == ([], attributes.any_cpu())
    assert attributes.affinity({"execCPUAffinity": {"initial": "", "final": None}}) == (
        [],
        attributes.any_cpu(),
    )
    assert [step[0] for step in identity.ready({}, None)] == ["keyring"]
    plain = identity.credentials(USER, None)
    assert [step[0] for step in plain] == ["umask", "bounding", "identity", "capabilities"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", (0,)), ("0-3,7", (0, 1, 2, 3, 7)), ("7, 0-1", (0, 1, 7)), ("3-3,3", (3,)), ("65535", (65535,))],
)
def test_cpu_lists(text: str, expected: tuple[int, ...]) -> None:
    assert attributes.cpus("x", text) == expected


@pytest.mark.parametrize(
    "text", ["a", "1-", "-1", "3-1", "1,,2", "1-2-3", "65536", "0-99999999999", "¹", "+1", 5, None]
)
def test_what_is_no_cpu_list(text: object) -> None:
    with pytest.raises(InvalidArgument, match=r"^read x: "):
        attributes.cpus("x", text)


@given(st.sets(st.integers(0, 300), min_size=1))
def test_cpu_lists_are_read_as_they_are_written(wanted: set[int]) -> None:
    parts: list[list[int]] = []
    for number in sorted(wanted):
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    text = ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
    assert set(attributes.cpus("x", text)) == wanted


def test_limits_are_numbered_as_the_kernel_does() -> None:
    rlimits = [{"type": "RLIMIT_RTTIME", "soft": 1, "hard": 2}, {"type": "RLIMIT_LOCKS", "soft": 3, "hard": UNLIMITED}]
    assert identity.limits({"rlimits": rlimits}) == [("RLIMIT_RTTIME", 15, 1, 2), ("RLIMIT_LOCKS", 10, 3, UNLIMITED)]
    final = identity.credentials(USER | {"rlimits": rlimits}, None)
    assert final[1] == ("rlimit", "set RLIMIT_LOCKS", 10, 3, -1)
    assert identity.signed(1 << 63) == -(1 << 63) and identity.signed((1 << 63) - 1) == (1 << 63) - 1


@pytest.mark.parametrize(
    ("rlimits", "path"),
    [
        ([{"type": "RLIMIT_FUN", "soft": 1, "hard": 1}], "type"),
        ([{"type": "RLIM_INFINITY", "soft": 1, "hard": 1}], "type"),
        ([{"type": "RLIMIT_CPU", "soft": 2, "hard": 1}], "soft"),
        ([{"type": "RLIMIT_CPU", "soft": -1, "hard": 1}], "soft"),
        ([{"type": "RLIMIT_CPU", "soft": 1, "hard": 1 << 64}], "hard"),
        ([{"type": "RLIMIT_CPU", "soft": 1}], "hard"),
    ],
)
def test_what_is_no_limit(rlimits: list[dict[str, Any]], path: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^read process\.rlimits\[0\]\.{path}: "):
        identity.limits({"rlimits": rlimits})
    twice = {"rlimits": [{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}] * 2}
    with pytest.raises(InvalidArgument, match=r"^read process\.rlimits\[1\]\.type: RLIMIT_CPU is there twice"):
        identity.limits(twice)


def test_capabilities_that_cannot_be_granted_are_warned_of() -> None:
    process = {
        "capabilities": {
            "bounding": ["CAP_CHOWN", "CAP_NEW"],
            "permitted": ["CAP_CHOWN", "CAP_KILL"],
            "effective": ["CAP_KILL", "CAP_SETUID"],
            "inheritable": ["CAP_CHOWN", "CAP_KILL"],
            "ambient": ["CAP_CHOWN", "CAP_KILL"],
        }
    }
    sets, warnings = identity.capability_sets(process)
    assert sets == {
        "bounding": CHOWN,
        "permitted": CHOWN | KILL,
        "effective": KILL,
        "inheritable": CHOWN,
        "ambient": CHOWN,
    }
    assert warnings == [
        "CAP_NEW of the bounding set is unknown, and not granted",
        "CAP_SETUID cannot be effective: not permitted",
        "CAP_KILL cannot be inheritable: not bounding",
        "CAP_KILL cannot be ambient: not permitted and inheritable",
    ]
    steps = identity.foresee(process)
    assert [step[2].decode() for step in steps if step[0] == "warn"] == warnings


NAMES = st.lists(st.sampled_from([*CAPABILITY_BITS, "CAP_NEW", ""]), max_size=12)


@given(st.fixed_dictionaries(dict.fromkeys(identity.SETS, NAMES)))
def test_the_kernel_takes_whatever_sets_there_are(given_sets: dict[str, list[str]]) -> None:
    """Its rules (capabilities(7)): effective within permitted, inheritable within bounding, ambient within permitted and inheritable."""
    sets, warnings = identity.capability_sets({"capabilities": given_sets})
    assert sets["effective"] & ~sets["permitted"] == 0 and sets["inheritable"] & ~sets["bounding"] == 0
    assert sets["ambient"] & ~(sets["permitted"] & sets["inheritable"]) == 0
    asked = sum(bool(sum({CAPABILITY_BITS.get(name, 0) for name in given_sets[kind]}) != sets[kind]) for kind in sets)
    assert len(warnings) >= asked


FILTER = Filter(program=b"12345678", flags=8, listener="/run/agent.sock")


def test_where_filters_and_hooks_are() -> None:
    hook: Any = ("confined_hook", "startContainer hook /x")
    confined = identity.credentials(USER | {"noNewPrivileges": True}, FILTER, [hook])
    assert [step[0] for step in confined[-3:]] == ["no_new_privileges", "seccomp_last", "confined_hook"]
    free = [step[0] for step in identity.credentials(USER, FILTER, [hook])]
    assert free.index("seccomp") < free.index("identity") < free.index("capabilities") < free.index("confined_hook")
    listening = identity.credentials(USER | {"noNewPrivileges": True}, FILTER, [hook], 3)
    assert listening[-2:] == [("seccomp_listener", "load the seccomp filter", b"12345678", 8, 3), hook]
    early = [step[0] for step in identity.credentials(USER, FILTER, (), 0)]
    assert early.index("bounding") < early.index("seccomp_listener") < early.index("identity")
